"""What must hold of every history: each promise reads the record and names what broke it."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import orjson

from registry.keys import Keys, ModelKey, NodeKey
from registry.names import ModelName, NodeId, Revision, Version
from registry.records import LastGood, ModelStatus, NodeRecord
from registry.rollouts import Phase, RolloutRecord
from registry.spec import ConfigError, ModelDocument, parse_model
from registry.store import KeyValue, Put
from tests.sim.history import Answered, Barred, Handed, Leapt, Routed
from tests.sim.network import Written, written_key

if TYPE_CHECKING:
    from tests.sim.scenario import World

KEYS = Keys()
ROLLOUTS = f"{KEYS.prefix}/rollouts/"
COORDINATOR = f"{KEYS.prefix}/coordinator"
SIGHT_S = 6.0
"""How old a coordinator's view of a node may be: calls and watches take so long at worst."""


class Found(NamedTuple):
    """A promise that was broken."""

    promise: str
    at_s: float
    what: str


def check(world: World) -> list[Found]:
    """Everything that can be held against this history."""
    record = Record(world)
    found = [
        *each_revision_once(record),
        *no_rollback_lost(record),
        *availability(record),
        *deleted_for_good(record),
        *no_new_then_old(record),
        *only_with_the_word(record),
        *not_before_all_are_ready(record),
        *one_coordinator(record),
        *no_commit_undone(record),
    ]
    return sorted(found, key=lambda each: each.at_s)


