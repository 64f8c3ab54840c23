"""Exits, XIDs, codes, counting rules, and the texts that Paddle 3.3.1 raises (recorded).

tests/integration/test_fault_texts.py provokes the same texts on the installed Paddle.
"""

from __future__ import annotations

import pickle
import time

import pytest

from loader.fault_tables import CUDA, CUDA_NAMES, EXCEPTIONS, PADDLE
from loader.faults import (
    HANDLING,
    MESSAGE_MAX,
    Fault,
    FaultClass,
    classify,
    classify_cuda,
    classify_exit,
    classify_xid,
    counts,
    from_code,
)

R, M, U, X = FaultClass.REQUEST, FaultClass.MEMORY, FaultClass.UNSUPPORTED, FaultClass.UNKNOWN

RECORDED: dict[str, tuple[str, str, str, FaultClass]] = {
    "wrong shape": (
        "ValueError",
        "In user code:\n\n\n    InvalidArgumentError: The input's second dimension and weight's"
        " first dimension is expected to be the same. But received input's second dimension is 5,"
        " input's shape is 2, 5; weight's first dimension is 4, weight's shape is 4, 8.\n"
        "      [Hint: Expected in_mat_dims[1] == w_dims0, but received in_mat_dims[1]:5 !="
        " w_dims0:4.] (at /paddle/paddle/phi/kernels/funcs/common_shape.h:314)\n"
        "      [operator < onednn_kernel.phi_kernel > error]",
        "InvalidArgument", R,
    ),
    "wrong dtype": (
        "ValueError",
        "In user code:\n\n\n    InvalidArgumentError: Ref tensor type (int64) is not supported by"
        " oneDNN.\n      [Hint: Expected ref_type != OneDNNDataType::undef, but received ref_type"
        " == OneDNNDataType::undef.] (at /paddle/paddle/phi/kernels/funcs/"
        "data_layout_transform.cc:60)\n      [operator < onednn_kernel.phi_kernel > error]",
        "InvalidArgument", R,
    ),
    "missing input": (
        "ValueError",
        "In user code:\n\n\n    InvalidArgumentError: The attribute in_num_col_dims used to"
        " flatten Input to a 2-D tensor, is expected to be less than the number of Input's"
        " dimensions. But received in_num_col_dims is 1, the number of Input's dimensions is -1,"
        " Input's shape is .\n      [operator < onednn_kernel.phi_kernel > error]",
        "InvalidArgument", R,
    ),
    "index out of range": (
        "IndexError",
        "In user code:\n\n\n    OutOfRangeError: The element of Index must be less than the size"
        " of input dim size of axis which is 3, but received index element which is 50 in the 0"
        " index.\n      [operator < pd_kernel.phi_kernel > error]",
        "OutOfRange", R,
    ),
    "place of another build": (
        "ValueError",
        "(InvalidArgument) use wrong place, Please check."
        " (at /paddle/paddle/fluid/pybind/place.cc:451)\n",
        "InvalidArgument", R,
    ),
    "array type that a handle does not take": (
        "TypeError",
        "_copy_from_cpu_bind(): incompatible function arguments. The following argument types are"
        " supported:\n    1. (self: paddle.base.libpaddle.PaddleInferTensor, ...) -> None",
        "InvalidType", R,
    ),
    "allocation over RLIMIT_AS": (
        "MemoryError",
        "In user code:\n\n\n    ResourceExhaustedError: Fail to alloc memory of 8000000000 size,"
        " error code is 12.\n      [Hint: Expected error == 0, but received error:12 != 0:0.]"
        " (at /paddle/paddle/phi/core/memory/allocation/cpu_allocator.cc:44)\n"
        "      [operator < pd_kernel.phi_kernel > error]",
        "-101", M,
    ),
    "numpy over RLIMIT_AS": (
        "_ArrayMemoryError",
        "Unable to allocate 4.00 GiB for an array with shape (1073741824,) and data type float32",
        "-101", M,
    ),
    "system call without memory": ("OSError", "[Errno 12] Cannot allocate memory", "-101", M),
    "C++ allocation": ("RuntimeError", "std::bad_alloc", "-101", M),
    "unimplemented in the kernel": (
        "NotImplementedError",
        "In user code:\n\n\n    UnimplementedError: embedding input only support int32 and int64,"
        " but get float32 (at /paddle/paddle/phi/kernels/cpu/embedding_kernel.cc:112)\n"
        "      [operator < pd_kernel.phi_kernel > error]",
        "-204", U,
    ),
    "no such kernel": (
        "RuntimeError",
        "(NotFound) The kernel with key (CPU, Undefined(AnyLayout), bool) of kernel `cholesky` is"
        " not registered. Selected wrong DataType `bool`. Paddle support following DataTypes:"
        " float64, float32.\n  [Hint: Expected kernel_iter == iter->second.end()]"
        " (at /paddle/paddle/phi/core/kernel_factory.cc:317)\n",
        "-204", U,
    ),
    "no such file": (
        "RuntimeError",
        "(NotFound) Cannot open file /models/x.json, please confirm whether the file is normal.\n"
        "  [Hint: Expected paddle::inference::IsFileExists(prog_file_) == true]\n",
        "NotFound", X,
    ),
    "no such handle": (
        "RuntimeError",
        "(PreconditionNotMet) The variable named zz is not found in the scope of the executor.\n"
        "  [Hint: scope->FindVar(name) should not be null.]\n",
        "PreconditionNotMet", X,
    ),
    "params cut at a boundary": (
        "RuntimeError",
        "(Unavailable) Cannot read tensor desc size\n  [Hint: Expected is.good() == true]\n",
        "Unavailable", X,
    ),
    "empty batch on oneDNN": ("RuntimeError", "std::exception", "RuntimeError", X),
    "an external error of no known library": (
        "OSError", "(External) something new", "External", X),
    "a fatal one": ("SystemError", "(Fatal) Operator raises", "Fatal", X),
}  # fmt: skip


