"""A worker process: one predictor, one request at a time. The only file that imports paddle.

Paddle's predictor holds the GIL while it runs and may take the process down with it; so it lives
here, where nothing else does. The front speaks to it in JSON packets over one socket
(`loader.wire`); tensors lie in shared memory (`loader.arena`).
"""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import paddle
import psutil
from paddle import inference as paddle_inference
from paddle.base import core

from loader import wire
from loader.arena import ArenaFull, Placed, Slot
from loader.drill_effects import after_run, before_run
from loader.errors import LoaderError, LoadFailed, NotAdmitted
from loader.feeds import check_feeds
from loader.model_files import choose_in
from loader.program import read_program
from loader.recipe import Recipe
from loader.worker_options import Settings, settings_of
from registry.inference import Array, BadInput, Signature

SHARED_DTYPES = frozenset({"bool", "int32", "int64", "float16", "bfloat16", "float32", "float64"})
"""What `share_external_data` takes in 3.3.1; uint8 and int8 go through `copy_from_cpu`, and an
int16 input can be fed in neither way (tests/integration/test_worker_tensors.py)."""

COPIED_DTYPES = frozenset({"uint8", "int8"})

LOADING_NICE = 10
"""Of the thread that checks, loads and warms; measured in docs/decisions/0003."""


def prepare() -> None:
    """In the zygote, before any fork."""
    paddle.disable_signal_handler()  # its handler prints for long; the front names the signal


