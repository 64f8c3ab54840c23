"""What the tests of a real node say again and again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddlewheel.models import reference
from tests import models
from tests.e2e.running import OUTPUT, RunningNode, Status, reason_of, states_of
from tests.e2e.traffic import Traffic, rows
from tests.eventually import eventually


async def old_serves_on(
    node: RunningNode, traffic: Traffic, before: Status, failed: Status, version: str
) -> None:
    """What SPEC section 8 says of an accepted document whose version cannot be made READY."""
    assert failed["accepted"] is True
    assert failed["error"] is None
    assert failed["applied_revision"] == before["applied_revision"]
    assert failed["live"] == before["live"]
    assert failed["intent"]["live"] == version
    assert failed["reason"] == f"{version} failed: {reason_of(failed, version)}"
    assert states_of(failed, before["live"]) == ["LIVE"]
    routes = (await node.get("/admin/routes")).json["models"][failed["model"]]
    assert routes["live"] == before["live"]
    assert routes["config_revision"] == before["applied_revision"]
    pinned = await node.infer(failed["model"], {"x": rows(1)}, version=version)
    assert pinned.status == 404
    assert reason_of(failed, version) in pinned.error
    assert "loaded versions: " in pinned.error
    await traffic.goes_on()
    assert (await node.get("/readyz")).status == 200


def golden_for(good: Path, bad: Path, *, off_by: float = 0.0, **outputs: Any) -> Mapping[str, Any]:
    """Golden data of the good version: its own inputs and outputs."""
    x = rows(2, seed=11)
    path = bad.with_name(f"{bad.name}-golden.npz")
    wanted = outputs or {OUTPUT: reference(good, x)}
    models.write_golden(path, {"x": x}, wanted, off_by=off_by)
    return {"warmup": {"golden": str(path)}}


async def check_tag(node: RunningNode, model: str, tag: float) -> None:
    """Whose weights answer, by the last column."""
    answer = await node.infer(model, {"x": rows(1)})
    assert answer.outputs()[OUTPUT][0, -1] == tag


async def gone(node: RunningNode, model: str) -> None:
    """Delete the document and wait until nothing of the model is left."""
    await node.delete(model)

    async def is_gone() -> bool:
        return (
            not await node.status(model) and (await node.infer(model, {"x": rows(1)})).status == 404
        )

    await eventually(is_gone, within_s=20, what=f"{model} gone")
