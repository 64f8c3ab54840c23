"""The root command: lazy subcommands, ``PADDLEWHEEL_<FLAG>`` variables, errors and exit codes."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import traceback
from typing import Any

import click

import paddlewheel
from paddlewheel.cli.table import ENTRIES, SECTIONS
from registry.errors import PaddlewheelError

ENV_PREFIX = "PADDLEWHEEL"
_DEBUG = "paddlewheel.debug"
INTERRUPTED = 130
"""128 + SIGINT, as shells expect of a command ended by Ctrl-C."""


def _note_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=_note_debug,
        help="Show the traceback of an error.",
    )


def prepare(command: click.Command) -> click.Command:
    """Give a command ``--debug``, and each flag its variable: ``--lease-ttl`` and
    ``PADDLEWHEEL_LEASE_TTL``.

    click's own automatic names carry the command's name too (``PADDLEWHEEL_NODE_LISTEN``) and come
    from the Python parameter rather than the flag; one setting has one name in every command.
    """
    command.context_settings.setdefault("help_option_names", ["-h", "--help"])
    if not any("--debug" in param.opts for param in command.params):
        command.params.append(_debug_option())
    for param in command.params:
        flag = max(param.opts, key=len)
        if isinstance(param, click.Option) and param.envvar is None and flag.startswith("--"):
            param.envvar = f"{ENV_PREFIX}_{flag[2:].replace('-', '_').upper()}"
    if isinstance(command, click.Group):
        for below in command.commands.values():
            prepare(below)
    return command


class Root(click.Group):
    """Finds commands through `paddlewheel.cli.table`; turns errors into one line and exit 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, entry in ENTRIES.items() if _exists(entry.module)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = ENTRIES.get(cmd_name)
        if entry is None or not _exists(entry.module):
            return None
        command = getattr(importlib.import_module(entry.module), entry.attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{entry.module}:{entry.attribute} is not a click command")
        return prepare(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not close:
                raise
            raise click.UsageError(
                f"No such command '{args[0]}'. Did you mean '{close[0]}'?", ctx
            ) from exc

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        known = set(self.list_commands(ctx))
        for title, entries in SECTIONS.items():
            rows = [(entry.name, entry.summary) for entry in entries if entry.name in known]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Bad weather and refusals are one line on stderr and exit 1.

        A bug in us keeps its traceback, as everything does under ``--debug``. click itself turns
        wrong usage into exit 2 and a closed pipe (``| head``) into a silent end.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except (PaddlewheelError, OSError) as exc:
            if isinstance(exc, BrokenPipeError):
                raise
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            click.echo(f"paddlewheel: {_one_line(exc)}", err=True)
            ctx.exit(1)


def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


@click.group(
    cls=Root,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(paddlewheel.__version__, message="paddlewheel %(version)s")
@click.pass_context
def root(ctx: click.Context) -> None:
    """Hot-reload PaddlePaddle inference fleets from documents in etcd.

    Every flag can also be given as an environment variable PADDLEWHEEL_<FLAG>. Commands exit with
    0 when done, 1 when failed or refused, 2 when called wrongly.
    """


prepare(root)