@pytest.mark.parametrize(
    ("exc_type", "text", "code", "fault_class"), RECORDED.values(), ids=RECORDED
)
def test_text_of_paddle(exc_type: str, text: str, code: str, fault_class: FaultClass) -> None:
    fault = classify(exc_type, text)
    assert (fault.code, fault.fault_class) == (code, fault_class)
    assert "\n" not in fault.message


def test_every_class_of_paddle_is_known_in_both_forms() -> None:
    for name, (code, fault_class) in PADDLE.items():
        plain = classify("RuntimeError", f"({name}) something")
        nested = classify("RuntimeError", f"In user code:\n\n\n    {name}Error: something")
        assert plain.code == nested.code == code
        assert plain.fault_class is nested.fault_class is fault_class
    assert set(EXCEPTIONS.values()) <= set(PADDLE)


def test_a_name_inside_a_sentence_is_not_a_mark() -> None:
    text = "worker said (InvalidArgument) in passing"
    assert classify("RuntimeError", text).fault_class is FaultClass.UNKNOWN


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (-11, "SIGSEGV"), (-6, "SIGABRT"), (-9, "SIGKILL"), (-7, "SIGBUS"), (1, "EXIT:1"),
        (0, "EXIT:0"), (-63, "SIG63"), ("HANG", "HANG"), ("SIGKILL", "SIGKILL"),
    ],
)  # fmt: skip
def test_exit(ended: int | str, code: str) -> None:
    fault = classify_exit(ended)
    assert (fault.code, fault.fault_class) == (code, FaultClass.CRASH)


@pytest.mark.parametrize("xid", [48, 63, 64, 74, 79, 94, 95])
def test_xid_of_the_device(xid: int) -> None:
    fault = classify_xid(xid)
    assert fault is not None
    assert (fault.code, fault.fault_class) == (f"XID:{xid}", FaultClass.HARDWARE)
    assert from_code(f"XID:{xid}") == fault


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 0, -1])
def test_xid_of_a_program_says_nothing_of_the_device(xid: int) -> None:
    assert classify_xid(xid) is None


