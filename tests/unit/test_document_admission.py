"""The memory preflight of documents: what is promised, who waits, whose turn it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from paddlewheel.admission import DocumentAdmission
from registry.names import ModelName
from registry.spec import ModelDocument
from tests.unit.manager_harness import ManagedNode, document, managed

pytestmark = pytest.mark.looptime


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> AsyncIterator[ManagedNode]:
    async with managed(tmp_path, quotas_mb={"cpu": 1000, "gpu:0": 500}) as node:
        yield node


@pytest.fixture
def admission(node: ManagedNode) -> DocumentAdmission:
    return DocumentAdmission((), node.devices, node.manager)


def asking(model: str, mb: int, live: str = "1", *, device: str = "cpu", **placement: Any) -> Any:
    spec: dict[str, Any] = {
        "placement": {"device": device, "memoryMB": mb, **placement}, "rollback": {"bake_s": 600},
    }  # fmt: skip
    return document(live, model=model, **spec)


def refusal(admission: DocumentAdmission, wish: ModelDocument, **more: Any) -> str:
    errors = admission.check(wish, {}, **more)
    return errors[0].message if errors else ""


async def test_what_is_promised_is_not_promised_again(admission: DocumentAdmission) -> None:
    assert refusal(admission, asking("a", 600)) == ""
    assert refusal(admission, asking("b", 500)) == (
        "needs 500 MB beside the 0 MB of what serves now; of the 1000 MB of cpu, 600 MB are other"
        " models', 400 MB are free"
    )
    assert refusal(admission, asking("b", 400)) == ""
    assert refusal(admission, asking("c", 300, device="gpu:0")) == ""
    # A new document of the same model replaces what the one before was promised.
    assert refusal(admission, asking("a", 500)) == ""
    assert refusal(admission, asking("d", 100)) == ""
    assert "it has cpu, gpu:0" in refusal(admission, asking("e", 1, device="gpu:1"))


async def test_replicas_and_canary_count(admission: DocumentAdmission) -> None:
    assert refusal(admission, asking("a", 300, replicas=3)) == ""
    canary = document("1", model="b", canary="2", placement={"memoryMB": 60})
    assert "needs 120 MB" in refusal(admission, canary)
    assert refusal(admission, asking("b", 60)) == ""


async def test_the_first_in_line_on_each_device(admission: DocumentAdmission) -> None:
    admission.check(asking("a", 1000), {})
    admission.check(asking("g", 500, device="gpu:0"), {})
    for model, mb, priority in (
        ("small", 100, "low"),
        ("large", 900, "normal"),
        ("next", 1, "low"),
    ):
        assert refusal(admission, asking(model, mb, priority=priority))
    assert refusal(admission, asking("gpu", 100, device="gpu:0"))
    assert refusal(admission, asking("huge", 2000, priority="high")), "in nobody's way"
    assert admission.now_fitting() is None
    admission.room.clear()
    admission.forget(ModelName("g"))
    assert admission.room.is_set()
    assert admission.now_fitting() == "gpu"
    assert refusal(admission, asking("gpu", 100, device="gpu:0")) == ""
    admission.check(asking("a", 500), {})
    assert admission.now_fitting() is None, "the small one waits behind the large one"
    admission.check(asking("a", 100), {})
    assert admission.now_fitting() == "large"
    assert refusal(admission, asking("large", 900)) == ""
    assert admission.now_fitting() is None
    admission.withdraw(ModelName("small"))
    admission.forget(ModelName("a"))
    assert admission.now_fitting() == "next"


async def test_a_wish_keeps_its_place_and_a_new_one_goes_to_the_end(
    admission: DocumentAdmission,
) -> None:
    admission.check(asking("a", 1000), {})
    for model in ("b", "c"):
        assert refusal(admission, asking(model, 500))
    assert refusal(admission, asking("b", 500)), "asked again"
    older = asking("b", 400)
    assert refusal(admission, older, is_newest=False), "what history knows is no wish"
    admission.forget(ModelName("a"))
    assert admission.now_fitting() == "b"
    admission.check(asking("a", 1000), {})
    assert refusal(admission, asking("b", 501)), "another one"
    admission.forget(ModelName("a"))
    assert admission.now_fitting() == "c"


async def test_what_serves_counts_beside_what_is_wanted(
    node: ManagedNode, admission: DocumentAdmission
) -> None:
    first = asking("a", 400)
    assert refusal(admission, first) == ""
    await node.put_and_settle(first, 1)
    assert "beside the 400 MB of what serves now" in refusal(admission, asking("a", 700, "2"))
    second = asking("a", 500, "2")
    assert refusal(admission, second) == ""
    await node.put_and_settle(second, 2)
    # 500 live, 400 standby: an equal's standby counts, one of a lower priority yields.
    assert "900 MB are other models', 100 MB" in refusal(admission, asking("b", 300))
    assert refusal(admission, asking("b", 300, priority="high")) == ""
    assert refusal(admission, first) == "", "back to the standby, which is there already"


async def test_a_swap_of_another_model_is_waited_for(
    node: ManagedNode, admission: DocumentAdmission
) -> None:
    """Both versions of the other take memory for a moment; that moment refuses nobody."""
    first = asking("a", 400)
    admission.check(first, {})
    await node.put_and_settle(first, 1)
    assert refusal(admission, asking("a", 400, "2")) == ""
    assert refusal(admission, asking("b", 500)) == ""
    assert refusal(admission, asking("c", 200))


async def test_freed_memory_makes_room(node: ManagedNode, admission: DocumentAdmission) -> None:
    wish = asking("a", 400)
    admission.check(wish, {})
    await node.put_and_settle(wish, 1)
    assert refusal(admission, asking("b", 700))
    admission.room.clear()
    node.delete("a")
    await node.passes(60)
    assert admission.room.is_set()
    assert admission.now_fitting() is None, "still promised: nobody said that the document is gone"
    admission.forget(ModelName("a"))
    assert admission.now_fitting() == "b"
