"""What the store says, folded into what this node must do."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from registry.catalog import (
    LONG_AGO,
    Catalog,
    Change,
    DocumentAccepted,
    DocumentDeleted,
    DocumentMissing,
    DocumentRefused,
    LastGoodChanged,
    QuarantineChanged,
    RecordIgnored,
)
from registry.document_tree import FieldError
from registry.keys import Keys
from registry.names import ModelName, NodeId, Revision, Version
from registry.records import LastGood, Quarantine
from registry.spec import ModelDocument
from registry.store import Batch, Delete, Event, KeyValue, Listing, Put
from tests.bad_documents import GOOD

KEYS = Keys()
M = ModelName("m")
KEY = KEYS.model(M)
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
OUT = Quarantine(reason="code 700", code=700, nodes=(NodeId("a"),), at=AT)
FINE = LastGood(version=Version("1"), revision=Revision(3), at=AT)


def text(*, live: str = "1", model: str = "m") -> bytes:
    return (
        GOOD.replace('live: "1"', f'live: "{live}"').replace("name: m,", f"name: {model},").encode()
    )


BROKEN = text(live="9")


def kv(key: str, value: bytes, revision: int) -> KeyValue:
    return KeyValue(key, value, Revision(revision))


def put(key: str, value: bytes, revision: int) -> Event:
    return Put(kv(key, value, revision))


def gone(key: str, revision: int) -> Event:
    return Delete(key, Revision(revision))


def batch(*events: Event) -> Batch:
    last = events[-1]
    return Batch(last.kv.mod_revision if isinstance(last, Put) else last.mod_revision, events)


def listing(revision: int, *kvs: KeyValue, store_id: str = "") -> Listing:
    return Listing(tuple(sorted(kvs, key=lambda kv: kv.key)), Revision(revision), store_id)


def fold(
    *batches: Batch, start: Catalog | None = None, **options: Any
) -> tuple[Catalog, list[Change]]:
    catalog, changes = start or Catalog(), list[Change]()
    for one in batches:
        catalog, more = catalog.apply(one, KEYS, **options)
        changes += more
    return catalog, changes


def short(changes: list[Change] | tuple[Change, ...]) -> list[str]:
    """Changes as a test reads them."""
    shown = []
    for change in changes:
        match change:
            case DocumentAccepted(model, revision, document):
                shown.append(f"{model}@{revision} live {document.spec.live}")
            case DocumentRefused(model, revision, errors):
                shown.append(f"{model}@{revision} refused {errors[0].path}:{errors[0].line}")
            case DocumentDeleted(model, revision):
                shown.append(f"{model}@{revision} deleted")
            case DocumentMissing(model, revision):
                shown.append(f"{model}@{revision} missing")
            case QuarantineChanged(model, version, quarantine):
                shown.append(f"{model}:{version} " + ("released" if quarantine is None else "out"))
            case LastGoodChanged(model, lastgood):
                shown.append(f"{model} good {lastgood and lastgood.version}")
            case RecordIgnored(key):
                shown.append(f"ignored {key}")
    return shown


FOLDS: dict[str, tuple[list[Batch], list[str]]] = {
    "a document": ([batch(put(KEY, text(), 5))], ["m@5 live 1"]),
    "each revision is a change of its own": (
        [
            batch(put(KEY, text(), 5)),
            batch(put(KEY, text(live="2"), 6)),
            batch(put(KEY, text(), 7)),
        ],
        ["m@5 live 1", "m@6 live 2", "m@7 live 1"],
    ),
    "several revisions of one key in a batch keep their order": (
        [batch(put(KEY, text(), 5), put(KEY, BROKEN, 6), put(KEY, text(live="2"), 7))],
        ["m@5 live 1", "m@6 refused spec.live:5", "m@7 live 2"],
    ),
    "the same batch twice": (
        [batch(put(KEY, text(), 5)), batch(put(KEY, text(), 5))],
        ["m@5 live 1"],
    ),
    "an older revision after a newer one": (
        [batch(put(KEY, text(live="2"), 9)), batch(put(KEY, text(), 5)), batch(gone(KEY, 8))],
        ["m@9 live 2"],
    ),
    "the same text put again is a new revision": (
        [batch(put(KEY, text(), 5)), batch(put(KEY, text(), 6))],
        ["m@5 live 1", "m@6 live 1"],
    ),
    "a deletion, then an old put that comes late": (
        [batch(put(KEY, text(), 5)), batch(gone(KEY, 8)), batch(put(KEY, text(), 7))],
        ["m@5 live 1", "m@8 deleted"],
    ),
    "deleted and made again": (
        [batch(put(KEY, text(), 5)), batch(gone(KEY, 8)), batch(put(KEY, text(live="2"), 9))],
        ["m@5 live 1", "m@8 deleted", "m@9 live 2"],
    ),
    "the deletion of what was never there": ([batch(gone(KEY, 8))], []),
    "a name that is not the key's": (
        [batch(put(KEYS.model(ModelName("n")), text(), 5))],
        ["n@5 refused metadata.name:3"],
    ),
    "bytes that are no text": ([batch(put(KEY, b"\xff\x00", 5))], ["m@5 refused :1"]),
    "two models are independent": (
        [
            batch(
                put(KEY, text(), 5),
                put(KEYS.model(ModelName("n")), text(model="n"), 5),
            ),
            batch(gone(KEY, 6)),
        ],
        ["m@5 live 1", "n@5 live 1", "m@6 deleted"],
    ),
    "keys that concern somebody else": (
        [
            batch(
                put("/other/configs/models/m", text(), 5),
                put(KEYS.gateway, b"{}", 5),
                put(KEYS.node(NodeId("a")), b"{}", 5),
                gone(KEYS.node(NodeId("a")), 6),
            )
        ],
        [],
    ),
    "documents under names that no model has": (
        [
            batch(
                put(f"{KEY}/deeper", text(), 5),
                put(f"{KEYS.models_prefix}a b", text(), 5),
                gone(f"{KEYS.models_prefix}a b", 6),
            ),
            batch(put(f"{KEY}/deeper", text(), 5)),
        ],
        [f"ignored {KEY}/deeper", f"ignored {KEYS.models_prefix}a b"],
    ),
    "a quarantine and its release": (
        [
            batch(put(KEYS.quarantine(M, Version("2")), OUT.to_json(), 5)),
            batch(put(KEYS.quarantine(M, Version("2")), OUT.to_json(), 6)),
            batch(gone(KEYS.quarantine(M, Version("2")), 7)),
        ],
        ["m:2 out", "m:2 released"],
    ),
    "a quarantine that can't be read still counts": (
        [batch(put(KEYS.quarantine(M, Version("2")), b"{}", 5))],
        [f"ignored {KEYS.quarantine(M, Version('2'))}", "m:2 out"],
    ),
    "a last-good that can't be read does not": (
        [
            batch(put(KEYS.lastgood(M), FINE.to_json(), 5)),
            batch(put(KEYS.lastgood(M), b"[1", 6)),
            batch(gone(KEYS.lastgood(M), 7)),
        ],
        ["m good 1", f"ignored {KEYS.lastgood(M)}", "m good None"],
    ),
}


@pytest.mark.parametrize("case", FOLDS)
def test_folding(case: str) -> None:
    batches, wanted = FOLDS[case]
    assert short(fold(*batches)[1]) == wanted


def test_a_refused_document_leaves_the_accepted_one_in_force() -> None:
    catalog, _ = fold(batch(put(KEY, text(), 5)), batch(put(KEY, BROKEN, 6)))
    known = catalog.models[M]
    assert known.revision == 6
    assert not known.is_accepted
    assert known.accepted is not None
    assert (known.accepted.revision, known.accepted.document.spec.live) == (5, "1")
    catalog, _ = fold(batch(put(KEY, text(live="2"), 7)), start=catalog)
    assert catalog.models[M].is_accepted


def test_a_catalog_is_a_value() -> None:
    before, _ = fold(batch(put(KEY, text(), 5)))
    known = before.models[M]
    after, _ = fold(batch(gone(KEY, 6)), start=before)
    assert before.models == {M: known}
    assert after.models == {}


def test_another_acceptance_check_is_asked_and_its_errors_get_lines() -> None:
    def only_s3(document: ModelDocument) -> tuple[FieldError, ...]:
        return tuple(
            FieldError(f"spec.versions[{at}].source", None, "want a source under s3://")
            for at, version in enumerate(document.spec.versions)
            if not version.source.startswith("s3://")
        )

    catalog, changes = fold(batch(put(KEY, text(), 5)), accept=only_s3)
    (refused,) = changes
    assert isinstance(refused, DocumentRefused)
    assert [(error.path, error.line) for error in refused.errors] == [
        ("spec.versions[0].source", 8),
        ("spec.versions[1].source", 10),
    ]
    assert catalog.models[M].accepted is None
    s3 = text().replace(b"file:///", b"s3://")
    assert short(fold(batch(put(KEY, s3, 6)), start=catalog, accept=only_s3)[1]) == ["m@6 live 1"]


def test_a_refused_document_may_be_asked_again() -> None:
    """Accepted at its own revision once nothing is against it; quietly left alone otherwise."""

    def never(_: ModelDocument) -> tuple[FieldError, ...]:
        return (FieldError("spec", None, "no room"),)

    def always(_: ModelDocument) -> tuple[FieldError, ...]:
        return ()

    first, _ = fold(batch(put(KEY, text(), 5)))
    wanted = text(live="2")
    refused, _ = fold(batch(put(KEY, wanted, 6)), start=first, accept=never)
    assert refused.reconsider(M, wanted, accept=never) == (refused, ())
    assert refused.reconsider(M, text(), accept=always) == (refused, ()), "not the last one seen"
    assert refused.reconsider(ModelName("n"), wanted, accept=always) == (refused, ())
    accepted, changes = refused.reconsider(M, wanted, accept=always)
    assert short(changes) == ["m@6 live 2"]
    assert accepted.models[M].is_accepted
    assert accepted.snapshot(KEYS).documents[M].revision == 6
    assert accepted.reconsider(M, wanted, accept=always) == (accepted, ())
    broken, _ = fold(batch(put(KEY, b"spec: 1", 7)), start=accepted)
    assert broken.reconsider(M, b"spec: 1", accept=always) == (broken, ())
    assert refused.models[M].accepted == first.models[M].accepted, "a value"


RELISTS: dict[str, tuple[Listing, list[str]]] = {
    "nothing new": (listing(20, kv(KEY, text(), 5)), []),
    "newer": (listing(20, kv(KEY, text(live="2"), 17)), ["m@17 live 2"]),
    "gone meanwhile": (listing(20), ["m@20 deleted"]),
    "one gone, one new": (
        listing(20, kv(KEYS.model(ModelName("n")), text(model="n"), 12)),
        ["m@20 deleted", "n@12 live 1"],
    ),
    "a store restored from a backup": (listing(4, kv(KEY, text(live="2"), 3)), ["m@3 live 2"]),
    "another store at the same revision": (
        listing(5, kv(KEY, text(live="2"), 5)),
        ["m@5 live 2"],
    ),
    "broken meanwhile": (listing(20, kv(KEY, BROKEN, 17)), ["m@17 refused spec.live:5"]),
}


@pytest.mark.parametrize("case", RELISTS)
def test_a_listing_is_the_truth(case: str) -> None:
    known, wanted = RELISTS[case]
    before, _ = fold(batch(put(KEY, text(), 5)))
    after, changes = before.relist(known, KEYS)
    assert short(changes) == wanted
    again, changes = after.relist(known, KEYS)
    assert changes == ()
    assert again == after


@pytest.mark.parametrize(
    "other", [listing(1), listing(40, store_id="b")], ids=["went back", "another cluster"]
)
def test_what_another_store_lacks_was_deleted_by_nobody(other: Listing) -> None:
    before, _ = Catalog().relist(listing(9, kv(KEY, text(), 5), store_id="a"), KEYS)
    after, changes = before.relist(other, KEYS)
    assert short(changes) == ["m@5 missing"]
    assert after.models[M].accepted == before.models[M].accepted
    again, changes = after.relist(replace(other, revision=Revision(50)), KEYS)
    assert changes == (), "it is no news any more, and it stays"
    assert again.models[M].is_missing
    put_again, changes = again.relist(
        replace(other, revision=Revision(60), kvs=(kv(KEY, text(live="2"), 55),)), KEYS
    )
    assert short(changes) == ["m@55 live 2"]
    gone_now, changes = put_again.relist(replace(other, revision=Revision(70)), KEYS)
    assert short(changes) == ["m@70 deleted"]
    assert not gone_now.models


def test_at_a_start_the_store_knows_what_was_deleted_meanwhile() -> None:
    before, _ = fold(batch(put(KEY, text(), 50)))
    _, changes = before.relist(listing(9, store_id="b"), KEYS)
    assert short(changes) == ["m@9 deleted"]


def test_after_a_store_went_back_its_own_revisions_count() -> None:
    before, _ = fold(batch(put(KEY, text(), 50)), batch(gone(KEY, 90)))
    after, _ = before.relist(listing(3), KEYS)
    assert short(fold(batch(put(KEY, text(), 4)), start=after)[1]) == ["m@4 live 1"]


def test_a_listing_of_one_prefix_says_nothing_about_the_others() -> None:
    before, _ = fold(
        batch(put(KEY, text(), 5)),
        batch(put(KEYS.quarantine(M, Version("2")), OUT.to_json(), 6)),
    )
    after, changes = before.relist(listing(9), KEYS, KEYS.models_prefix)
    assert short(changes) == ["m@9 deleted"]
    assert after.quarantines == before.quarantines


def test_quarantines_and_lastgoods_gone_meanwhile() -> None:
    before, _ = fold(
        batch(put(KEYS.quarantine(M, Version("2")), OUT.to_json(), 6)),
        batch(put(KEYS.lastgood(M), FINE.to_json(), 7)),
    )
    after, changes = before.relist(listing(9), KEYS)
    assert short(changes) == ["m good None", "m:2 released"]
    assert (after.quarantines, after.lastgoods) == ({}, {})


def test_a_snapshot_brings_everything_back_and_the_listing_corrects_it() -> None:
    n = ModelName("n")
    before, _ = fold(
        batch(put(KEY, text(), 5)),
        batch(put(KEY, BROKEN, 6)),
        batch(put(KEYS.model(n), text(model="n"), 7)),
        batch(put(KEYS.quarantine(M, Version("2")), OUT.to_json(), 8)),
        batch(put(KEYS.lastgood(M), FINE.to_json(), 9)),
    )
    restored, changes = Catalog.restore(before.snapshot(KEYS), KEYS)
    assert short(changes) == ["m@5 live 1", "n@7 live 1", "m:2 out", "m good 1"]
    assert restored.snapshot(KEYS) == before.snapshot(KEYS)
    now = listing(
        30,
        kv(KEY, BROKEN, 6),
        kv(KEYS.quarantine(M, Version("2")), OUT.to_json(), 8),
        kv(KEYS.lastgood(M), FINE.to_json(), 9),
    )
    after, changes = restored.relist(now, KEYS)
    assert short(changes) == ["n@30 deleted", "m@6 refused spec.live:5"]
    known = after.models[M]
    assert known.accepted is not None
    assert known.accepted.revision == 5


def test_a_snapshot_of_another_prefix_is_not_ours() -> None:
    before, _ = fold(batch(put(KEY, text(), 5)))
    assert Catalog.restore(before.snapshot(Keys("/other")), KEYS) == (Catalog(), ())


def test_a_restored_document_has_to_be_acceptable_still() -> None:
    before, _ = fold(batch(put(KEY, text(), 5)))
    no = FieldError("spec.placement.memoryMB", None, "want at most 32 MB, got 64")
    restored, changes = Catalog.restore(before.snapshot(KEYS), KEYS, accept=lambda _: (no,))
    assert short(changes) == ["m@5 refused spec.placement.memoryMB:18"]
    assert restored.models[M].accepted is None


def test_an_unreadable_quarantine_says_so() -> None:
    catalog, _ = fold(batch(put(KEYS.quarantine(M, Version("2")), b"\xff", 5)))
    held = catalog.quarantines[M, Version("2")]
    assert (held.reason, held.at) == ("a record that can't be read", LONG_AGO)