STICKY_CODES = [214, 700, 702, 710, 714, 715, 716, 717, 718, 719, 720]


@pytest.mark.parametrize(
    ("code", "fault_class"),
    [
        *[(number, FaultClass.STICKY) for number in STICKY_CODES],
        *[(number, FaultClass.MEMORY) for number in (2, -101, -102)],
        *[(number, FaultClass.UNSUPPORTED) for number in (98, 209, -204)],
        *[(number, FaultClass.HARDWARE) for number in (46, 100, 101)],
        ("SIGSEGV", FaultClass.CRASH), ("EXIT:1", FaultClass.CRASH), ("HANG", FaultClass.CRASH),
        ("NAN", FaultClass.GUARD), ("SLA", FaultClass.GUARD), ("CUDNN:8", FaultClass.STICKY),
        ("InvalidArgument", FaultClass.REQUEST), (12345, FaultClass.UNKNOWN),
        ("-7", FaultClass.UNKNOWN), ("gibberish", FaultClass.UNKNOWN),
        ("XID:13", FaultClass.UNKNOWN),
    ],
)  # fmt: skip
def test_code_alone(code: int | str, fault_class: FaultClass) -> None:
    assert from_code(code).fault_class is fault_class
    assert from_code(code).code == str(code)


def test_no_cuda_number_is_in_two_classes() -> None:
    numbers = [number for held in CUDA.values() for number in held]
    assert len(numbers) == len(set(numbers))
    assert all(classify_cuda(number) is not X for number in CUDA_NAMES.values())


DEFAULT = ("sticky", "memory", "unsupported")


@pytest.mark.parametrize(
    ("code", "codes", "wanted"),
    [
        (700, DEFAULT, True), (2, DEFAULT, True), (-101, DEFAULT, True), (-204, DEFAULT, True),
        ("CUDNN:8", DEFAULT, True), ("CUDNN:8", (700,), False), ("CUDNN:8", ("CUDNN:8",), True),
        (700, (2, 700), True), (719, (2, 700), False), (700, ("sticky",), True),
        (2, ("sticky",), False), (-101, (-101,), True), (700, (), False),
        ("SIGSEGV", (), True), ("HANG", (), True), ("NAN", (), True), ("SLA", (700,), True),
        ("InvalidArgument", DEFAULT, False),
        ("InvalidArgument", ("request", "InvalidArgument"), False),
        (46, DEFAULT, False), (46, (46, "hardware"), False), ("XID:79", (), False),
        (999, DEFAULT, False), (999, (999,), True), ("NotFound", ("unknown",), True),
    ],
)  # fmt: skip
def test_what_counts(code: int | str, codes: tuple[int | str, ...], wanted: bool) -> None:
    assert counts(from_code(code), codes) is wanted


def test_unknown_counts_once_another_version_answered_the_same_request() -> None:
    empty_batch = classify("RuntimeError", "std::exception")
    assert not counts(empty_batch)
    assert counts(empty_batch, proven=True)
    assert not counts(from_code("InvalidArgument"), proven=True)


def test_every_class_is_handled() -> None:
    assert set(HANDLING) == set(FaultClass)
    assert HANDLING[FaultClass.REQUEST].rerun is False


def test_message_is_bounded_and_a_fault_crosses_processes() -> None:
    fault = classify("RuntimeError", "(Fatal) " + "x" * 10_000)
    assert len(fault.message) == MESSAGE_MAX
    assert pickle.loads(pickle.dumps(fault)) == fault
    assert Fault("700", FaultClass.STICKY).message == ""


def test_a_huge_text_is_classified_in_no_time() -> None:
    text = "In user code:\n" + "  The kernel with key (" * 20_000
    began = time.perf_counter()
    classify("RuntimeError", text)
    assert time.perf_counter() - began < 1.0