class Predictor:
    """Paddle's predictor with the names and dtypes of the program's signature."""

    def __init__(self, folder: Path, settings: Settings, signature: Signature) -> None:
        """Raises `LoadFailed`, or what Paddle raises."""
        self.signature = signature
        for spec in signature.inputs:
            if spec.dtype not in SHARED_DTYPES | COPIED_DTYPES:
                raise LoadFailed(f"input {spec.name!r}: Paddle takes no {spec.dtype} input")
        self._native = _create(folder, settings)
        self._inputs = dict(
            zip(
                (spec.name for spec in signature.inputs),
                [self._native.get_input_handle(n) for n in self._native.get_input_names()],
                strict=True,
            )
        )
        self._outputs = list(
            zip(signature.outputs, self._native.get_output_names(), strict=True)
        )  # by position: PIR exports have names of their own for outputs
        self._fed: list[Any] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. The feeds must stay as they are until the next `run`: nothing is copied.

        Raises `BadInput`, or what Paddle raises. Paddle itself would read a shared array of
        another dtype without a word.
        """
        check_feeds(self.signature, feeds)
        fed: list[Any] = []
        for spec in self.signature.inputs:
            array, handle = feeds[spec.name], self._inputs[spec.name]
            if spec.dtype in SHARED_DTYPES:
                tensor = core.DenseTensor()
                # True: a view of the array's memory. A uint16 array is taken for bfloat16.
                tensor.set(array, core.CPUPlace(), True)
                handle.share_external_data(tensor)
                fed.append((tensor, array))
            else:
                handle.copy_from_cpu(array)
        self._fed = fed  # alive until the next run: the predictor has only pointers to them
        self._native.run()
        return {
            spec.name: _carried(self._native.get_output_handle(name).copy_to_cpu(), spec.dtype)
            for spec, name in self._outputs
        }


class WorkerProcess:
    """The loop of one worker: reads a packet, does it, answers it."""

    def __init__(self, sock: socket.socket, slots: Sequence[Slot]) -> None:
        self._sock = sock
        self._slots = slots
        self._signature: Signature | None = None
        self._predictor: Predictor | None = None
        self._warm_feeds: list[dict[str, Array]] = []
        self._phases: Mapping[str, Callable[[dict[str, Any], Recipe], dict[str, Any]]] = {
            "check": self._check, "load": self._load, "warm": self._warm,
        }  # fmt: skip

    def main(self) -> None:
        """Until the front ends the socket: first at loading priority, then at serving priority.

        A lowered priority cannot be raised again without privilege, so the loading phases have a
        thread of their own; the main thread, never lowered, serves.
        """
        handed_over: list[dict[str, Any]] = []
        loading = threading.Thread(target=lambda: handed_over.append(self._loading()))
        loading.start()
        loading.join()
        if not handed_over:
            _exit(70)  # a bug in us, printed by the thread
        self._serving(handed_over[0])

    def _loading(self) -> dict[str, Any]:
        """Do phases until the front says ``serve``; returns that message."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADING_NICE)
        while (message := self._next())["op"] != "serve":
            self._answer(self._phase(message))
        return message

    def _serving(self, message: dict[str, Any]) -> None:
        # Paddle and OpenMP keep things by thread: the new thread's first run is paid for here.
        if self._predictor is not None:
            for feeds in self._warm_feeds:
                self._predictor.run(feeds)
        self._warm_feeds.clear()
        gc.collect()
        gc.freeze()
        self._answer(wire.packed({"id": message["id"], "ok": {}}))
        while True:
            for run in wire.messages_of(self._packet()):
                # One by one: an answer held back would make its input the suspect of a later crash.
                self._answer(self._run(run))

    def _next(self) -> dict[str, Any]:
        return wire.unpacked(self._packet())

    def _packet(self) -> bytes:
        try:
            data = self._sock.recv(wire.MESSAGE_MAX_BYTES)
        except ConnectionResetError:
            _exit(0)
        return data or _exit(0)

    def _answer(self, data: bytes) -> None:
        try:
            self._sock.send(data)
        except (BrokenPipeError, ConnectionResetError):
            _exit(0)

    # --- serving --------------------------------------------------------------------------------

    def _run(self, message: dict[str, Any]) -> bytes:
        request_id = message["id"]
        try:
            if self._predictor is None:
                raise LoadFailed("run before load")
            slot = self._slots[message["slot"]]
            slot.input.follow(message["arena_bytes"])
            feeds = {
                name: slot.input.view(Placed(name, dtype, tuple(shape), offset))
                for name, dtype, shape, offset in message["inputs"]
            }
            drill = message.get("drill")
            started_s = time.perf_counter()
            if drill is not None:
                before_run(drill)
            outputs = self._predictor.run(feeds)
            if drill is not None:
                outputs = after_run(drill, outputs)
            run_s = time.perf_counter() - started_s
            places = slot.output.write(outputs.items())
        except Exception as exc:  # what is raised here is for the front to judge, by its class
            return wire.failure_message(request_id, _fault_of(exc))
        return wire.packed({
            "id": request_id,
            "ok": {
                "outputs": wire.placed_json(places),
                "run_s": run_s,
                "arena_bytes": slot.output.size_bytes,
            },
        })  # fmt: skip

    # --- phases ---------------------------------------------------------------------------------

    def _phase(self, message: dict[str, Any]) -> bytes:
        try:
            phase = self._phases[message["op"]]
            body = phase(message, wire.parse_recipe(message["recipe"]))
            return wire.packed({"id": message["id"], "ok": body})
        except NotAdmitted as exc:
            failure = wire.Failure("admission", exc.check, "", exc.reason)
        except LoaderError as exc:
            failure = wire.Failure("load", "", "", str(exc))
        except Exception as exc:  # whatever Paddle makes of a file that is not a model
            fault = _fault_of(exc)
            failure = wire.Failure("load", fault.code, fault.fault_class, fault.message)
        return wire.failure_message(message["id"], failure)

    def _check(self, message: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
        from loader.admission import check_digest, check_finite, check_params

        folder = Path(message["folder"])
        check_digest(folder, recipe.sha256)
        program = check_params(folder)
        check_finite(folder, program)
        self._signature = program.signature
        return {"signature": wire.signature_json(program.signature)}

    def _load(self, message: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
        folder = Path(message["folder"])
        settings = settings_of(recipe)
        if self._signature is None:  # a replacement: the files were checked before
            self._signature = read_program(folder / choose_in(folder).program).signature
        started_s = time.perf_counter()
        self._predictor = Predictor(folder, settings, self._signature)
        return {
            "signature": wire.signature_json(self._signature),
            "device": recipe.device,
            "load_s": time.perf_counter() - started_s,
            "rss_bytes": psutil.Process().memory_info().rss,
        }

    def _warm(self, message: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
        from loader.admission import (
            check_golden,
            check_outputs_finite,
            load_golden,
            warmup_feeds,
        )

        if self._predictor is None:
            raise LoadFailed("warm before load")
        signature = self._predictor.signature
        runs = 0
        started_s = time.perf_counter()
        self._warm_feeds = list(warmup_feeds(signature, recipe))
        for feeds in self._warm_feeds:
            for _ in range(max(1, recipe.warmup_requests)):
                check_outputs_finite(self._predictor.run(feeds))
                runs += 1
        if message["golden"] is not None:
            golden = load_golden(Path(message["golden"]), signature)
            runs += 1
            check_golden(golden, self._predictor.run(golden.inputs), recipe)
        return {"warm_s": time.perf_counter() - started_s, "runs": runs}


def _create(folder: Path, settings: Settings) -> Any:
    """Raises `LoadFailed`, or what Paddle raises."""
    files = choose_in(folder)
    config = paddle_inference.Config(str(folder / files.program), str(folder / files.wanted_params))
    config.disable_glog_info()
    if settings.gpu is None:
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(settings.threads)
        (config.enable_mkldnn if settings.onednn else config.disable_mkldnn)()
        if settings.onednn and settings.onednn_cache is not None:
            config.set_mkldnn_cache_capacity(settings.onednn_cache)
        if settings.precision == "bf16":
            config.enable_mkldnn_bfloat16()
        if settings.precision == "int8":
            config.enable_mkldnn_int8()
    else:
        # Asking a CPU build for a GPU gives a predictor on the CPU, without a word.
        if not paddle.device.is_compiled_with_cuda():
            raise LoadFailed(f"gpu:{settings.gpu}: this build of Paddle has no CUDA")
        if settings.gpu >= paddle.device.cuda.device_count():
            raise LoadFailed(f"gpu:{settings.gpu}: no such device")
        precision = getattr(paddle_inference.PrecisionType, _GPU_PRECISION[settings.precision])
        config.enable_use_gpu(settings.gpu_memory_mb, settings.gpu, precision)
    config.switch_ir_optim(settings.ir_optim)
    if settings.optimization_level is not None:
        config.set_optimization_level(settings.optimization_level)
    for name in settings.passes_deleted:
        config.delete_pass(name)
    predictor = paddle_inference.create_predictor(config)
    if config.use_gpu() != (settings.gpu is not None) or (
        settings.gpu is not None and config.gpu_device_id() != settings.gpu
    ):
        raise LoadFailed("Paddle put the predictor on another device than asked for")
    return predictor


_GPU_PRECISION = {"fp32": "Float32", "fp16": "Half", "bf16": "Bfloat16", "int8": "Int8"}


def _carried(array: Array, dtype: str) -> Array:
    """As it travels. For a bfloat16 tensor `copy_to_cpu` of 3.3.1 gives a float32 array whose
    first half holds the bits and whose second half was never written."""
    if dtype == "bfloat16" and array.dtype == np.float32:
        return array.reshape(-1).view(np.uint16)[: array.size].reshape(array.shape)
    return array


def _fault_of(exc: Exception) -> wire.Failure:
    from loader.faults import classify

    if isinstance(exc, BadInput):
        return wire.Failure("fault", "InvalidArgument", "request", str(exc))
    if isinstance(exc, ArenaFull):
        return wire.Failure("fault", "-101", "memory", str(exc))
    fault = classify(type(exc).__name__, str(exc))
    return wire.Failure("fault", fault.code, fault.fault_class, fault.message)


def _exit(code: int) -> NoReturn:
    """Leave at once: Paddle's own teardown takes long and can crash."""
    os._exit(code)
