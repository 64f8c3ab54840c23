"""The kinds of document: how each is parsed, and under which key it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from registry.document import read
from registry.document_tree import ConfigError, Scalar
from registry.gateway_spec import parse_gateway
from registry.keys import Keys
from registry.names import ModelName
from registry.pipeline_spec import parse_pipeline
from registry.spec import parse_model

GATEWAY_NAME = ModelName("configs/gateway")
"""What the one gateway document goes by; the slash keeps it apart from models and pipelines."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One value of a document's ``kind``."""

    name: str
    parse: Callable[[str], ModelName]
    """The document's name. Raises `ConfigError`."""
    key: Callable[[Keys, ModelName], str]
    rival_key: Callable[[Keys, ModelName], str] | None = None
    """Where a document of the other kind would stand that shares this one's names."""


def _gateway(text: str) -> ModelName:
    parse_gateway(text)
    return GATEWAY_NAME


MODEL = Kind(
    "Model",
    lambda text: parse_model(text, name=None).name,
    lambda keys, name: keys.model(name),
    lambda keys, name: keys.pipeline(name),
)
PIPELINE = Kind(
    "Pipeline",
    lambda text: parse_pipeline(text, name=None).name,
    lambda keys, name: keys.pipeline(name),
    lambda keys, name: keys.model(name),
)
GATEWAY = Kind("Gateway", _gateway, lambda keys, _name: keys.gateway)

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (MODEL, PIPELINE, GATEWAY)}


def kind_of(text: str) -> Kind:
    """The kind that a document says it is; a model where it says nothing that we know.

    What can't be read at all is a model too: its parser says what is wrong.
    """
    try:
        said = read(text).node(("kind",))
    except ConfigError:
        return MODEL
    return KINDS.get(said.raw, MODEL) if isinstance(said, Scalar) else MODEL
