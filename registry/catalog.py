"""What this node knows of its fleet's documents, folded from what the store says (pure).

A catalog is a value: `Catalog.apply` gives the next one and the changes in order, so that a batch
half applied is never seen and a test is a list of batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from registry.document import read
from registry.document_tree import ConfigError, FieldError
from registry.keys import Keys, LastGoodKey, ModelKey, QuarantineKey, RolloutKey
from registry.names import ModelName, Revision, Version
from registry.records import BadRecord, LastGood, Quarantine
from registry.rollouts import RolloutRecord
from registry.saved import SavedDocument, Snapshot
from registry.spec import ModelDocument, parse_model
from registry.store import Batch, Delete, Event, KeyValue, Listing, Put

Accept = Callable[[ModelDocument], tuple[FieldError, ...]]
"""What else a node asks of a document that parses (allowed sources, memory); empty: accepted."""

LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


# --- changes ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DocumentAccepted:
    """A new revision of a model's document is in force."""

    model: ModelName
    revision: Revision
    document: ModelDocument
    text: str


@dataclass(frozen=True, slots=True)
class DocumentRefused:
    """A new revision was seen and changes nothing: the last accepted one stays in force."""

    model: ModelName
    revision: Revision
    errors: tuple[FieldError, ...]
    text: bytes


@dataclass(frozen=True, slots=True)
class DocumentDeleted:
    """The key is gone: drain and unload."""

    model: ModelName
    revision: Revision


@dataclass(frozen=True, slots=True)
class DocumentMissing:
    """Another store, or one that went back in time, does not have it: it stays in force."""

    model: ModelName
    revision: Revision


@dataclass(frozen=True, slots=True)
class QuarantineChanged:
    model: ModelName
    version: Version
    quarantine: Quarantine | None
    """``None``: released."""


@dataclass(frozen=True, slots=True)
class LastGoodChanged:
    model: ModelName
    lastgood: LastGood | None


@dataclass(frozen=True, slots=True)
class RolloutChanged:
    model: ModelName
    rollout: RolloutRecord | None


@dataclass(frozen=True, slots=True)
class RecordIgnored:
    """A record that can't be read, for the log; what was known before stays."""

    key: str
    reason: str


Change = (
    DocumentAccepted | DocumentRefused | DocumentDeleted | DocumentMissing
    | QuarantineChanged | LastGoodChanged | RolloutChanged | RecordIgnored
)  # fmt: skip


# --- state ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accepted:
    """The document in force."""

    revision: Revision
    document: ModelDocument
    text: str
    created: Revision = Revision(0)
    """Of the model's first document since it was last deleted: what is older is over. 0: not known
    (from a snapshot)."""


@dataclass(frozen=True, slots=True)
class Known:
    """One model's document, as last seen and as last accepted."""

    revision: Revision
    """Of the last one seen."""
    sha256: str
    """Of its bytes: a store restored from a backup may reach the same revision with others."""
    errors: tuple[FieldError, ...] = ()
    """Why the last one seen was refused; empty when it was accepted."""
    accepted: Accepted | None = None
    """The last one accepted: the same revision or an older one."""
    is_missing: bool = False
    """The store that we follow now never had it."""

    @property
    def is_accepted(self) -> bool:
        """Of the last one seen."""
        return not self.errors


