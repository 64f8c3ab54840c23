"""Where etcd is found, and what a running `up` leaves behind for others to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from paddlewheel import state_file
from paddlewheel.cli.root import root
from paddlewheel.etcd_options import BadEtcdOptions, EtcdOptions


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("PADDLEWHEEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "paddlewheel" / "running"


def test_the_default() -> None:
    located = EtcdOptions().locate()
    assert (located.endpoints, located.prefix) == (("127.0.0.1:2379",), "/paddlewheel")


def test_a_running_up_is_found_with_its_prefix() -> None:
    state_file.remember(etcd=("127.0.0.1:4001",), prefix="/mine")
    located = EtcdOptions().locate()
    assert (located.endpoints, located.prefix) == (("127.0.0.1:4001",), "/mine")
    assert str(os.getpid()) in located.found_by
    assert EtcdOptions(etcd="embedded").locate() == located
    assert EtcdOptions(prefix="other/").locate().prefix == "/other"


def test_what_is_given_comes_first() -> None:
    state_file.remember(etcd=("127.0.0.1:4001",), prefix="/mine")
    located = EtcdOptions(etcd="http://a:1, http://b:2").locate()
    assert located.endpoints == ("http://a:1", "http://b:2")
    assert located.prefix == "/paddlewheel"


def test_forgotten_is_gone(home: Path) -> None:
    state_file.remember(etcd=("x:1",))
    assert len(list(home.iterdir())) == 1
    state_file.forget()
    state_file.forget()
    assert state_file.find() is None
    assert list(home.iterdir()) == []


def test_notes_of_the_dead_are_swept(home: Path) -> None:
    """A kill -9 leaves its note; the pid may belong to somebody else by now."""
    mine = state_file.remember(etcd=("x:1",))
    state_file.forget()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name, pid, started_s in (
        ("ended", ended.pid, mine.process_started_s),
        ("reused", os.getpid(), mine.process_started_s - 1000),
    ):
        note = {"pid": pid, "process_started_s": started_s, "etcd": ["y:1"], "prefix": "/p"}
        (home / f"{name}.json").write_text(json.dumps(note))
    (home / "torn.json").write_text('{"pid": 1')
    assert state_file.find() is None
    assert list(home.iterdir()) == []


def test_the_note_is_for_its_owner_alone(home: Path) -> None:
    state_file.remember(etcd=("x:1",))
    (note,) = home.iterdir()
    assert note.stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700


def test_the_latest_of_several_is_taken(home: Path) -> None:
    state_file.remember(etcd=("first:1",))
    code = (
        "import sys\nfrom paddlewheel import state_file\n"
        "state_file.remember(etcd=('second:1',))\nprint('up', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as later:
        assert later.stdout is not None
        later.stdout.readline()
        found = state_file.find()
        assert found is not None
        assert found.etcd == ("second:1",)
    assert EtcdOptions().locate().endpoints == ("first:1",)


def test_user_and_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EtcdOptions().settings().user is None
    monkeypatch.setenv("PADDLEWHEEL_ETCD_USER", "ann")
    with pytest.raises(BadEtcdOptions, match="PASSWORD"):
        EtcdOptions().settings()
    monkeypatch.setenv("PADDLEWHEEL_ETCD_PASSWORD", "s:cret")
    settings = EtcdOptions().settings()
    assert (settings.user, settings.password) == ("ann", "s:cret")
    assert "s:cret" not in repr(settings)


def test_user_and_password_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "auth"
    file.write_text("ann:s:cret\n")
    file.chmod(0o600)
    settings = EtcdOptions(auth_file=file).settings()
    assert (settings.user, settings.password) == ("ann", "s:cret")
    file.chmod(0o604)
    with pytest.raises(BadEtcdOptions, match="readable by everyone"):
        EtcdOptions(auth_file=file).settings()
    file.chmod(0o600)
    file.write_text("ann\n")
    with pytest.raises(BadEtcdOptions, match="user:password"):
        EtcdOptions(auth_file=file).settings()


def test_half_a_key_pair(tmp_path: Path) -> None:
    with pytest.raises(BadEtcdOptions, match="go together"):
        EtcdOptions(cert=tmp_path).settings()


@pytest.mark.parametrize("etcd", ["ftp://x", "http://", "http://a:1,b:port", "http://a:99999"])
def test_what_is_no_address_is_a_wrong_call(etcd: str) -> None:
    done = CliRunner().invoke(root, ["status", "--etcd", etcd])
    assert done.exit_code == 2, done.output
    assert "--etcd" in done.output
