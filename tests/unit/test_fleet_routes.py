"""One model's routes as the whole fleet serves them."""

from __future__ import annotations

from typing import Any

from registry.names import NodeId, Revision, Version
from registry.spec import ModelDocument, parse_model
from router.fleet.routes import fleet_route
from router.table import RequestFacts
from tests.fleets import M, fold, put, status


def document(live: str, **spec: Any) -> ModelDocument:
    import orjson

    versions = [{"version": v, "source": f"/models/{v}"} for v in ("1", "2", "3")]
    return parse_model(
        orjson.dumps(
            {
                "apiVersion": "paddlewheel/v1",
                "kind": "Model",
                "metadata": {"name": "m"},
                "spec": {"live": live, "versions": versions, **spec},
            }
        ),
        name=M,
    )


CANARY = {"canary": {"version": "2", "rules": [{"header": {"name": "X-C", "present": True}}]}}
DOCUMENTS = {
    Revision(10): document("1", limits={"timeout_s": 3}),
    Revision(20): document("1", **CANARY, limits={"timeout_s": 7}),
}
WITH_CANARY = status("b", "1", applied=20, states={"1": "LIVE", "2": "CANARY"}, canary=Version("2"))
BOTH = frozenset({NodeId("a"), NodeId("b")})


def test_the_newest_document_in_force_speaks_for_all() -> None:
    reports = fold([put(status("a", applied=10)), put(WITH_CANARY)]).reports[M]
    route = fleet_route(M, reports, DOCUMENTS, BOTH)
    assert route.revision == 20
    assert route.limits.timeout_s == 7
    facts = RequestFacts("m", headers={"x-c": "1"})
    assert route.pick(facts).servable.version == "2"
    only_a = fleet_route(M, reports, DOCUMENTS, frozenset({NodeId("a")}))
    assert only_a.revision == 10
    assert only_a.pick(facts).servable.version == "1"


def test_a_node_that_serves_nothing_speaks_for_nobody() -> None:
    reports = fold([put(status("a", applied=10)), put(status("b", None, applied=20))]).reports[M]
    assert fleet_route(M, reports, DOCUMENTS, BOTH).live is not None


def test_any_version_loaded_anywhere_can_be_pinned() -> None:
    loaded = status("a", "1", states={"1": "LIVE", "3": "FAILED", "2": "FAILED"})
    reports = fold([put(loaded), put(WITH_CANARY)]).reports[M]
    route = fleet_route(M, reports, DOCUMENTS, BOTH)
    assert route.pinned.keys() == {"1", "2"}
    assert route.unavailable == {"3": "FAILED: digest differs"}


def test_a_revision_that_is_not_known_takes_the_document_before_it() -> None:
    reports = fold([put(status("a", applied=15))]).reports[M]
    assert fleet_route(M, reports, DOCUMENTS, BOTH).limits.timeout_s == 3
    reports = fold([put(status("a", applied=5))]).reports[M]
    assert fleet_route(M, reports, DOCUMENTS, BOTH).limits.timeout_s == 3


def test_nobody_serves_it_yet() -> None:
    route = fleet_route(M, {}, DOCUMENTS, frozenset())
    assert route.default is None
    assert route.reason == "no node serves it"
    assert fleet_route(M, {}, {}, frozenset()).default is None