def _nothing(_document: ModelDocument) -> tuple[FieldError, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Heard:
    """The last listing of a prefix."""

    revision: Revision
    store_id: str


@dataclass(frozen=True, slots=True)
class Catalog:
    """All that the store has said so far, as far as it concerns what to serve."""

    models: Mapping[ModelName, Known] = field(default_factory=dict[ModelName, Known])
    quarantines: Mapping[tuple[ModelName, Version], Quarantine] = field(
        default_factory=dict[tuple[ModelName, Version], Quarantine]
    )
    lastgoods: Mapping[ModelName, LastGood] = field(default_factory=dict[ModelName, LastGood])
    rollouts: Mapping[ModelName, RolloutRecord] = field(
        default_factory=dict[ModelName, RolloutRecord]
    )
    applied: Mapping[str, Revision] = field(default_factory=dict[str, Revision])
    """Key to the mod_revision applied last, deleted keys included: what comes late is ignored."""
    heard: Mapping[str, Heard] = field(default_factory=dict[str, Heard])
    """By prefix."""

    def apply(
        self, batch: Batch, keys: Keys, *, accept: Accept = _nothing
    ) -> tuple[Catalog, tuple[Change, ...]]:
        """The next catalog and what changed, in the batch's order.

        Events at or below a key's applied revision are ignored, so a batch may come twice. Each
        revision of a document is a change of its own. Keys that are not ours pass unseen.
        """
        fold = _Fold(self, keys, accept)
        for event in batch.events:
            fold.event(event)
        return fold.result()

    def relist(
        self, listing: Listing, keys: Keys, prefix: str | None = None, *, accept: Accept = _nothing
    ) -> tuple[Catalog, tuple[Change, ...]]:
        """Make the listing of ``prefix`` (the root when not given) the truth, whatever was known.

        What is known under ``prefix`` and not listed was deleted meanwhile. A key at another
        revision than the one known is applied even when it is lower: that is a store restored
        from a backup or made anew, and waiting for its revisions to catch up would be for ever.
        What such a store lacks was deleted by nobody: a document stays in force (`DocumentMissing`)
        until it is put there, or put and then deleted. An etcd that lost its disk takes no model
        away.
        """
        fold = _Fold(self, keys, accept)
        fold.relist(listing, keys.root if prefix is None else prefix)
        return fold.result()

    def reconsider(
        self, model: ModelName, raw: bytes, *, accept: Accept
    ) -> tuple[Catalog, tuple[Change, ...]]:
        """Take the document last seen of ``model``, refused then, if nothing is against it now.

        raw: its text. Nothing changes when it is another one, was accepted, or is refused again.
        """
        known = self.models.get(model)
        if known is None or known.is_accepted or known.sha256 != _sha256(raw):
            return self, ()
        try:
            document = parse_model(raw, name=model)
        except ConfigError:
            return self, ()
        if accept(document):
            return self, ()
        text = raw.decode("utf-8")
        accepted = Accepted(known.revision, document, text)
        models = {**self.models, model: replace(known, errors=(), accepted=accepted)}
        change = DocumentAccepted(model, known.revision, document, text)
        return replace(self, models=models), (change,)

    @classmethod
    def restore(
        cls, snapshot: Snapshot, keys: Keys, *, accept: Accept = _nothing
    ) -> tuple[Catalog, tuple[Change, ...]]:
        """Start from a snapshot of the same prefix, before the store could be asked.

        Its documents are parsed and accepted again: flags or this program may have changed.
        """
        if snapshot.prefix != keys.prefix:
            return cls(), ()
        fold = _Fold(cls(), keys, accept)
        for model, saved in sorted(snapshot.documents.items()):
            fold.document(keys.model(model), model, saved.revision, saved.text.encode())
        for (model, version), quarantine in sorted(snapshot.quarantines.items()):
            fold.quarantine(model, version, quarantine)
        for model, good in sorted(snapshot.lastgoods.items()):
            fold.lastgood(model, good)
        for model, rollout in sorted(snapshot.rollouts.items()):
            fold.rollout(model, rollout)
        return fold.result()

    def snapshot(self, keys: Keys) -> Snapshot:
        """What is worth keeping on disk. Equal catalogs give equal snapshots."""
        return Snapshot(
            documents={
                model: SavedDocument(known.accepted.revision, known.accepted.text)
                for model, known in sorted(self.models.items())
                if known.accepted is not None
            },
            lastgoods=dict(self.lastgoods),
            quarantines=dict(self.quarantines),
            rollouts=dict(self.rollouts),
            prefix=keys.prefix,
        )


class _Fold:
    """Copies of a catalog's parts while one batch is folded into them."""

    def __init__(self, start: Catalog, keys: Keys, accept: Accept) -> None:
        self._keys = keys
        self._accept = accept
        self._models = dict(start.models)
        self._quarantines = dict(start.quarantines)
        self._lastgoods = dict(start.lastgoods)
        self._rollouts = dict(start.rollouts)
        self._applied = dict(start.applied)
        self._heard = dict(start.heard)
        self._changes: list[Change] = []

    def result(self) -> tuple[Catalog, tuple[Change, ...]]:
        catalog = Catalog(
            self._models,
            self._quarantines,
            self._lastgoods,
            self._rollouts,
            self._applied,
            self._heard,
        )
        return catalog, tuple(self._changes)

    def event(self, event: Event) -> None:
        match event:
            case Put(kv) if kv.mod_revision > self._applied.get(kv.key, 0):
                self._put(kv)
            case Delete(key, revision) if revision > self._applied.get(key, 0):
                self._delete(key, revision)
            case _:
                pass  # seen already

    def relist(self, listing: Listing, prefix: str) -> None:
        is_other = self._is_other(listing, prefix)
        self._heard[prefix] = Heard(listing.revision, listing.store_id)
        for key, revision in self._applied.items():
            if key.startswith(prefix) and revision > listing.revision:
                self._applied[key] = listing.revision  # of a store that is no more
        listed = {kv.key for kv in listing.kvs}
        for key in sorted(self._held()):
            if key.startswith(prefix) and key not in listed and not self._kept(key, is_other):
                self._delete(key, listing.revision)
        for kv in sorted(listing.kvs, key=lambda kv: kv.mod_revision):
            self._put(kv)

    def _is_other(self, listing: Listing, prefix: str) -> bool:
        """Whether this is another store than the one listed before, or that one in its past."""
        before = self._heard.get(prefix)
        if before is None:
            return False  # a start: only the store knows what was deleted meanwhile
        seen = [revision for key, revision in self._applied.items() if key.startswith(prefix)]
        return (
            listing.revision < max([before.revision, *seen]) or listing.store_id != before.store_id
        )

    def _kept(self, key: str, is_other: bool) -> bool:
        """Whether a document that is not listed stays in force all the same."""
        match self._keys.parse(key):
            case ModelKey(model) if model in self._models:
                known = self._models[model]
            case _:
                return False
        if is_other and not known.is_missing:
            self._models[model] = replace(known, is_missing=True)
            self._changes.append(DocumentMissing(model, known.revision))
        return is_other or known.is_missing

    def _held(self) -> set[str]:
        """The keys of all that is known, restored from a snapshot or applied."""
        return {
            *(self._keys.model(model) for model in self._models),
            *(self._keys.quarantine(*pair) for pair in self._quarantines),
            *(self._keys.lastgood(model) for model in self._lastgoods),
            *(self._keys.rollout(model) for model in self._rollouts),
        }

    def _put(self, kv: KeyValue) -> None:
        match self._keys.parse(kv.key):
            case ModelKey(model):
                self.document(kv.key, model, kv.mod_revision, kv.value, kv.create_revision)
            case QuarantineKey(model, version):
                self._applied[kv.key] = kv.mod_revision
                self.quarantine(model, version, self._quarantine_of(kv))
            case LastGoodKey(model):
                self._applied[kv.key] = kv.mod_revision
                try:
                    self.lastgood(model, LastGood.from_json(kv.value))
                except BadRecord as exc:
                    self._changes.append(RecordIgnored(kv.key, str(exc)))
            case RolloutKey(model):
                self._applied[kv.key] = kv.mod_revision
                try:
                    self.rollout(model, RolloutRecord.from_json(kv.value))
                except BadRecord as exc:
                    self._changes.append(RecordIgnored(kv.key, str(exc)))
            case _ if kv.key.startswith(self._keys.models_prefix):
                self._applied[kv.key] = kv.mod_revision
                self._changes.append(RecordIgnored(kv.key, "the key's last part is no model name"))
            case _:
                pass

    def _delete(self, key: str, revision: Revision) -> None:
        match self._keys.parse(key):
            case ModelKey(model):
                self._applied[key] = revision
                if self._models.pop(model, None) is not None:
                    self._changes.append(DocumentDeleted(model, revision))
            case QuarantineKey(model, version):
                self._applied[key] = revision
                self.quarantine(model, version, None)
            case LastGoodKey(model):
                self._applied[key] = revision
                self.lastgood(model, None)
            case RolloutKey(model):
                self._applied[key] = revision
                self.rollout(model, None)
            case _:
                pass

    def document(
        self,
        key: str,
        model: ModelName,
        revision: Revision,
        raw: bytes,
        created: Revision = Revision(0),
    ) -> None:
        sha256 = _sha256(raw)
        before = self._models.get(model)
        self._applied[key] = revision
        if before is not None and (before.revision, before.sha256) == (revision, sha256):
            known = before.accepted
            if known is not None and known.revision >= created:
                known = replace(known, created=created)
            self._models[model] = replace(before, accepted=known, is_missing=False)
            return  # listed again, or restored and now listed
        accepted = None if before is None else before.accepted
        try:
            document = parse_model(raw, name=model)
        except ConfigError as exc:
            errors = exc.errors
        else:
            errors = _with_lines(raw, self._accept(document))
            if not errors:
                text = raw.decode("utf-8")
                accepted = Accepted(revision, document, text, created)
                self._models[model] = Known(revision, sha256, (), accepted)
                self._changes.append(DocumentAccepted(model, revision, document, text))
                return
        self._models[model] = Known(revision, sha256, errors, accepted)
        self._changes.append(DocumentRefused(model, revision, errors, raw))

    def quarantine(self, model: ModelName, version: Version, quarantine: Quarantine | None) -> None:
        if self._quarantines.get((model, version)) == quarantine:
            return
        if quarantine is None:
            del self._quarantines[model, version]
        else:
            self._quarantines[model, version] = quarantine
        self._changes.append(QuarantineChanged(model, version, quarantine))

    def lastgood(self, model: ModelName, lastgood: LastGood | None) -> None:
        if self._lastgoods.get(model) == lastgood:
            return
        if lastgood is None:
            del self._lastgoods[model]
        else:
            self._lastgoods[model] = lastgood
        self._changes.append(LastGoodChanged(model, lastgood))

    def rollout(self, model: ModelName, rollout: RolloutRecord | None) -> None:
        if self._rollouts.get(model) == rollout:
            return
        if rollout is None:
            del self._rollouts[model]
        else:
            self._rollouts[model] = rollout
        self._changes.append(RolloutChanged(model, rollout))

    def _quarantine_of(self, kv: KeyValue) -> Quarantine:
        """A record that can't be read still quarantines: the safe reading of "taken out"."""
        try:
            return Quarantine.from_json(kv.value)
        except BadRecord as exc:
            self._changes.append(RecordIgnored(kv.key, str(exc)))
            return Quarantine(reason="a record that can't be read", code="UNKNOWN", at=LONG_AGO)


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _with_lines(raw: bytes, errors: tuple[FieldError, ...]) -> tuple[FieldError, ...]:
    """Errors from outside know the path; the text knows the line."""
    if not errors:
        return errors
    document = read(raw)
    return tuple(
        error if error.line is not None else replace(error, line=document.line_of(error.path))
        for error in errors
    )
