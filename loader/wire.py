"""Messages between front, zygote and worker: JSON, one message a packet.

Never pickle or marshal: a worker whose memory a broken model scribbled over must not be able to
do the front harm. Whatever comes out of a worker is parsed here into values, or is `Nonsense`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson

from loader.arena import ALIGN_BYTES, WIRE_DTYPES, Placed
from loader.errors import LoaderError
from loader.recipe import Recipe
from registry.inference import DTYPES, Signature, TensorSpec
from registry.names import ModelName, Version

MESSAGE_MAX_BYTES = 192 * 1024
"""Fits in the default socket buffer of Linux (212992), which bounds a SEQPACKET packet."""

TEXT_MAX_CHARS = 4000
_RANK_MAX = 32
_COUNT_MAX = 4096

Body = Mapping[str, Any]


class Nonsense(LoaderError):
    """Not a message that our own code sends: the other side's memory cannot be trusted."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong inside a worker, as far as it can be said without its objects.

    ``kind``: ``admission`` (code is the check), ``load``, or ``fault`` (see `loader.faults`).
    """

    kind: str
    code: str
    fault_class: str
    message: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A worker's answer to the request numbered ``id``: exactly one of the two others is set."""

    id: int
    body: Body | None
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class RunDone:
    """A finished run: where its outputs lie in an output arena that is ``arena_bytes`` large."""

    outputs: tuple[Placed, ...]
    run_s: float
    arena_bytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A predictor exists, on the device that was asked for."""

    signature: Signature
    device: str
    load_s: float
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class Warmed:
    """The predictor ran ``runs`` times and every answer was finite (and golden where given)."""

    warm_s: float
    runs: int


def packed(message: Mapping[str, Any]) -> bytes:
    """One packet. Raises `Nonsense` when it would not fit into one."""
    data = orjson.dumps(message)
    if len(data) > MESSAGE_MAX_BYTES:
        raise Nonsense(f"a message of {len(data)} bytes")
    return data


def joined(messages: Sequence[bytes]) -> list[bytes]:
    """As few packets as these messages fit into, in their order; `messages_of` takes one apart."""
    groups: list[list[bytes]] = []
    size = MESSAGE_MAX_BYTES
    for message in messages:
        size += len(message) + 1
        if size > MESSAGE_MAX_BYTES:
            groups.append([])
            size = len(message) + 2
        groups[-1].append(message)
    # One alone stays as it is: it may be as large as a packet.
    return [g[0] if len(g) == 1 else b"[" + b",".join(g) + b"]" for g in groups]


def messages_of(packet: bytes) -> list[dict[str, Any]]:
    """The worker's side of `joined`: the front's own words, so a mistake raises as a bug."""
    found = orjson.loads(packet)
    return cast("list[dict[str, Any]]", found if isinstance(found, list) else [found])


def unpacked(data: bytes) -> dict[str, Any]:
    """Raises `Nonsense`."""
    try:
        message = orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        raise Nonsense(f"not JSON: {data[:80]!r}") from exc
    if not isinstance(message, dict):
        raise Nonsense(f"not an object: {data[:80]!r}")
    return cast("dict[str, Any]", message)


def failure_message(request_id: int, failure: Failure) -> bytes:
    return packed({
        "id": request_id,
        "failure": [failure.kind, failure.code, failure.fault_class,
                    failure.message[:TEXT_MAX_CHARS]],
    })  # fmt: skip


def parse_reply(data: bytes) -> Reply:
    """Raises `Nonsense`."""
    message = unpacked(data)
    request_id = _int(message, "id")
    if "failure" in message:
        fields = _list(message, "failure")
        if len(fields) != 4 or not all(isinstance(field, str) for field in fields):
            raise Nonsense("failure: want four texts")
        kind, code, fault_class, text = fields
        return Reply(request_id, None, Failure(kind, code, fault_class, text[:TEXT_MAX_CHARS]))
    body = message.get("ok")
    if not isinstance(body, dict):
        raise Nonsense("neither ok nor failure")
    return Reply(request_id, cast("Body", body), None)


# --- tensors ------------------------------------------------------------------------------------


def placed_json(places: Sequence[Placed]) -> list[list[Any]]:
    return [[place.name, place.dtype, place.shape, place.offset] for place in places]


def parse_placed(items: Sequence[Any]) -> tuple[Placed, ...]:
    """Raises `Nonsense`. Whether a place is inside its arena is for the arena to say."""
    if len(items) > _COUNT_MAX:
        raise Nonsense(f"{len(items)} tensors")
    places: list[Placed] = []
    for item in items:
        if not isinstance(item, list) or len(item) != 4:
            raise Nonsense("tensor: want [name, dtype, shape, offset]")
        name, dtype, shape, offset = item
        if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in WIRE_DTYPES:
            raise Nonsense(f"tensor: name {name!r}, dtype {dtype!r}")
        if type(offset) is not int or offset < 0 or offset % ALIGN_BYTES:
            raise Nonsense(f"tensor {name}: offset {offset!r}")
        places.append(Placed(name, dtype, _shape(shape, least=0), offset))
    return tuple(places)


def parse_run_done(body: Body) -> RunDone:
    """Raises `Nonsense`."""
    return RunDone(
        parse_placed(_list(body, "outputs")), _seconds(body, "run_s"), _int(body, "arena_bytes")
    )


# --- phases -------------------------------------------------------------------------------------


def signature_json(signature: Signature) -> dict[str, Any]:
    return {
        side: [[spec.name, spec.dtype, spec.shape] for spec in specs]
        for side, specs in (("inputs", signature.inputs), ("outputs", signature.outputs))
    }


def parse_signature(body: Any) -> Signature:
    """Raises `Nonsense`."""
    if not isinstance(body, dict):
        raise Nonsense("signature: want an object")
    sides = cast("Body", body)
    return Signature(_specs(_list(sides, "inputs")), _specs(_list(sides, "outputs")))


def parse_checked(body: Body) -> Signature | None:
    """Raises `Nonsense`."""
    return None if body.get("signature") is None else parse_signature(body["signature"])


def parse_loaded(body: Body) -> Loaded:
    """Raises `Nonsense`."""
    return Loaded(
        parse_signature(body.get("signature")), _text(body, "device"), _seconds(body, "load_s"),
        _int(body, "rss_bytes"),
    )  # fmt: skip


def parse_warmed(body: Body) -> Warmed:
    """Raises `Nonsense`."""
    return Warmed(_seconds(body, "warm_s"), _int(body, "runs"))


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def parse_recipe(fields: Mapping[str, Any]) -> Recipe:
    """The worker's side: the front's own words, so a mistake is a bug and raises as one."""
    known = dict(fields)
    known["model"] = ModelName(known["model"])
    known["version"] = Version(known["version"])
    known["warmup_shapes"] = {k: tuple(v) for k, v in known["warmup_shapes"].items()}
    return Recipe(**known)


# --- fields -------------------------------------------------------------------------------------


def _int(message: Body, name: str) -> int:
    value = message.get(name)
    if type(value) is not int or value < 0:
        raise Nonsense(f"{name}: want an int of 0 or more, got {value!r:.80}")
    return value


def _seconds(message: Body, name: str) -> float:
    value = message.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise Nonsense(f"{name}: want seconds, got {value!r:.80}")
    return float(value)


def _text(message: Body, name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str):
        raise Nonsense(f"{name}: want text, got {value!r:.80}")
    return value


def _list(message: Body, name: str) -> list[Any]:
    value = message.get(name)
    if not isinstance(value, list):
        raise Nonsense(f"{name}: want a list, got {value!r:.80}")
    return value


def _shape(value: Any, *, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _RANK_MAX:
        raise Nonsense(f"shape: {value!r:.80}")
    if not all(type(dim) is int and dim >= least for dim in value):
        raise Nonsense(f"shape: {value!r:.80}")
    return tuple(value)


def _specs(items: list[Any]) -> tuple[TensorSpec, ...]:
    specs: list[TensorSpec] = []
    for item in items[: _COUNT_MAX + 1]:
        if not isinstance(item, list) or len(item) != 3:
            raise Nonsense("signature: want [name, dtype, shape]")
        name, dtype, shape = item
        if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in DTYPES:
            raise Nonsense(f"signature: name {name!r:.80}, dtype {dtype!r:.80}")
        specs.append(TensorSpec(name, dtype, _shape(shape, least=-1)))
    return tuple(specs)
