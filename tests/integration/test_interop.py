"""Documents written by the clients that people already have, and ours read by them.

The published ``etcd3`` package in an environment of its own, etcdctl of 3.5 and, where a machine
can have it, of 3.4; plain, and behind TLS with client certificates and a password.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from registry.etcd import EtcdStore
from tests.etcd import CERTS, EtcdCluster, etcd_cluster
from tests.integration.store_contract import until_seen, watching, words
from tests.interop_tools import etcd3_python, etcdctls

KEY = "/paddlewheel/configs/models/ocr-rec"
DOCUMENT = """\
apiVersion: paddlewheel/v1
kind: Model
metadata: {name: ocr-rec, labels: {team: "视觉"}}
spec:
  live: "20240521"
  versions:
    - {version: "20240521", source: "file:///models/ocr-rec/20240521"}
"""

ETCD3_SCRIPT = """
import json, sys
import etcd3
how, key, document = json.load(sys.stdin)
client = etcd3.client(**how)
client.put(key, document)
value, meta = client.get(key)
assert value == document.encode(), value
succeeded, _ = client.transaction(
    compare=[client.transactions.version(key) > 0],
    success=[client.transactions.put(key + "/txn", "t")],
    failure=[],
)
assert succeeded
lease = client.lease(60)
client.put(key + "/leased", "l", lease=lease)
client.delete(key + "/txn")
ours, _ = client.get("/ours")
print(json.dumps({"revision": meta.mod_revision, "lease": lease.id, "ours": ours.decode()}))
"""


class Client(Protocol):
    def write(self, cluster: EtcdCluster) -> str:
        """Put `DOCUMENT` at `KEY`; put and delete ``/txn`` below it; put ``/leased`` under a
        lease. Returns what it reads at ``/ours``."""
        ...


@dataclass(frozen=True)
class Etcd3:
    python: Path

    def write(self, cluster: EtcdCluster) -> str:
        how: dict[str, Any] = {"host": "127.0.0.1", "port": cluster.members[0].client_port}
        if cluster.tls:
            how |= {"ca_cert": str(CERTS / "ca.pem"), "cert_cert": str(CERTS / "client.pem")}
            how |= {"cert_key": str(CERTS / "client.key")}
        if cluster.user is not None:
            how |= {"user": cluster.user, "password": cluster.password}
        done = subprocess.run(
            [self.python, "-c", ETCD3_SCRIPT],
            input=json.dumps([how, KEY, DOCUMENT]),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["ours"])


@dataclass(frozen=True)
class Etcdctl:
    binary: Path

    def write(self, cluster: EtcdCluster) -> str:
        def run(*arguments: str, stdin: str | None = None) -> str:
            data = None if stdin is None else stdin.encode()
            return cluster.etcdctl(*arguments, binary=self.binary, stdin=data)

        run("put", KEY, stdin=DOCUMENT)
        run("put", f"{KEY}/txn", "t")
        lease = run("lease", "grant", "60").split()[1]
        run("put", f"--lease={lease}", f"{KEY}/leased", "l")
        run("del", f"{KEY}/txn")
        return run("get", "--print-value-only", "/ours").removesuffix("\n")


@pytest.fixture(scope="module")
def clients() -> Mapping[str, Client]:
    found: dict[str, Client] = {"etcd3 0.12.0": Etcd3(etcd3_python())}
    found |= {f"etcdctl {version}": Etcdctl(path) for version, path in etcdctls().items()}
    return found


@pytest.fixture(scope="module", params=["plain", "tls and password"])
def cluster(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    guarded = request.param != "plain"
    with etcd_cluster(1, tls=guarded) as cluster:
        if guarded:
            cluster.enable_auth("paddlewheel", "pa55 wörd:/")
        yield cluster


@pytest.fixture
async def store(cluster: EtcdCluster) -> AsyncIterator[EtcdStore]:
    store = EtcdStore.connect(cluster.settings())
    yield store
    await store.delete_prefix("")
    await store.close()


async def test_what_they_write_we_see_and_what_we_write_they_read(
    cluster: EtcdCluster,
    store: EtcdStore,
    clients: Mapping[str, Client],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "etcdctl 3.5" in clients
    await store.put("/ours", "unsere, 我们的".encode())
    for name, client in clients.items():
        async with watching(store, KEY) as seen:
            await until_seen(seen, 1)
            read_by_them = await asyncio.to_thread(client.write, cluster)
            await until_seen(seen, 5)
        assert read_by_them == "unsere, 我们的", name
        wanted = [
            (f"+{KEY}={DOCUMENT}",),
            (f"+{KEY}/txn=t",),
            (f"+{KEY}/leased=l",),
            (f"-{KEY}/txn",),
        ]
        assert [words(batch) for batch in seen[1:]] == wanted, name
        kv = await store.get(KEY)
        assert kv is not None
        assert (kv.value, kv.mod_revision) == (DOCUMENT.encode(), seen[1].revision), name
        leased = await store.get(f"{KEY}/leased")
        assert leased is not None
        assert await store.lease_keys(leased.lease) == {leased.key}, name
        assert await store.lease_keepalive(leased.lease) > 0, name
        await store.lease_revoke(leased.lease)
        assert await store.delete(KEY), name
    with capsys.disabled():
        print(f"\n  interop covered, {'TLS and password' if cluster.tls else 'plain'}:", end=" ")
        print(", ".join(clients))