class Record:
    """The history and the journal, in the forms in which promises ask for them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.entries = world.history.entries
        self.journal = world.etcd.journal
        self.documents: dict[ModelName, list[tuple[Revision, ModelDocument | None, bool]]]
        """By model: revision, the document if it is one, whether it was put."""
        self.documents = defaultdict(list)
        self.parsed: dict[tuple[ModelName, Revision], ModelDocument] = {}
        self.rollouts: dict[ModelName, list[tuple[Written, RolloutRecord | None]]]
        self.rollouts = defaultdict(list)
        self.good: dict[ModelName, list[tuple[float, LastGood]]] = defaultdict(list)
        for written in self.journal:
            key = written_key(written)
            if key.startswith(KEYS.lastgoods_prefix):
                kv = value_of(written)
                if kv is not None:
                    model = ModelName(key[len(KEYS.lastgoods_prefix) :])
                    self.good[model].append((written.at_s, LastGood.from_json(kv.value)))
            elif key.startswith(KEYS.models_prefix):
                self._document(written)
            elif key.startswith(ROLLOUTS):
                model = ModelName(key[len(ROLLOUTS) :])
                kv = value_of(written)
                said = None if kv is None else RolloutRecord.from_json(kv.value)
                self.rollouts[model].append((written, said))

    def _document(self, written: Written) -> None:
        key = KEYS.parse(written_key(written))
        assert isinstance(key, ModelKey)
        kv, document = value_of(written), None
        if kv is not None:
            try:
                document = parse_model(kv.value, name=key.model)
                self.parsed[key.model, written.revision] = document
            except ConfigError:
                pass
        self.documents[key.model].append((written.revision, document, kv is not None))

    def deletions(self) -> dict[tuple[str, ModelName], Revision]:
        """The last deletion of a model that each process took note of."""
        return {
            (entry.process, entry.model): entry.revision
            for entry in self.entries
            if isinstance(entry, Handed) and entry.what == "deleted"
        }

    def was_good(self, entry: Routed) -> bool:
        """Whether that version, by that document, had been written down as the last good one."""
        return any(
            at_s <= entry.at_s and (good.version, good.revision) == (entry.live, entry.revision)
            for at_s, good in self.good[entry.model]
        )

    def is_gated(self, model: ModelName, revision: Revision) -> bool:
        document = self.parsed.get((model, revision))
        return document is not None and document.spec.rollout.is_gated


def value_of(written: Written) -> KeyValue | None:
    return written.event.kv if isinstance(written.event, Put) else None


def node_of(process: str) -> NodeId:
    return NodeId(process.partition("#")[0])


# --- documents ----------------------------------------------------------------------------------


def each_revision_once(record: Record) -> Iterator[Found]:
    """A node accepts or refuses each revision once, in order, unless a listing superseded it."""
    last: dict[tuple[str, ModelName], Handed] = {}
    leapt: dict[str, Revision] = {}
    for entry in record.entries:
        if isinstance(entry, Leapt):
            leapt[entry.process] = max(entry.to, leapt.get(entry.process, Revision(0)))
        elif isinstance(entry, Handed):
            key = (entry.process, entry.model)
            before = last.get(key)
            last[key] = entry
            if before is not None and entry.revision <= before.revision:
                yield Found(
                    "each revision once", entry.at_s,
                    f"{entry.process} {entry.what} {entry.model} at {entry.revision} after "
                    f"{before.revision}",
                )  # fmt: skip
            if entry.process not in leapt:
                continue  # from its own disk
            start = max(leapt[entry.process], before.revision if before else Revision(0))
            known = before is not None and before.what != "deleted"
            history = record.documents[entry.model]
            place = bisect_right(history, start, key=lambda each: each[0])
            for revision, _, is_put in history[place:]:
                if revision >= entry.revision:
                    break
                if is_put or known:
                    yield Found(
                        "each revision once", entry.at_s,
                        f"{entry.process} took {entry.model} at {entry.revision} and never saw "
                        f"{revision}",
                    )  # fmt: skip
                    known = is_put


# --- serving ------------------------------------------------------------------------------------


def no_rollback_lost(record: Record) -> Iterator[Found]:
    """A node that knows a version to be quarantined does not serve it, whatever comes."""
    barred: dict[tuple[str, ModelName], frozenset[Version]] = {}
    live: dict[tuple[str, ModelName], Version | None] = {}
    for entry in record.entries:
        if isinstance(entry, Barred):
            barred[entry.process, entry.model] = entry.versions
        elif isinstance(entry, Routed):
            live[entry.process, entry.model] = entry.live
        else:
            continue
        key = (entry.process, entry.model)
        if live.get(key) in barred.get(key, frozenset()):
            yield Found(
                "no rollback lost", entry.at_s,
                f"{entry.process} serves {entry.model}/{live[key]}, known to be quarantined",
            )  # fmt: skip


def availability(record: Record) -> Iterator[Found]:
    """A model that a node serves is served until it is deleted, fails, or its node ends."""
    barred: dict[tuple[str, ModelName], frozenset[Version]] = {}
    handed: dict[tuple[str, ModelName], str] = {}
    live: dict[tuple[str, ModelName], Version | None] = {}
    deleted = record.deletions()
    for entry in record.entries:
        match entry:
            case Barred():
                barred[entry.process, entry.model] = entry.versions
            case Handed():
                handed[entry.process, entry.model] = entry.what
            case Routed():
                key = (entry.process, entry.model)
                before, live[key] = live.get(key), entry.live
                if before is None or entry.live is not None or handed.get(key) == "deleted":
                    continue
                if deleted.get(key, 0) > entry.revision:
                    continue  # `deleted_for_good` has something to say about it
                nature = record.world.user.nature(f"/models/{entry.model}/{before}")
                if not nature.faulty_on and before not in barred.get(key, frozenset()):
                    yield Found(
                        "availability", entry.at_s,
                        f"{entry.process} served {entry.model}/{before} and serves nothing now",
                    )  # fmt: skip
            case _:
                pass


def deleted_for_good(record: Record) -> Iterator[Found]:
    """What a node knows to be deleted does not come back, whatever is put in its place."""
    deleted: dict[tuple[str, ModelName], Revision] = {}
    for entry in record.entries:
        if isinstance(entry, Handed) and entry.what == "deleted":
            deleted[entry.process, entry.model] = entry.revision
        elif isinstance(entry, Routed) and entry.live is not None:
            gone = deleted.get((entry.process, entry.model), Revision(0))
            if entry.revision < gone:
                yield Found(
                    "deleted for good", entry.at_s,
                    f"{entry.process} serves {entry.model} at {entry.revision}, which it knows to "
                    f"have been deleted at {gone}",
                )  # fmt: skip


def no_new_then_old(record: Record) -> Iterator[Found]:
    """Through one gateway: after an answer by a barrier's document, none by an older one."""
    answers: dict[tuple[str, ModelName], list[Answered]] = defaultdict(list)
    for entry in record.entries:
        if isinstance(entry, Answered) and entry.node is not None:
            answers[entry.gateway, entry.model].append(entry)
    for (gateway, model), given in answers.items():
        times = [answer.at_s for answer in given]
        newest: list[Answered] = []
        for answer in given:
            is_newer = not newest or answer.revision > newest[-1].revision
            newest.append(answer if is_newer else newest[-1])
        for answer in given:
            place = bisect_right(times, answer.sent_s)
            if not place:
                continue
            before = newest[place - 1]
            document = record.parsed.get((model, before.revision))
            if document is None or document.spec.rollout.strategy != "barrier":
                continue
            gone = any(
                not is_put and revision > before.revision
                for revision, _, is_put in record.documents[model]
            )
            if answer.revision < before.revision and not gone:
                yield Found(
                    "no new then old", answer.at_s,
                    f"{gateway} gave {model} by {answer.revision} from {answer.node}, after one by "
                    f"{before.revision} from {before.node}",
                )  # fmt: skip


# --- rollouts -----------------------------------------------------------------------------------


