"""A canary's progress as `status` and `rollouts` tell it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from paddlewheel.cli.canary_view import canary_view
from registry.canary import plan_id
from registry.names import ModelName, Revision, Version
from registry.rollouts import CanaryProgress, Phase, RolloutRecord
from registry.spec import ModelDocument, parse_model

M = ModelName("m")
AT = datetime(2024, 5, 21, 8, 0, 0, tzinfo=UTC)


def document(canary: str) -> ModelDocument:
    text = f"""\
apiVersion: paddlewheel/v1
kind: Model
metadata: {{name: m}}
spec:
  live: "1"
  versions: [{{version: "1", source: /m/1}}, {{version: "2", source: /m/2}}]
  {canary}
"""
    return parse_model(text, name=M)


STEPS = document(
    'canary: {version: "2", steps: [{percent: 5, hold_s: 1}, {percent: 25, hold_s: 1}]}'
)
SHADOW = document('canary: {version: "2", mirror: {percent: 5}, gates: {agreement: 0.9}}')


def record(of: ModelDocument, **progress: Any) -> RolloutRecord:
    canary = CanaryProgress(version=Version("2"), plan=plan_id(of.spec) or "", since=AT, **progress)
    return RolloutRecord(
        model=M, revision=Revision(7), phase=Phase.COMMITTED, since=AT, canary=canary
    )


CASES = {
    "just begun": (
        STEPS, record(STEPS, percent=5), "canary 2 at 5 %, step 1/2: inconclusive"
    ),
    "going on": (
        STEPS,
        record(STEPS, percent=25, step=1, verdict="pass", detail="errors: none"),
        "canary 2 at 25 %, step 2/2: pass: errors: none",
    ),
    "failed": (
        STEPS,
        record(STEPS, verdict="fail", phase="failed", detail="p95: slow"),
        "canary 2 at 0 %, step 1/2: failed: p95: slow",
    ),
    "through": (
        STEPS,
        record(STEPS, percent=25, step=1, verdict="pass", phase="done"),
        "canary 2 at 25 %, step 2/2: passed",
    ),
    "a shadow": (SHADOW, record(SHADOW, verdict="pass"), "canary 2: pass"),
    "word on another canary": (STEPS, record(SHADOW, percent=5), "canary 2: not begun"),
    "no word": (STEPS, None, "canary 2: not begun"),
    "rules alone": (document('canary: {version: "2"}'), None, None),
    "no canary any more": (document(""), record(STEPS, percent=5), None),
    "no document": (None, record(STEPS), None),
}  # fmt: skip


@pytest.mark.parametrize(("of", "said", "wanted"), CASES.values(), ids=CASES.keys())
def test_the_line(of: ModelDocument | None, said: RolloutRecord | None, wanted: str | None) -> None:
    seen = canary_view(of, said)
    assert (None if seen is None else seen.line) == wanted


def test_the_page_about_canaries_shows_the_example() -> None:
    root = Path(__file__).parents[2]
    example = (root / "configs" / "canary-steps.yaml").read_text()
    section = example[example.index("  canary:") :]
    assert section in (root / "docs" / "canary.md").read_text()
