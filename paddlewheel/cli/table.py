"""Which commands there are and where each lives; nothing is imported until one is asked for.

To add a command: write a module with a `click.Command` in it and add one line here. Its flags get
their ``PADDLEWHEEL_<FLAG>`` variables and ``--debug`` from `paddlewheel.cli.root`. A line whose
module is not part of this installation is not listed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One command: the module and attribute it lives in, and its line in ``paddlewheel --help``.

    The help line stands here too, so that listing the commands imports none of them.
    """

    name: str
    module: str
    attribute: str
    summary: str


SECTIONS: dict[str, tuple[Entry, ...]] = {
    "Serve": (
        Entry("up", "paddlewheel.cli.serve", "up", "Run everything on this machine."),
        Entry("node", "paddlewheel.cli.serve", "node", "Run one node."),
        Entry("gateway", "paddlewheel.cli.gateway", "gateway", "Run the gateway."),
    ),
    "Change": (
        Entry("apply", "paddlewheel.cli.apply", "apply", "Write documents into etcd."),
        Entry("sync", "paddlewheel.cli.watch_folder", "sync", "Watch a folder and apply it."),
        Entry("promote", "paddlewheel.cli.rollout", "promote", "Make a model's canary live."),
        Entry("pause", "paddlewheel.cli.rollouts", "pause", "Hold a rollout where it is."),
        Entry("resume", "paddlewheel.cli.rollouts", "resume", "Let a paused rollout go on."),
        Entry("abort", "paddlewheel.cli.rollouts", "abort", "End a rollout; the one before stays."),
        Entry("rollback", "paddlewheel.cli.rollout", "rollback", "Restore an earlier document."),
        Entry("release", "paddlewheel.cli.rollout", "release", "Lift a version's quarantine."),
        Entry("access", "paddlewheel.cli.access", "access", "Make API keys."),
        Entry("drill", "paddlewheel.cli.drill", "drill", "Inject faults into a running model."),
    ),
    "Look": (
        Entry("status", "paddlewheel.cli.status", "status", "Say what runs, against what should."),
        Entry("rollouts", "paddlewheel.cli.rollouts", "rollouts", "Say how far rollouts are."),
        Entry("pipelines", "paddlewheel.cli.pipelines", "pipelines", "Say how pipelines do."),
        Entry("nodes", "paddlewheel.cli.fleet", "nodes", "List the registered nodes."),
        Entry("events", "paddlewheel.cli.fleet", "events", "List or follow events."),
        Entry("get", "paddlewheel.cli.reading", "get", "Show documents as etcd has them."),
        Entry("diff", "paddlewheel.cli.reading", "diff", "Compare a file or two revisions."),
        Entry("history", "paddlewheel.cli.reading", "history", "List a model's past documents."),
        Entry("explain", "paddlewheel.cli.explain", "explain", "Say how a request is routed."),
        Entry("inspect", "paddlewheel.cli.inspection", "inspect", "List a params file's tensors."),
    ),
    "Measure and check": (
        Entry("bench", "paddlewheel.cli.bench", "bench", "Measure the figures we publish."),
        Entry("doctor", "paddlewheel.cli.doctor", "doctor", "Check this machine and etcd."),
        Entry("schema", "paddlewheel.cli.about", "schema", "Print the documents' JSON Schema."),
        Entry("version", "paddlewheel.cli.about", "version", "Print the version."),
    ),
}
ENTRIES: dict[str, Entry] = {
    entry.name: entry for section in SECTIONS.values() for entry in section
}
