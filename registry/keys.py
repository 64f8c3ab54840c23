"""The key space: every key in etcd is built and read here (pure). SPEC section 2."""

from __future__ import annotations

import re
from dataclasses import dataclass

from registry.errors import PaddlewheelError
from registry.names import ModelName, NodeId, Revision, Version, is_model_name, is_version

DEFAULT_PREFIX = "/paddlewheel"

_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_REVISION = re.compile(r"[0-9]{20}")


class BadKey(PaddlewheelError):
    """A name that may not become part of a key: it would name something else."""


@dataclass(frozen=True, slots=True)
class ModelKey:
    """``configs/models/<model>``"""

    model: ModelName


@dataclass(frozen=True, slots=True)
class PipelineKey:
    """``configs/pipelines/<name>``"""

    name: ModelName


@dataclass(frozen=True, slots=True)
class PipelineStatusKey:
    """``pipelines/<name>/<node>``"""

    name: ModelName
    node: NodeId


@dataclass(frozen=True, slots=True)
class GatewayKey:
    """``configs/gateway``"""


@dataclass(frozen=True, slots=True)
class HistoryKey:
    """``history/models/<model>/<mod_revision, 20 digits>``"""

    model: ModelName
    revision: Revision


@dataclass(frozen=True, slots=True)
class NodeKey:
    """``nodes/<node>``"""

    node: NodeId


@dataclass(frozen=True, slots=True)
class StatusKey:
    """``status/<model>/<node>``"""

    model: ModelName
    node: NodeId


@dataclass(frozen=True, slots=True)
class FaultKey:
    """``faults/<model>/<version>/<node>``"""

    model: ModelName
    version: Version
    node: NodeId


@dataclass(frozen=True, slots=True)
class QuarantineKey:
    """``quarantine/<model>/<version>``"""

    model: ModelName
    version: Version


@dataclass(frozen=True, slots=True)
class LastGoodKey:
    """``lastgood/<model>``"""

    model: ModelName


@dataclass(frozen=True, slots=True)
class CoordinatorKey:
    """``coordinator``"""


@dataclass(frozen=True, slots=True)
class RolloutKey:
    """``rollouts/<model>``"""

    model: ModelName


@dataclass(frozen=True, slots=True)
class OrderKey:
    """``orders/<model>``"""

    model: ModelName


@dataclass(frozen=True, slots=True)
class SamplesKey:
    """``samples/<model>/<node>``"""

    model: ModelName
    node: NodeId


@dataclass(frozen=True, slots=True)
class EventKey:
    """``events/<ULID>``"""

    ulid: str


Key = (
    ModelKey | PipelineKey | PipelineStatusKey | GatewayKey | HistoryKey | NodeKey
    | StatusKey | FaultKey | QuarantineKey | LastGoodKey
    | CoordinatorKey | RolloutKey | OrderKey | SamplesKey | EventKey
)  # fmt: skip


def normalize_prefix(prefix: str) -> str:
    """One leading slash, none at the end, none doubled; ``""`` for the root.

    Raises `BadKey` for control characters and white space.
    """
    if any(char <= " " or char == "\x7f" for char in prefix):
        raise BadKey(f"a key prefix has no spaces or control characters: {prefix!r}")
    parts = [part for part in prefix.split("/") if part]
    return "".join(f"/{part}" for part in parts)


def is_node_id(text: str) -> bool:
    """Whether ``text`` may name a node: it becomes one segment of a key."""
    return _NODE.fullmatch(text) is not None


