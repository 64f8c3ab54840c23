"""Every key of the contract, built and read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.keys import (
    BadKey,
    CoordinatorKey,
    EventKey,
    FaultKey,
    GatewayKey,
    HistoryKey,
    Key,
    Keys,
    LastGoodKey,
    ModelKey,
    NodeKey,
    OrderKey,
    PipelineKey,
    PipelineStatusKey,
    QuarantineKey,
    RolloutKey,
    SamplesKey,
    StatusKey,
    normalize_prefix,
)
from registry.names import ModelName, NodeId, Revision, Version

M, V, N = ModelName("ocr-rec"), Version("1.4.0-canary.2"), NodeId("node-1")
ULID = "01HYZ3VJ6T8Q3W9E5R7T1Y2Z4X"
K = Keys()

KEYS: dict[str, tuple[str, Key]] = {
    "/paddlewheel/configs/models/ocr-rec": (K.model(M), ModelKey(M)),
    "/paddlewheel/configs/pipelines/ocr-rec": (K.pipeline(M), PipelineKey(M)),
    "/paddlewheel/pipelines/ocr-rec/node-1": (K.pipeline_status(M, N), PipelineStatusKey(M, N)),
    "/paddlewheel/configs/gateway": (K.gateway, GatewayKey()),
    "/paddlewheel/history/models/ocr-rec/00000000000000000042": (
        K.history(M, Revision(42)),
        HistoryKey(M, Revision(42)),
    ),
    "/paddlewheel/nodes/node-1": (K.node(N), NodeKey(N)),
    "/paddlewheel/status/ocr-rec/node-1": (K.status(M, N), StatusKey(M, N)),
    "/paddlewheel/faults/ocr-rec/1.4.0-canary.2/node-1": (K.fault(M, V, N), FaultKey(M, V, N)),
    "/paddlewheel/quarantine/ocr-rec/1.4.0-canary.2": (K.quarantine(M, V), QuarantineKey(M, V)),
    "/paddlewheel/lastgood/ocr-rec": (K.lastgood(M), LastGoodKey(M)),
    "/paddlewheel/coordinator": (K.coordinator, CoordinatorKey()),
    "/paddlewheel/rollouts/ocr-rec": (K.rollout(M), RolloutKey(M)),
    "/paddlewheel/orders/ocr-rec": (K.order(M), OrderKey(M)),
    "/paddlewheel/samples/ocr-rec/node-1": (K.samples(M, N), SamplesKey(M, N)),
    f"/paddlewheel/events/{ULID}": (K.event(ULID), EventKey(ULID)),
}


@pytest.mark.parametrize("key", KEYS)
def test_built_as_the_contract_says_and_read_back(key: str) -> None:
    built, meant = KEYS[key]
    assert built == key
    assert K.parse(key) == meant


NOT_OURS = [
    "", "/", "/paddlewheel", "/paddlewheel/", "/paddlewheelx/configs/gateway",
    "paddlewheel/nodes/a",
    "/paddlewheel/configs", "/paddlewheel/configs/models/", "/paddlewheel/configs/models/a/b",
    "/paddlewheel/configs/models/a b", "/paddlewheel/configs/models/-a",
    "/paddlewheel/configs/models/" + "a" * 129, "/paddlewheel/configs/gateway/x",
    "/paddlewheel/history/models/a/42", "/paddlewheel/history/models/a/000000000000000000042",
    "/paddlewheel/history/models/a/0000000000000000004x", "/paddlewheel/nodes/",
    "/paddlewheel/nodes/..",
    "/paddlewheel/status/a", "/paddlewheel/faults/a/1", "/paddlewheel/quarantine/a/1 ",
    "/paddlewheel/quarantine/a/", "/paddlewheel/events/1", "/paddlewheel/configs/models/a\n",
    "/paddlewheel/coordinator/", "/paddlewheel/rollouts/", "/paddlewheel/orders/a/b",
    "/paddlewheel/samples/a",
    "/paddlewheel/lastgood/a/", "//paddlewheel/configs/models/a",
    "/paddlewheel/history/models/a/٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٤٢",
]  # fmt: skip


@pytest.mark.parametrize("key", NOT_OURS)
def test_what_is_no_key_of_ours(key: str) -> None:
    assert K.parse(key) is None


def test_a_prefix_ends_in_a_slash_and_never_lists_its_longer_neighbour() -> None:
    a, ab = ModelName("a"), ModelName("ab")
    for prefix, inside, outside in [
        (K.status_prefix(a), K.status(a, N), K.status(ab, N)),
        (K.history_prefix(a), K.history(a, Revision(1)), K.history(ab, Revision(1))),
        (K.quarantine_prefix(a), K.quarantine(a, V), K.quarantine(ab, V)),
        (K.faults_prefix(a), K.fault(a, V, N), K.fault(ab, V, N)),
        (K.faults_prefix(a, V), K.fault(a, V, N), K.fault(a, Version(f"{V}x"), N)),
        (K.models_prefix, K.model(a), K.pipeline("a")),
        (K.nodes_prefix, K.node(N), K.gateway),
        (K.configs_prefix, K.gateway, K.node(N)),
        (K.pipelines_prefix, K.pipeline("a"), K.model(a)),
        (K.quarantines_prefix, K.quarantine(a, V), K.lastgood(a)),
        (K.lastgoods_prefix, K.lastgood(a), K.quarantine(a, V)),
        (K.events_prefix, K.event(ULID), K.gateway),
        (K.root, K.gateway, Keys("/paddlewheel2").gateway),
        (K.status_prefix(), K.status(a, N), K.model(a)),
        (K.history_prefix(), K.history(a, Revision(1)), K.model(a)),
        (K.faults_prefix(), K.fault(a, V, N), K.model(a)),
        (K.quarantine_prefix(), K.quarantine(a, V), K.model(a)),
    ]:
        assert prefix.endswith("/")
        assert inside.startswith(prefix)
        assert not outside.startswith(prefix)


@pytest.mark.parametrize(
    ("given_as", "wanted"),
    [
        ("/paddlewheel", "/paddlewheel"), ("paddlewheel", "/paddlewheel"), ("/a/b/", "/a/b"),
        ("//a///b//", "/a/b"), ("", ""), ("/", ""), ("team-1/pw", "/team-1/pw"),
    ],
)  # fmt: skip
def test_prefixes_are_normalised(given_as: str, wanted: str) -> None:
    assert normalize_prefix(given_as) == wanted
    keys = Keys(given_as)
    assert keys == Keys(wanted)
    assert keys.parse(keys.model(M)) == ModelKey(M)


@pytest.mark.parametrize("prefix", ["/a b", "/a\n", "\t", "a\x7f"])
def test_prefixes_that_nobody_could_type(prefix: str) -> None:
    with pytest.raises(BadKey):
        Keys(prefix)


@given(st.text(max_size=140))
def test_a_name_makes_one_segment_or_nothing(name: str) -> None:
    try:
        built = [
            K.model(ModelName(name)),
            K.lastgood(ModelName(name)),
            K.node(NodeId(name)),
            K.status(M, NodeId(name)),
            K.pipeline(name),
        ]
    except BadKey:
        assert K.parse(f"/paddlewheel/configs/models/{name}") is None
        return
    for key in built:
        assert name in key.split("/")
        assert K.parse(key) is not None


@given(st.text(max_size=80))
def test_reading_any_text_never_fails(text: str) -> None:
    assert K.parse(text) is None or text.startswith("/paddlewheel/")
    K.parse(f"/paddlewheel/{text}")


@pytest.mark.parametrize("name", ["", "a/b", "..", "é", "a b", "a\0"])
def test_names_that_would_name_something_else(name: str) -> None:
    builders = (
        lambda: K.model(ModelName(name)),
        lambda: K.history(ModelName(name), Revision(1)),
        lambda: K.fault(M, Version(name), N),
        lambda: K.quarantine(M, Version(name)),
        lambda: K.status(M, NodeId(name)),
        lambda: K.event(name),
        lambda: K.status_prefix(ModelName(name)),
    )
    for build in builders:
        with pytest.raises(BadKey):
            build()


def test_history_keys_sort_by_revision() -> None:
    revisions = [1, 9, 10, 99, 100, 2**62]
    keys = [K.history(M, Revision(revision)) for revision in revisions]
    assert keys == sorted(keys)
    with pytest.raises(BadKey):
        K.history(M, Revision(-1))


def test_keys_are_values() -> None:
    assert len({Keys(), Keys("paddlewheel"), Keys("/other")}) == 2
    assert repr(Keys()) == "Keys('/paddlewheel')"
