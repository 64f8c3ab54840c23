"""The etcd that `paddlewheel up` brings: it serves, keeps its data, and never outlives us."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest

from paddlewheel.embedded_etcd import EmbeddedEtcd, EtcdNotStarted
from registry.etcd import EtcdSettings, EtcdStore
from tests.eventually import eventually


async def test_data_in_a_folder_survives_a_restart_and_a_kill(tmp_path: Path) -> None:
    for round_number, end in enumerate((None, signal.SIGKILL, None)):
        async with EmbeddedEtcd(tmp_path / "etcd") as etcd:
            store = EtcdStore.connect(EtcdSettings((etcd.endpoint,)))
            kv = await store.get("/round")
            assert (None if kv is None else int(kv.value)) == (
                round_number - 1 if round_number else None
            )
            await store.put("/round", b"%d" % round_number)
            await store.close()
            assert etcd.pid is not None
            if end is not None:
                os.kill(etcd.pid, end)
        assert etcd.pid is None
    assert (tmp_path / "etcd" / "etcd.log").stat().st_size > 0


async def test_an_ephemeral_one_leaves_no_folder_and_no_process() -> None:
    async with EmbeddedEtcd() as etcd:
        assert etcd.log_path is not None
        folder, pid = etcd.log_path.parent, etcd.pid
        assert folder.is_dir()
        assert pid is not None
    assert not folder.exists()
    assert not psutil.pid_exists(pid)


async def test_it_listens_on_loopback_only() -> None:
    async with EmbeddedEtcd() as etcd:
        listening = [c for c in psutil.Process(etcd.pid).net_connections() if c.status == "LISTEN"]
        assert listening
        assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


async def test_it_dies_with_us() -> None:
    """kill -9 of the parent, which then cannot clean up."""
    code = (
        "import asyncio\n"
        "from paddlewheel.embedded_etcd import EmbeddedEtcd\n"
        "async def main():\n"
        "    async with EmbeddedEtcd() as etcd:\n"
        "        print('PID', etcd.pid, etcd.log_path.parent, flush=True)\n"
        "        await asyncio.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    while not (line := await parent.stdout.readline()).startswith(b"PID "):
        assert line, "the parent ended"
    pid, folder = int(line.split()[1]), Path(line.split()[2].decode())
    parent.kill()
    await parent.wait()
    await eventually(lambda: _is_gone(pid), within_s=10)
    shutil.rmtree(folder)


async def test_children_start_well_while_etcd_is_spoken_to() -> None:
    """gRPC's fork handlers, unless switched off, crash one child in six."""
    async with EmbeddedEtcd() as etcd:
        stores = [EtcdStore.connect(EtcdSettings((etcd.endpoint,))) for _ in range(4)]
        is_done = asyncio.Event()

        async def keep_asking(store: EtcdStore) -> None:
            while not is_done.is_set():
                await store.get("/k")

        asking = [asyncio.create_task(keep_asking(store)) for store in stores]
        returncodes: list[int] = []
        for _ in range(100):
            child = await asyncio.create_subprocess_exec("true", preexec_fn=lambda: None)
            returncodes.append(await child.wait())
        is_done.set()
        await asyncio.gather(*asking)
        for store in stores:
            await store.close()
    assert set(returncodes) == {0}


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_one_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "etcd"
    broken.write_text("#!/bin/sh\necho no disk left >&2\nexit 3\n")
    broken.chmod(0o755)
    etcd = EmbeddedEtcd(binary=broken)
    with pytest.raises(EtcdNotStarted, match=r"ended with 3: no disk left"):
        await etcd.start()
    assert etcd.pid is None
    assert etcd.log_path is None


async def test_one_that_never_serves_is_given_up(tmp_path: Path) -> None:
    silent = tmp_path / "etcd"
    silent.write_text("#!/bin/sh\nexec sleep 100\n")
    silent.chmod(0o755)
    with pytest.raises(EtcdNotStarted, match="did not serve within 1 s"):
        await EmbeddedEtcd(binary=silent, start_timeout_s=1).start()
