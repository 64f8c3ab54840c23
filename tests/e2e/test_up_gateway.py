"""`paddlewheel up --nodes 3 --gateway`: a node dies under traffic, and nobody outside sees it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.node import SERVES_WITHIN_S, Command, http_get, store_of
from tests.served import MLP, Models, traffic


@pytest.mark.timeout(240)
async def test_a_node_is_killed_behind_the_gateway(tmp_path: Path) -> None:
    models = Models(tmp_path / "models")
    started = await Command.start(
        ("up", "--listen", "127.0.0.1:0", "--cache", str(tmp_path / "cache"), "--ephemeral",
         "--nodes", "3", "--gateway", "--lease-ttl", "2", "--device", "cpu,memoryMB=4000"),
        tmp_path,
    )  # fmt: skip
    try:
        url = str(started.ready["gateway"])
        assert url not in [line["http"] for line in started.ready["nodes"]]

        async def taking(count: int) -> bool:
            _, routes = await http_get(f"{url}/admin/routes")
            return len(routes["models"].get(MLP, {}).get("nodes", ())) == count

        async with store_of(started.ready["etcd"]) as store:
            await models.put(store, "1")
            await eventually(lambda: taking(3), within_s=SERVES_WITHIN_S)
            async with traffic(url, models, rate_per_s=100):
                started.kin()
                os.kill(started.ready["nodes"][1]["pid"], signal.SIGKILL)
                await eventually(lambda: taking(2), within_s=3)
                await eventually(lambda: taking(3), within_s=SERVES_WITHIN_S)
        kin = started.kin()
        assert await started.stop(30) == 0
        assert not any(each.is_alive for each in kin)
    finally:
        await started.end()
