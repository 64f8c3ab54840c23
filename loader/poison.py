"""Inputs that ended workers: their digests are refused for a while (SPEC section 8, 422)."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16
POISON_MAX = 1024


def input_digest(feeds: Mapping[str, npt.NDArray[Any]]) -> str:
    """A digest of all that the model sees: names, dtypes, shapes and bytes, in any order of names.

    BLAKE2b, about 1 ms a megabyte, so only where it is needed: after a fault, and while some
    input of the model is refused. A faster checksum was turned down: whoever can choose inputs
    could then make one that gets another client's input refused.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(feeds):
        array = np.ascontiguousarray(feeds[name])
        # Lengths keep two fields apart that would read the same when joined.
        head = f"{len(name)}:{name}|{array.dtype.str}|{array.shape}|{array.nbytes}\n"
        digest.update(head.encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class PoisonSet:
    """The inputs refused now, of one model. At most ``size_max``: the oldest makes room."""

    __slots__ = ("_size_max", "_until_s")

    def __init__(self, *, size_max: int = POISON_MAX) -> None:
        self._size_max = size_max
        self._until_s: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until_s)

    def __bool__(self) -> bool:
        """False while nothing can be refused: then no digest need be taken."""
        return bool(self._until_s)

    def refuse(self, digest: str, *, now_s: float, for_s: float) -> None:
        """Refuse ``digest`` until ``now_s + for_s``; again, and it starts over."""
        if for_s <= 0:
            return
        self._until_s.pop(digest, None)
        self._until_s[digest] = now_s + for_s
        if len(self._until_s) > self._size_max:
            self.expire(now_s)
        while len(self._until_s) > self._size_max:
            self._until_s.popitem(last=False)

    def remaining_s(self, digest: str, now_s: float) -> float:
        """How long ``digest`` is still refused; 0 when it is not. What expired is forgotten."""
        until_s = self._until_s.get(digest)
        if until_s is None:
            return 0.0
        if until_s <= now_s:
            del self._until_s[digest]
            return 0.0
        return until_s - now_s

    def lift(self, digest: str) -> bool:
        """Accept ``digest`` again: the blame moved to the device. False when it was accepted."""
        return self._until_s.pop(digest, None) is not None

    def clear(self) -> None:
        self._until_s.clear()

    def expire(self, now_s: float) -> int:
        """Forget what is no longer refused; returns how many. Call it now and then."""
        over = [digest for digest, until_s in self._until_s.items() if until_s <= now_s]
        for digest in over:
            del self._until_s[digest]
        return len(over)
