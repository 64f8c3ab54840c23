"""One transform process as its node sees it. One call at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

from paddlewheel.parentage import end_with_parent
from paddlewheel.transforms import wire
from registry.errors import PaddlewheelError
from registry.inference import Array, TensorSpec

START_TIMEOUT_S = 60.0
"""What is installed may import much; a machine may be busy."""
_BUFFER_BYTES = 1 << 22


class ProcessDied(PaddlewheelError):
    """It ended, or says what cannot be understood. Nothing is known of the call."""


class TransformProcess:
    """Made by `start`; ended by `kill`. After `ProcessDied` it is only good for that."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.described: Mapping[str, Any] = {}
        """What is installed, as the process found it."""

    @classmethod
    async def start(cls) -> Self:
        """Start one and wait until it has imported everything. Raises `ProcessDied`."""
        ours, theirs = socket.socketpair()
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            ours.setblocking(False)
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "paddlewheel.transforms.main", str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env={**os.environ, **_ONE_THREAD},
                    preexec_fn=end_with_parent(signal.SIGKILL),
                )  # fmt: skip
            except OSError as exc:
                ours.close()
                raise ProcessDied(f"it could not be started: {exc}") from exc
        reader, writer = await asyncio.open_connection(sock=ours, limit=_BUFFER_BYTES)
        made = cls(process, reader, writer)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                made.described, _ = await made._receive()
        except TimeoutError as exc:
            await made.kill()
            raise ProcessDied(f"it was not ready within {START_TIMEOUT_S:g} s") from exc
        except BaseException:
            await made.kill()
            raise
        return made

    @property
    def pid(self) -> int:
        return self._process.pid

    async def call(
        self, name: str, feeds: Mapping[str, Array], specs: Sequence[TensorSpec]
    ) -> tuple[Mapping[str, Any], Mapping[str, Array]]:
        """Run one transform: its answer's head and tensors. Raises `ProcessDied`.

        To be awaited to its end: a call given up half way leaves an answer that nobody takes.
        """
        try:
            self._writer.writelines(wire.pack({"name": name}, feeds, specs))
            await self._writer.drain()
        except OSError as exc:
            raise ProcessDied(await self._ending()) from exc
        return await self._receive()

    async def kill(self) -> None:
        """End it now, whatever it is doing."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._writer.close()
        await self._process.wait()

    async def _receive(self) -> tuple[dict[str, Any], dict[str, Array]]:
        try:
            prefix = await self._reader.readexactly(wire.LENGTHS.size)
            head, body = wire.lengths(prefix)
            text = await self._reader.readexactly(head)
            return wire.unpack(text, memoryview(await self._reader.readexactly(body)))
        except wire.BadFrame as exc:
            raise ProcessDied(str(exc)) from exc
        except (asyncio.IncompleteReadError, OSError) as exc:
            raise ProcessDied(await self._ending()) from exc

    async def _ending(self) -> str:
        """How the process ended, in words."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()  # nothing, where it is gone already
        status = await self._process.wait()
        if status >= 0:
            return f"its process ended with exit status {status}"
        try:
            return f"its process was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"its process was ended by signal {-status}"


_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)
"""Several processes side by side are the parallelism; threads of each would only fight."""
