"""A transform process: imports what is installed, then runs one call after the other.

``python -m paddlewheel.transforms.main FD``, with a socket to the node behind the descriptor. It
ends when the node closes that socket. Standard output goes to standard error: it is the socket
that answers.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from paddlewheel.transforms import wire
from registry.inference import Array
from registry.transforms import GROUP, Transform, misfit

_TEXT_MAX = 500


def main(descriptor: int) -> None:
    os.dup2(2, 1)
    with socket.socket(fileno=descriptor) as node:
        transforms, problems = load_installed()
        described: dict[str, Any] = {
            "transforms": {
                name: wire.signature_document(each.signature) for name, each in transforms.items()
            },
            "problems": problems,
        }
        _send(node, wire.pack(described, {}, ()))
        while True:
            try:
                head, tensors = _receive(node)
            except EOFError:
                return
            _send(node, answer(transforms, head, tensors))


def load_installed() -> tuple[dict[str, Transform], dict[str, str]]:
    """The installed transforms by name, and why the others could not be imported."""
    found: dict[str, Transform] = {}
    problems: dict[str, str] = {}
    for entry in entry_points(group=GROUP):
        try:
            loaded: object = entry.load()
        except BaseException as exc:  # whatever an import may do, the others are to be had
            problems[entry.name] = f"{entry.value} can't be imported: {exc!r}"[:_TEXT_MAX]
            continue
        if not isinstance(loaded, Transform):
            problems[entry.name] = f"{entry.value} is no registry.transforms.Transform"
        elif entry.name in found:
            problems[entry.name] = f"installed twice: {entry.value}"
        else:
            found[entry.name] = loaded
    for name in problems:
        found.pop(name, None)
    return found, problems


def answer(
    transforms: Mapping[str, Transform], head: Mapping[str, Any], tensors: Mapping[str, Array]
) -> list[bytes | memoryview]:
    """Run one call. What it raises becomes its answer."""
    name = str(head.get("name"))
    transform = transforms[name]
    outputs = transform.signature.outputs
    try:
        made = transform(**tensors)
        for spec in outputs:
            if spec.name not in made:
                return _failed(f"did not return {spec.name!r}, which it declares")
            if (why := misfit(made[spec.name], spec)) is not None:
                return _failed(f"returned what it does not declare: {why}")
        return wire.pack({}, made, outputs)
    except ValueError as exc:
        return wire.pack({"request": str(exc)[:_TEXT_MAX]}, {}, ())
    except MemoryError:
        return _failed("out of memory")
    except Exception as exc:
        traceback.print_exc()
        return _failed(f"raised {type(exc).__name__}: {exc}")


def _failed(why: str) -> list[bytes | memoryview]:
    return wire.pack({"failed": why[:_TEXT_MAX]}, {}, ())


def _send(node: socket.socket, buffers: list[bytes | memoryview]) -> None:
    for buffer in buffers:
        node.sendall(buffer)


def _receive(node: socket.socket) -> tuple[dict[str, Any], dict[str, Array]]:
    """One message. Raises `EOFError` when the node is gone, `wire.BadFrame`."""
    head, body = wire.lengths(bytes(_exactly(node, wire.LENGTHS.size)))
    text = bytes(_exactly(node, head))
    return wire.unpack(text, _exactly(node, body))


def _exactly(node: socket.socket, count: int) -> memoryview:
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        got = node.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return memoryview(buffer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