def only_with_the_word(record: Record) -> Iterator[Found]:
    """A gated document is in force on a node only once its record says so for that node.

    A node that has nothing else may serve the last good version, whichever document that is of.
    """
    live: dict[tuple[str, ModelName], Version | None] = {}
    for entry in record.entries:
        if not isinstance(entry, Routed):
            continue
        key = (entry.process, entry.model)
        before, live[key] = live.get(key), entry.live
        if not record.is_gated(entry.model, entry.revision) or entry.live is None:
            continue
        if (before is None or before == entry.live) and record.was_good(entry):
            continue
        node = node_of(entry.process)
        if not any(
            said is not None
            and written.at_s <= entry.at_s
            and said.revision == entry.revision
            and (said.phase is Phase.COMMITTED or node in said.released)
            for written, said in record.rollouts[entry.model]
        ):
            yield Found(
                "only with the word", entry.at_s,
                f"{entry.process} has {entry.model} at {entry.revision} in force, unreleased",
            )  # fmt: skip


def not_before_all_are_ready(record: Record) -> Iterator[Found]:
    """A barrier is committed when every node that is concerned had prepared it, or refused."""
    state: dict[str, tuple[float, KeyValue]] = {}
    committed: set[tuple[ModelName, Revision]] = set()
    for written in record.journal:
        key, kv = written_key(written), value_of(written)
        if key.startswith(ROLLOUTS) and kv is not None:
            said = RolloutRecord.from_json(kv.value)
            where = (said.model, said.revision)
            if said.phase is Phase.COMMITTED and where not in committed:
                committed.add(where)
                if said.strategy == "barrier" and record.is_gated(*where):
                    yield from _all_ready(record, said, written, state)
        if kv is None:
            state.pop(key, None)
        else:
            state[key] = (written.at_s, kv)


def _all_ready(
    record: Record,
    said: RolloutRecord,
    written: Written,
    state: Mapping[str, tuple[float, KeyValue]],
) -> Iterator[Found]:
    document = record.parsed[said.model, said.revision]
    concerned = unready = 0
    late: list[NodeId] = []
    for key, (_, kv) in state.items():
        parsed = KEYS.parse(key)
        if not isinstance(parsed, NodeKey):
            continue
        node = NodeRecord.from_json(kv.value)
        labels = document.spec.placement.labels
        if node.draining or not labels.items() <= node.labels.items():
            continue
        registered = next(
            w.at_s for w in record.journal if w.revision == kv.create_revision
        )  # its key may have been written many times since
        if written.at_s - registered < SIGHT_S:
            continue
        concerned += 1
        at_s, status_kv = state.get(KEYS.status(said.model, node.id), (0.0, None))
        if status_kv is not None:
            status = ModelStatus.from_json(status_kv.value)
            prepared = getattr(status, "prepared_revision", None) or 0
            if prepared >= said.revision or written.at_s - at_s < SIGHT_S:
                continue
        unready += 1
        late.append(node.id)
    allowance = concerned * (100 - document.spec.rollout.require_ack) / 100
    if unready > allowance:
        yield Found(
            "not before all are ready", written.at_s,
            f"{said.model} at {said.revision} was committed while {late[:5]} had not prepared it",
        )  # fmt: skip


def one_coordinator(record: Record) -> Iterator[Found]:
    """Whoever writes a rollout's record holds the coordinator's key at that very revision."""
    holder: str | None = None
    for written in record.journal:
        key = written_key(written)
        if key == COORDINATOR:
            holder = written.writer if value_of(written) is not None else None
        elif key.startswith(ROLLOUTS) and written.writer != holder:
            yield Found(
                "one coordinator", written.at_s,
                f"{written.writer or 'nobody'} wrote {key} while the coordinator was {holder}",
            )  # fmt: skip


def no_commit_undone(record: Record) -> Iterator[Found]:
    """Committed and aborted are the end for a document; records only go on to newer ones."""
    for model, writes in record.rollouts.items():
        before: RolloutRecord | None = None
        for written, said in writes:
            if said is not None and before is not None:
                is_ended = before.has_ended and said.revision == before.revision
                if said.revision < before.revision or (is_ended and said.phase != before.phase):
                    yield Found(
                        "no commit undone", written.at_s,
                        f"{model}: {before.revision} {before.phase} became "
                        f"{said.revision} {said.phase}",
                    )  # fmt: skip
            before = said


# --- for people ---------------------------------------------------------------------------------


def rollout_lines(record: Record) -> Iterator[tuple[float, str]]:
    """Each word of the coordinator."""
    for model, writes in record.rollouts.items():
        for written, said in writes:
            if said is None:
                yield written.at_s, f"{written.writer} removes the rollout of {model}"
            else:
                fields = orjson.loads(said.to_json())
                yield written.at_s, f"{written.writer} writes {fields}"
