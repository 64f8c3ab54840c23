"""`paddlewheel gateway`: one address in front of all nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paddlewheel.cli.front import front_of, front_options
from paddlewheel.cli.serve import label_option
from paddlewheel.etcd_options import EtcdOptions, etcd_options

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("gateway")
@etcd_options
@click.option(
    "--drain-delay", "drain_delay_s", type=click.FloatRange(min=0), default=0.0,
    metavar="S", show_default=True,
    help="After SIGTERM, go on accepting for so long while unready.",
)  # fmt: skip
@click.option(
    "--drain", "drain_s", type=click.FloatRange(min=0), default=30.0, metavar="S",
    show_default=True, help="How long requests in flight may take after SIGTERM.",
)  # fmt: skip
@front_options
@click.option("--node-ca", type=_FILE, metavar="FILE", help="Signs the nodes' certificates.")
@click.option("--node-cert", type=_FILE, metavar="FILE", help="Shown to nodes that ask for one.")
@click.option("--node-key", type=_FILE, metavar="FILE", help="Its key.")
@label_option("A label of the nodes to ask first, such as zone=a; may be given again.")
@click.option(
    "--listen", default="127.0.0.1:8600", metavar="HOST:PORT", show_default=True,
    help="Where HTTP is served; port 0 asks for a free one.",
)  # fmt: skip
@click.option(
    "--state", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Where to keep what etcd last said, for a start while it is away."
    "  [~/.local/state/paddlewheel/gateway]",
)  # fmt: skip
def gateway(
    etcd: EtcdOptions,
    listen: str,
    labels: dict[str, str],
    drain_s: float,
    drain_delay_s: float,
    state: Path | None,
    node_ca: Path | None,
    node_cert: Path | None,
    node_key: Path | None,
    **front: Any,
) -> None:
    """Forward requests to the nodes that etcd knows, and around those that fail.

    Prints one line of JSON on stdout when HTTP listens; logs go to stderr as JSON lines.
    """
    from paddlewheel.front import BadTls, ClientTls
    from paddlewheel.gateway import GatewaySettings, run_gateway
    from paddlewheel.open_files import raise_limit
    from paddlewheel.settings import parse_listen
    from paddlewheel.state_file import state_dir

    try:
        host, port = parse_listen(listen)
    except ValueError as exc:
        raise click.BadParameter(f"want HOST:PORT, got {listen!r}", param_hint="--listen") from exc
    if (node_cert is None) != (node_key is None):
        raise click.UsageError("--node-cert and --node-key go together")
    node_tls = None
    if node_ca is not None or node_cert is not None:
        node_tls = ClientTls(node_ca, node_cert, node_key)
        try:
            node_tls.context()
        except BadTls as exc:
            raise click.UsageError(str(exc)) from exc
    raise_limit()
    status = run_gateway(
        GatewaySettings(
            etcd=etcd.settings(),
            prefix=etcd.locate().prefix,
            host=host,
            port=port,
            zone=labels,
            drain_s=drain_s,
            drain_delay_s=drain_delay_s,
            front=front_of(host, **front),
            node_tls=node_tls,
            state=state or state_dir() / "gateway",
        )
    )
    raise SystemExit(status)
