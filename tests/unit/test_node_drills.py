"""`/admin/drill` on a node: what it says of a drill that fits nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loader.drills import DrillBox
from paddlewheel.node_drills import NodeDrills
from router.errors import BadRequest, RouterError, UnknownModel
from router.http_errors import status_of
from tests.unit.manager_harness import managed


@pytest.mark.parametrize(
    ("model", "error", "status"),
    [("nobody", UnknownModel, 404), (None, BadRequest, 400), (7, BadRequest, 400)],
)
@pytest.mark.looptime
async def test_a_model_that_is_not_here(
    model: Any, error: type[RouterError], status: int, tmp_path: Path
) -> None:
    async with managed(tmp_path) as node:
        with pytest.raises(error) as refused:
            await NodeDrills(DrillBox(), node.manager).arm({"model": model, "code": 700})
    assert status_of(refused.value) == status
