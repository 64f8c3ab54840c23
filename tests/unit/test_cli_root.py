"""Exit codes, lazy commands, and one variable for each flag."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from paddlewheel.cli.root import root
from paddlewheel.cli.table import ENTRIES
from registry.errors import PaddlewheelError

AVAILABLE = root.list_commands(click.Context(root))


def test_every_listed_command_loads_and_has_its_line() -> None:
    for name in AVAILABLE:
        command = root.get_command(click.Context(root), name)
        assert command is not None, name
        assert command.name == name
        assert ENTRIES[name].summary.endswith(".")


def options(command: click.Command) -> Iterator[click.Option]:
    for param in command.params:
        if isinstance(param, click.Option):
            yield param
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from options(below)


@pytest.mark.parametrize("name", AVAILABLE)
def test_every_flag_has_its_variable_named_after_the_flag_alone(name: str) -> None:
    command = root.get_command(click.Context(root), name)
    assert command is not None
    for option in options(command):
        flag = max(option.opts, key=len)
        assert option.envvar == "PADDLEWHEEL_" + flag.lstrip("-").replace("-", "_").upper()


def test_a_flag_can_come_from_its_variable() -> None:
    runner = CliRunner()
    result = runner.invoke(root, ["version"], env={"PADDLEWHEEL_OUTPUT": "json"})
    assert json.loads(result.stdout)["version"]
    result = runner.invoke(root, ["version", "-o", "table"], env={"PADDLEWHEEL_OUTPUT": "json"})
    assert result.stdout.startswith("paddlewheel ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        ["version", "--nope"],
        ["diff"],
        ["get", "-o", "xml"],
        ["apply"],
        ["rollback"],
        ["node", "--device", "tpu"],
        ["up", "--device", "gpu:0,memoryMB=0"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(root, arguments).exit_code == 2


def test_up_says_that_its_etcd_is_its_own() -> None:
    said = " ".join(CliRunner().invoke(root, ["up", "--help"]).stdout.split())
    assert "[embedded]" in said
    assert "the running `up` here" not in said


def test_a_misspelt_command_is_guessed() -> None:
    assert "Did you mean 'status'?" in CliRunner().invoke(root, ["statsu"]).stderr


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    errors: list[BaseException] = []

    @click.command("version")
    def fails() -> None:
        raise errors[0]

    monkeypatch.setattr("paddlewheel.cli.about.version", fails)
    return errors


def test_bad_weather_is_one_line(failing: list[BaseException]) -> None:
    failing.append(PaddlewheelError("etcd is\naway"))
    result = CliRunner().invoke(root, ["version"])
    assert result.exit_code == 1
    assert result.stderr == "paddlewheel: etcd is away\n"


@pytest.mark.parametrize("arguments", [["--debug", "version"], ["version", "--debug"]])
def test_debug_shows_where_it_came_from(failing: list[BaseException], arguments: list[str]) -> None:
    failing.append(PaddlewheelError("away"))
    result = CliRunner().invoke(root, arguments)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_a_bug_is_not_hidden(failing: list[BaseException]) -> None:
    failing.append(KeyError("bug"))
    assert isinstance(CliRunner().invoke(root, ["version"]).exception, KeyError)


def test_ctrl_c_exits_as_shells_expect(failing: list[BaseException]) -> None:
    failing.append(KeyboardInterrupt())
    assert CliRunner().invoke(root, ["version"]).exit_code == 130


HEAVY = ("grpc", "aiohttp", "numpy", "pydantic", "rich", "paddle", "watchdog", "yaml", "asyncio")


def test_version_and_help_import_nothing_they_do_not_need() -> None:
    code = (
        "import sys\n"
        "from paddlewheel.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    for argument in ("version", "--help"):
        done = subprocess.run(
            [sys.executable, "-c", code, argument], capture_output=True, text=True, check=True
        )
        assert done.stderr.strip() == "[]", argument