class Keys:
    """All keys under one prefix. Builders raise `BadKey` for a name that does not fit a segment."""

    __slots__ = ("prefix",)

    def __init__(self, prefix: str = DEFAULT_PREFIX) -> None:
        self.prefix = normalize_prefix(prefix)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keys) and other.prefix == self.prefix

    def __hash__(self) -> int:
        return hash(self.prefix)

    def __repr__(self) -> str:
        return f"Keys({self.prefix!r})"

    # --- prefixes: each ends in a slash, so that `a` never lists `ab` ---------------------------

    @property
    def root(self) -> str:
        return f"{self.prefix}/"

    @property
    def configs_prefix(self) -> str:
        return f"{self.prefix}/configs/"

    @property
    def models_prefix(self) -> str:
        return f"{self.prefix}/configs/models/"

    @property
    def pipelines_prefix(self) -> str:
        return f"{self.prefix}/configs/pipelines/"

    @property
    def nodes_prefix(self) -> str:
        return f"{self.prefix}/nodes/"

    @property
    def quarantines_prefix(self) -> str:
        return f"{self.prefix}/quarantine/"

    @property
    def lastgoods_prefix(self) -> str:
        return f"{self.prefix}/lastgood/"

    @property
    def rollouts_prefix(self) -> str:
        return f"{self.prefix}/rollouts/"

    @property
    def orders_prefix(self) -> str:
        return f"{self.prefix}/orders/"

    @property
    def events_prefix(self) -> str:
        return f"{self.prefix}/events/"

    def history_prefix(self, model: ModelName | None = None) -> str:
        return f"{self.prefix}/history/models/" + _below(model)

    def status_prefix(self, model: ModelName | None = None) -> str:
        return f"{self.prefix}/status/" + _below(model)

    def pipeline_status_prefix(self, name: ModelName | None = None) -> str:
        return f"{self.prefix}/pipelines/" + _below(name)

    def faults_prefix(self, model: ModelName | None = None, version: Version | None = None) -> str:
        return f"{self.prefix}/faults/" + _below(model, version)

    def quarantine_prefix(self, model: ModelName | None = None) -> str:
        return f"{self.prefix}/quarantine/" + _below(model)

    def samples_prefix(self, model: ModelName | None = None) -> str:
        return f"{self.prefix}/samples/" + _below(model)

    # --- keys -----------------------------------------------------------------------------------

    @property
    def gateway(self) -> str:
        return f"{self.prefix}/configs/gateway"

    def model(self, model: ModelName) -> str:
        return f"{self.models_prefix}{_model(model)}"

    def pipeline(self, name: ModelName) -> str:
        return f"{self.pipelines_prefix}{_model(name)}"

    def history(self, model: ModelName, revision: Revision) -> str:
        if revision < 0:
            raise BadKey(f"a revision is not negative: {revision}")
        return f"{self.prefix}/history/models/{_model(model)}/{revision:020d}"

    def node(self, node: NodeId) -> str:
        return f"{self.nodes_prefix}{_node(node)}"

    def status(self, model: ModelName, node: NodeId) -> str:
        return f"{self.prefix}/status/{_model(model)}/{_node(node)}"

    def pipeline_status(self, name: ModelName, node: NodeId) -> str:
        return f"{self.prefix}/pipelines/{_model(name)}/{_node(node)}"

    def fault(self, model: ModelName, version: Version, node: NodeId) -> str:
        return f"{self.prefix}/faults/{_model(model)}/{_version(version)}/{_node(node)}"

    def quarantine(self, model: ModelName, version: Version) -> str:
        return f"{self.quarantines_prefix}{_model(model)}/{_version(version)}"

    def lastgood(self, model: ModelName) -> str:
        return f"{self.lastgoods_prefix}{_model(model)}"

    @property
    def coordinator(self) -> str:
        return f"{self.prefix}/coordinator"

    def rollout(self, model: ModelName) -> str:
        return f"{self.rollouts_prefix}{_model(model)}"

    def order(self, model: ModelName) -> str:
        return f"{self.orders_prefix}{_model(model)}"

    def samples(self, model: ModelName, node: NodeId) -> str:
        return f"{self.prefix}/samples/{_model(model)}/{_node(node)}"

    def event(self, ulid: str) -> str:
        if _ULID.fullmatch(ulid) is None:
            raise BadKey(f"not a ULID: {ulid!r}")
        return f"{self.events_prefix}{ulid}"

    def parse(self, key: str) -> Key | None:
        """What ``key`` is about; ``None`` for a key that is none of ours or names something odd.

        ``parse`` of every key built here gives the names back.
        """
        if not key.startswith(self.root):
            return None
        match key[len(self.root) :].split("/"):
            case ["configs", "models", model] if is_model_name(model):
                return ModelKey(ModelName(model))
            case ["configs", "pipelines", name] if is_model_name(name):
                return PipelineKey(ModelName(name))
            case ["configs", "gateway"]:
                return GatewayKey()
            case ["history", "models", model, revision] if (
                is_model_name(model) and _REVISION.fullmatch(revision) is not None
            ):
                return HistoryKey(ModelName(model), Revision(int(revision)))
            case ["nodes", node] if is_node_id(node):
                return NodeKey(NodeId(node))
            case ["status", model, node] if is_model_name(model) and is_node_id(node):
                return StatusKey(ModelName(model), NodeId(node))
            case ["pipelines", name, node] if is_model_name(name) and is_node_id(node):
                return PipelineStatusKey(ModelName(name), NodeId(node))
            case ["faults", model, version, node] if (
                is_model_name(model) and is_version(version) and is_node_id(node)
            ):
                return FaultKey(ModelName(model), Version(version), NodeId(node))
            case ["quarantine", model, version] if is_model_name(model) and is_version(version):
                return QuarantineKey(ModelName(model), Version(version))
            case ["lastgood", model] if is_model_name(model):
                return LastGoodKey(ModelName(model))
            case ["coordinator"]:
                return CoordinatorKey()
            case ["rollouts", model] if is_model_name(model):
                return RolloutKey(ModelName(model))
            case ["orders", model] if is_model_name(model):
                return OrderKey(ModelName(model))
            case ["samples", model, node] if is_model_name(model) and is_node_id(node):
                return SamplesKey(ModelName(model), NodeId(node))
            case ["events", ulid] if _ULID.fullmatch(ulid) is not None:
                return EventKey(ulid)
            case _:
                return None


def _below(model: ModelName | None, version: Version | None = None) -> str:
    if model is None:
        return ""
    return f"{_model(model)}/" + ("" if version is None else f"{_version(version)}/")


def _model(name: str) -> str:
    if not is_model_name(name):
        raise BadKey(f"not a name: {name!r}")
    return name


def _version(version: str) -> str:
    if not is_version(version):
        raise BadKey(f"not a version: {version!r}")
    return version


def _node(node: str) -> str:
    if not is_node_id(node):
        raise BadKey(f"not a node's id: {node!r}")
    return node
