"""What nodes say of pipelines, as JSON values (pure)."""

from __future__ import annotations

from registry.names import ModelName, NodeId, Revision
from registry.records import ErrorRecord, Record


class PipelineStatus(Record):
    """``P/pipelines/<name>/<node>``: what this node makes of a pipeline's document."""

    pipeline: ModelName
    node: NodeId
    revision: Revision | None = None
    """Of the last document seen."""
    accepted: bool = True
    """Whether that one was accepted."""
    applied_revision: Revision | None = None
    """Of the document in force: the last one accepted."""
    error: str | None = None
    errors: tuple[ErrorRecord, ...] = ()
    ready: bool = False
    """Whether every step has what it runs on, on this node."""
    reason: str | None = None
    """Why it is not ready."""
    timeout_s: float = 10.0
    """``limits`` of the document in force, for gateways."""
    max_body_mb: int = 64
