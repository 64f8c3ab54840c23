"""What a watcher was told so far, so that a compaction can be bridged by a difference."""

from __future__ import annotations

from registry.store import Batch, Delete, Event, Listing, Put


class Known:
    """The position of a watch, and the revision of every key that it delivered."""

    def __init__(self, listing: Listing) -> None:
        self.revision = listing.revision
        self._mod_revisions = {kv.key: kv.mod_revision for kv in listing.kvs}

    def note(self, batch: Batch) -> None:
        """``batch`` is being delivered."""
        self.revision = batch.revision
        for event in batch.events:
            if isinstance(event, Put):
                self._mod_revisions[event.kv.key] = event.kv.mod_revision
            else:
                self._mod_revisions.pop(event.key, None)

    def difference(self, listing: Listing) -> Batch:
        """The puts and deletes that lead from here to ``listing``, deletes first.

        Revisions are compared for equality, not order: after a restore from a backup they start
        again lower, and what is there then is the truth all the same.
        """
        there = {kv.key for kv in listing.kvs}
        gone: list[Event] = [
            Delete(key, listing.revision) for key in sorted(self._mod_revisions) if key not in there
        ]
        changed = [
            Put(kv) for kv in listing.kvs if self._mod_revisions.get(kv.key) != kv.mod_revision
        ]
        return Batch(listing.revision, (*gone, *changed), listing.store_id)
