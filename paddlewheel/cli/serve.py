"""`paddlewheel node` and `paddlewheel up`: the commands that stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from paddlewheel.cli.front import FRONT_OPTIONS, front_of, front_options, openness_options
from paddlewheel.etcd_options import EMBEDDED, EtcdOptions, etcd_options

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _labels(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    labels = dict[str, str]()
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"want KEY=VALUE, got {value!r}")
        labels[key] = text
    return labels


def _devices(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    from loader.devices import BadDevice, DeviceSpec

    for value in values:
        try:
            DeviceSpec.parse(value)
        except BadDevice as exc:
            raise click.BadParameter(str(exc)) from exc
    return values


def serving_options(command: Decorated) -> Decorated:
    """Flags that a node has and that `up` hands on to its nodes."""
    for option in (
        click.option(
            "--transform-workers", type=click.IntRange(min=1, max=64), default=None, metavar="N",
            help="Processes for the Python steps of pipelines.  [one a processor, at most 4]",
        ),
        click.option(
            "--enable-drills", is_flag=True, help="Allow fault injection through /admin/drill."
        ),
        click.option(
            "--drain-delay", "drain_delay_s", type=click.FloatRange(min=0), default=0.0,
            metavar="S", show_default=True,
            help="After SIGTERM, go on accepting for so long while unready.",
        ),
        click.option(
            "--drain", "drain_s", type=click.FloatRange(min=0), default=30.0, metavar="S",
            show_default=True, help="How long requests in flight may take after SIGTERM.",
        ),
        click.option(
            "--load-timeout", "load_timeout_s", type=click.FloatRange(min=0, min_open=True),
            default=300.0, metavar="S", show_default=True,
            help="Deadline for loading and warming one version.",
        ),
        click.option(
            "--allow-source", "allow_sources", multiple=True, metavar="PREFIX",
            help="Accept only sources that start with it; may be given again.",
        ),
        click.option(
            "--lease-ttl", "lease_ttl_s", type=click.IntRange(min=2), default=10, metavar="S",
            show_default=True, help="Life of this node's keys in etcd without a sign of it.",
        ),
        click.option(
            "--cache-max-mb", type=click.IntRange(min=1), default=None, metavar="MB",
            help="Size of the model cache; what nobody uses goes first.  [no limit]",
        ),
        click.option(
            "--cache", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
            default=Path("~/.cache/paddlewheel"), show_default=True,
            help="Where model files and the node's snapshot are kept.",
        ),
        click.option(
            "--device", "devices", multiple=True, default=("cpu",), metavar="cpu|gpu:N",
            show_default=True, callback=_devices,
            help="A device of this node, with a quota: gpu:0,memoryMB=16000; may be given again.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def label_option(help_text: str) -> Callable[[Decorated], Decorated]:
    """``--label KEY=VALUE``, several times. Passes ``labels``: a dict."""
    return click.option(
        "--label", "labels", multiple=True, callback=_labels, metavar="KEY=VALUE", help=help_text
    )


@click.command("node")
@etcd_options
@serving_options
@front_options
@label_option("A label of this node; may be given again.")
@click.option(
    "--listen", default="127.0.0.1:8500", metavar="HOST:PORT", show_default=True,
    help="Where HTTP is served; port 0 asks for a free one.",
)  # fmt: skip
@click.option(
    "--advertise", metavar="URL",
    help="Where others reach this node, when that is not where it listens.",
)  # fmt: skip
@click.option(
    "--id",
    "node_id",
    metavar="ID",
    help="This node's name, which no other node may have.  [the host's name]",
)
def node(etcd: EtcdOptions, listen: str, node_id: str | None, **settings: Any) -> None:
    """Serve models as the documents in etcd say.

    Prints one line of JSON on stdout when HTTP listens; logs go to stderr as JSON lines.
    """
    from paddlewheel.node import run_node
    from paddlewheel.open_files import raise_limit
    from paddlewheel.settings import NodeSettings, default_node_id, parse_listen
    from registry.keys import is_node_id
    from registry.names import NodeId

    try:
        host, port = parse_listen(listen)
    except ValueError as exc:
        raise click.BadParameter(f"want HOST:PORT, got {listen!r}", param_hint="--listen") from exc
    if node_id is not None and not is_node_id(node_id):
        raise click.BadParameter(
            f"want letters, digits, '.', '_' and '-', got {node_id!r}", param_hint="--id"
        )
    front = front_of(host, **{name: settings.pop(name) for name in FRONT_OPTIONS})
    raise_limit()
    located = etcd.locate()
    status = run_node(
        NodeSettings(
            id=NodeId(node_id) if node_id else default_node_id(),
            etcd=etcd.settings(),
            prefix=located.prefix,
            host=host,
            port=port,
            front=front,
            **settings,
        )
    )
    raise SystemExit(status)


def _embedded_by_default(command: click.Command) -> click.Command:
    """Other commands look for a running `up`; this one is it."""
    for param in command.params:
        if isinstance(param, click.Option) and param.name == "etcd":
            param.help = "Use this etcd rather than one of our own.  [embedded]"
    return command


@_embedded_by_default
@click.command("up")
@etcd_options
@serving_options
@openness_options
@click.option(
    "--listen", default="127.0.0.1:8500", metavar="HOST:PORT", show_default=True,
    help="Where the first node serves HTTP; the next ones take the next ports, 0 free ones.",
)  # fmt: skip
@click.option(
    "--nodes", "node_count", type=click.IntRange(min=1, max=64), default=1, show_default=True,
    metavar="N", help="How many nodes.",
)  # fmt: skip
@click.option(
    "--gateway", is_flag=True,
    help="A gateway in front of them, on port 8600, or a free one where --listen asks for that.",
)  # fmt: skip
@click.option(
    "--config-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
    help="A folder of documents to keep applied.",
)  # fmt: skip
@click.option(
    "--data", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Where the embedded etcd keeps its data.  [under ~/.local/state/paddlewheel]",
)  # fmt: skip
@click.option("--ephemeral", is_flag=True, help="Forget the embedded etcd's data at the end.")
def up(etcd: EtcdOptions, **settings: Any) -> None:
    """Run everything on this machine: an etcd, nodes, and a folder of documents.

    Prints one line of JSON on stdout when all nodes listen. Ends everything at SIGTERM or Ctrl-C.
    """
    from paddlewheel.front import Front, TooOpen
    from paddlewheel.settings import parse_listen
    from paddlewheel.up import UpSettings, run_up

    try:
        host, _ = parse_listen(settings["listen"])
        Front(settings["require_access"], settings["insecure"]).check(host)
    except TooOpen as exc:
        raise click.UsageError(str(exc)) from exc
    except ValueError as exc:
        raise click.BadParameter("want HOST:PORT", param_hint="--listen") from exc
    embedded = etcd.etcd is None or etcd.etcd == EMBEDDED
    located = etcd.locate()
    raise SystemExit(
        run_up(
            UpSettings(
                etcd=None if embedded else etcd,
                prefix=etcd.prefix or ("/paddlewheel" if embedded else located.prefix),
                **settings,
            )
        )
    )
