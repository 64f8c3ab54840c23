"""The JSON that nodes write: exact names, canonical bytes, tolerant reading."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from registry.document_tree import FieldError
from registry.names import Digest, ModelName, NodeId, Revision, Version
from registry.records import (
    BadRecord,
    Cordon,
    DeviceRecord,
    ErrorRecord,
    FaultRecord,
    HistoryEntry,
    Intent,
    LastGood,
    ModelStatus,
    NodeRecord,
    Quarantine,
    Record,
    ServableStatus,
    WorkerStatus,
    rfc3339_ms,
)

AT = datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)
SHOWN = "2026-01-02T03:04:05.678Z"
M, V, N = ModelName("m"), Version("1"), NodeId("a")

SERVABLE = ServableStatus(
    model=M, version=V, state="LIVE", digest=Digest("sha256:00"), device="cpu", memory_mb=64,
    workers=(WorkerStatus(pid=7, alive=True),), loaded_at=AT, phases_ms={"warm": 1.5, "fetch": 2},
    errors={"700": 2, "2": 1},
)  # fmt: skip
SERVABLE_JSON = {
    "model": "m", "version": "1", "state": "LIVE", "reason": None, "digest": "sha256:00",
    "device": "cpu", "memory_mb": 64, "workers": [{"pid": 7, "alive": True, "restarts": 0}],
    "loaded_at": SHOWN, "phases_ms": {"fetch": 2.0, "warm": 1.5}, "errors": {"2": 1, "700": 2},
}  # fmt: skip

RECORDS: dict[str, tuple[Record, dict[str, Any]]] = {
    "node": (
        NodeRecord(
            id=N, http="http://127.0.0.1:8500", started_at=AT, version="0.1.0",
            labels={"zone": "a"},
            devices=(
                DeviceRecord(id="cpu", memory_mb=8000, reserved_mb=64),
                DeviceRecord(id="gpu:0", memory_mb=1, cordoned=Cordon(code=79, reason="x", at=AT)),
            ),
        ),
        {
            "id": "a", "http": "http://127.0.0.1:8500", "grpc": None, "started_at": SHOWN,
            "devices": [
                {"id": "cpu", "memory_mb": 8000, "reserved_mb": 64, "cordoned": None},
                {"id": "gpu:0", "memory_mb": 1, "reserved_mb": 0,
                 "cordoned": {"code": 79, "reason": "x", "at": SHOWN}},
            ],
            "labels": {"zone": "a"}, "version": "0.1.0", "draining": False, "lease_ttl_s": 10,
            "uid": None,
        },
    ),
    "status": (
        ModelStatus(
            model=M, node=N, revision=Revision(9), accepted=False, applied_revision=Revision(7),
            error="spec.live (line 5): no", live=V, intent=Intent(live=Version("2")),
            errors=(ErrorRecord.of(FieldError("spec.live", 5, "no")),), servables=(SERVABLE,),
        ),
        {
            "model": "m", "node": "a", "revision": 9, "accepted": False, "applied_revision": 7,
            "prepared_revision": None, "error": "spec.live (line 5): no",
            "errors": [{"path": "spec.live", "line": 5, "message": "no"}],
            "live": "1", "canary": None, "standby": None, "intent": {"live": "2", "canary": None},
            "reason": None, "servables": [SERVABLE_JSON],
        },
    ),
    "servable": (SERVABLE, SERVABLE_JSON),
    "history": (
        HistoryEntry.of(Revision(9), b"abc", AT),
        {
            "revision": 9, "document": "abc", "seen_at": SHOWN,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        },
    ),
    "fault": (
        FaultRecord(code="700", fault_class="sticky", count=3, first_at=AT, last_at=AT),
        {"code": 700, "class": "sticky", "count": 3, "first_at": SHOWN, "last_at": SHOWN,
         "message": ""},
    ),
    "quarantine": (
        Quarantine(reason="r", code="SIGSEGV", nodes=(N,), at=AT),
        {"reason": "r", "code": "SIGSEGV", "nodes": ["a"], "at": SHOWN, "digest": None},
    ),
    "last-good": (
        LastGood(version=V, revision=Revision(9), at=AT),
        {"version": "1", "revision": 9, "at": SHOWN, "digest": None, "previous": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_the_contracts_field_names(name: str) -> None:
    record, wanted = RECORDS[name]
    assert json.loads(record.to_json()) == wanted


@pytest.mark.parametrize("name", RECORDS)
def test_read_back_it_is_the_same_value_and_the_same_bytes(name: str) -> None:
    record, _ = RECORDS[name]
    again = type(record).from_json(record.to_json())
    assert again == record
    assert again.to_json() == record.to_json()


@pytest.mark.parametrize("name", RECORDS)
def test_bytes_are_canonical_whatever_the_order_given(name: str) -> None:
    record, wanted = RECORDS[name]

    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in reversed(value)}
        return [turned(one) for one in value] if isinstance(value, list) else value

    spaced = json.dumps(turned(wanted), indent=3)
    assert type(record).from_json(spaced).to_json() == record.to_json()
    two = {"b": 1, "a": 2}
    one = SERVABLE.model_copy(update={"errors": two})
    other = SERVABLE.model_copy(update={"errors": dict(sorted(two.items()))})
    assert one.to_json() == other.to_json()
    assert b" " not in LastGood(version=V, revision=Revision(1), at=AT).to_json()


@pytest.mark.parametrize("name", RECORDS)
def test_fields_of_later_releases_are_ignored(name: str) -> None:
    record, wanted = RECORDS[name]
    assert type(record).from_json(json.dumps({**wanted, "later": {"x": [1]}})) == record


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_frozen(name: str) -> None:
    record, wanted = RECORDS[name]
    with pytest.raises(ValidationError):
        setattr(record, "fault_class" if name == "fault" else next(iter(wanted)), "x")


BAD = [
    b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe", b'{"version": 7}', b"[" * 5000,
    b'{"version":"1","revision":"x","at":"never"}',
    b'{"version":"1","revision":1,"at":"2026-01-02"}',
    b'{"version":"1","revision":1,"at":"2026-01-02T03:04:05"}', b'{"version":null}', b"\0",
    b'{"version":"1","revision":1,"at":1e300}', b'{"version":"1","revision":1,"at":NaN}',
]  # fmt: skip


@pytest.mark.parametrize("raw", BAD)
def test_bad_bytes_are_a_bad_record_in_one_line(raw: bytes) -> None:
    with pytest.raises(BadRecord) as caught:
        LastGood.from_json(raw)
    assert str(caught.value).startswith("LastGood: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    kind=st.sampled_from([type(record) for record, _ in RECORDS.values()]),
    edits=st.dictionaries(
        st.sampled_from(sorted({k for _, w in RECORDS.values() for k in w})), JSON
    ),
)
def test_odd_values_are_read_or_refused_never_a_crash(
    kind: type[Record], edits: dict[str, Any]
) -> None:
    wanted = next(wanted for record, wanted in RECORDS.values() if type(record) is kind)
    try:
        record = kind.from_json(json.dumps({**wanted, **edits}))
    except BadRecord:
        return
    assert kind.from_json(record.to_json()).to_json() == record.to_json()


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    with pytest.raises(BadRecord):
        NodeRecord.from_json(raw)


@given(st.datetimes(timezones=st.just(UTC)))
def test_times_are_rfc3339_utc_with_milliseconds(at: datetime) -> None:
    shown = rfc3339_ms(at)
    assert len(shown) == 24
    assert shown.endswith("Z")
    assert timedelta(0) <= at - datetime.fromisoformat(shown) < timedelta(milliseconds=1)


def test_times_of_elsewhere_are_shown_in_utc() -> None:
    shanghai = timezone(timedelta(hours=8))
    assert rfc3339_ms(AT.astimezone(shanghai)) == SHOWN
    assert LastGood(version=V, revision=Revision(1), at=AT.astimezone(shanghai)).at.tzinfo is UTC
    with pytest.raises(ValueError, match="aware"):
        rfc3339_ms(datetime(2026, 1, 2))


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("700", 700),
        ("-101", -101),
        (2, 2),
        ("SIGSEGV", "SIGSEGV"),
        ("EXIT:1", "EXIT:1"),
        ("²", "²"),
    ],
)
def test_a_code_is_a_number_where_it_is_one(code: int | str, wanted: int | str) -> None:
    assert Quarantine(reason="", code=code, at=AT).code == wanted


def test_what_paddle_or_a_clock_says_never_costs_a_status() -> None:
    odd = ServableStatus(
        model=M, version=V, state="FAILED", reason="caf\udce9 \0 é", phases_ms={"a": float("nan")}
    )
    written = json.loads(odd.to_json())
    assert written["reason"] == "caf? \0 é"
    assert written["phases_ms"] == {}


def test_a_document_that_is_no_text_is_in_the_history_with_its_exact_digest() -> None:
    entry = HistoryEntry.of(Revision(1), b"\xff", AT)
    assert entry.document == "\ufffd"
    assert entry.sha256.startswith("a8100ae6")


def test_a_last_good_version_keeps_the_one_before() -> None:
    one = LastGood(version=V, revision=Revision(1), at=AT)
    two = LastGood(version=Version("2"), revision=Revision(2), at=AT).after(one)
    again = LastGood(version=Version("2"), revision=Revision(3), at=AT).after(two)
    assert again.revision == 3
    assert LastGood.from_json(again.to_json()) == again
    for good in (two, again):
        assert good.other_than(V) == good
        other = good.other_than(Version("2"))
        assert other is not None
        assert (other.version, other.revision) == (V, 1)
    assert one.other_than(V) is None
