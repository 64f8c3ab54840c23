"""The contract on the store in memory."""

from __future__ import annotations

import pytest

from registry.memory_store import MemoryStore
from registry.names import Revision
from tests.integration.store_contract import StoreContract, World


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def world(self) -> World:
        store = MemoryStore()

        async def compact(revision: Revision) -> None:
            store.cluster.compact(revision)

        return World(store, store.client, compact, store.cut_watches)
