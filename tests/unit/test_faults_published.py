"""Texts that users of Paddle published, each with its source: what they are for us."""

from __future__ import annotations

import pytest

from loader.faults import FaultClass, classify

PADDLE = "https://github.com/PaddlePaddle/Paddle"
OCR = "https://github.com/PaddlePaddle/PaddleOCR"

S, M, U, H, X = (
    FaultClass.STICKY, FaultClass.MEMORY, FaultClass.UNSUPPORTED, FaultClass.HARDWARE,
    FaultClass.UNKNOWN,
)  # fmt: skip

CASES: list[tuple[str, str, str, str, FaultClass]] = [
    # source, exception, text, code, class
    (f"{PADDLE}NLP/issues/6031", "OSError",
     "(External) CUDA error(700), an illegal memory access was encountered.", "700", S),
    (f"{PADDLE}/issues/33888", "OSError",
     "(External) Cuda error(700), an illegal memory access was encountered", "700", S),
    (f"{PADDLE}NLP/issues/1238", "OSError",
     "(External)  Cuda error(700), an illegal memory access was encountered.\n"
     "  [Advise: Please search for the error code(700) on website( https://docs.nvidia.com/ )]",
     "700", S),
    (f"{PADDLE}/issues/49897", "OSError",
     "ExternalError: CUDA error(700), an illegal memory access was encountered. \n"
     "      [Hint: Please search for the error code(700) on website"
     " (https://docs.nvidia.com/cuda/cuda-runtime-api/) to get Nvidia's official solution]"
     " (at /paddle/paddle/phi/backends/gpu/cuda/cuda_info.cc:252)\n"
     "      [operator < fetch_v2 > error]", "700", S),
    ("https://github.com/PaddlePaddle/PaddleClas/issues/2571", "OSError",
     "(External) CUDA error(719), unspecified launch failure. \n"
     "  [Hint: Please search for the error code(719) on website (https://docs.nvidia.com/)]"
     " (at /paddle/paddle/phi/backends/gpu/cuda/cuda_info.cc:259)", "719", S),
    (f"{PADDLE}/issues/51592", "OSError",
     "(External) CUDA error(719), unspecified launch failure. \n"
     "  [Hint: 'cudaErrorLaunchFailure'. An exception occurred on the device while executing a"
     " kernel. To continue using CUDA, the process must be terminated and relaunched.]"
     " (at ..\\paddle\\fluid\\platform\\device\\gpu\\gpu_info.cc:123)", "719", S),
    (f"{PADDLE}/issues/48442", "OSError",
     "(External) CUDA error(716), misaligned address.", "716", S),
    (f"{OCR}/issues/6426", "OSError",
     "(External) CUDA error(2), out of memory.\n  [Hint: 'cudaErrorMemoryAllocation'. The API call"
     " failed because it was unable to allocate enough memory to perform the requested operation."
     " ] (at ..\\paddle\\fluid\\platform\\stream\\cuda_stream.cc:45)\n"
     "  [operator < gaussian_random > error]", "2", M),
    (f"{PADDLE}/issues/34590", "OSError",
     "(External) Cuda error(2), out of memory. [Advise: The API call failed because it was unable"
     " to allocate enough memory to perform the requested operation. ]"
     " (at /paddle/paddle/fluid/platform/stream/cuda_stream.cc:49)", "2", M),
    (f"{OCR}/issues/1505", "MemoryError",
     "\n----------------------\nError Message Summary:\n----------------------\n"
     "ResourceExhaustedError: \n\nOut of memory error on GPU 0. Cannot allocate 25.002197MB memory"
     " on GPU 0, available memory is only 15.187500MB.\n\nPlease check whether there is any other"
     " process using GPU 0.\n1. If yes, please stop them, or start PaddlePaddle on another GPU.\n"
     " (at /paddle/paddle/fluid/memory/allocation/cuda_allocator.cc:69)\n", "-102", M),
    (f"{PADDLE}/issues/42228", "RuntimeError",
     "ResourceExhaustedError:\n\nOut of memory error on GPU 0. Cannot allocate 98.000244MB memory"
     " on GPU 0, 6.000000GB memory has been allocated and available memory is only 0.000000B.",
     "-102", M),
    (f"{PADDLE}/issues/50279", "OSError",
     "(External) CUDA error(98), invalid device function.", "98", U),
    (f"{PADDLE}X/issues/4682", "OSError",
     "(External) CUDA error(209), no kernel image is available for execution on the device.\n"
     "  [Hint: 'cudaErrorNoKernelImageForDevice'. This indicates that there is no kernel image"
     " available that is suitable for the device.] \n"
     "  (at ..\\paddle\\phi\\core\\platform\\device\\gpu\\gpu_info.cc:133)", "209", U),
    (f"{PADDLE}MIX/issues/836", "RuntimeError",
     "CUDA error 209 [../third_party/cccl/cub/cub/util_device.cuh, 83]: no kernel image is"
     " available for execution on the device", "209", U),
    (f"{PADDLE}/issues/52586", "RuntimeError",
     "parallel_for failed: cudaErrorNoKernelImageForDevice: no kernel image is available for"
     " execution on the device", "209", U),
    (f"{PADDLE}Detection/issues/2298", "RuntimeError",
     "parallel_for failed: no kernel image is available for execution on the device", "-204", U),
    (f"{PADDLE}/issues/47874", "OSError",
     "(External) CUDA error(100), no CUDA-capable device is detected", "100", H),
    (f"{PADDLE}/issues/57242", "OSError",
     "(External) CUDNN error(8), CUDNN_STATUS_EXECUTION_FAILED.\n  [Hint: Please search for the"
     " error code(8) on website (https://docs.nvidia.com/deeplearning/cudnn/api/)]"
     " (at C:\\home\\workspace\\Paddle\\paddle\\phi\\kernels\\gpudnn\\conv_grad_kernel.cu:502)",
     "CUDNN:8", S),
    (f"{PADDLE}/issues/65509", "OSError", "(External) CUDNN error(8)", "CUDNN:8", S),
    (f"{PADDLE}/issues/78663", "OSError",
     "(External) CUDNN error(5000), CUDNN_STATUS_EXECUTION_FAILED.", "CUDNN:5000", S),
    (f"{PADDLE}/issues/78663", "OSError",
     "(External) CUDNN error(4000), CUDNN_STATUS_INTERNAL_ERROR.", "CUDNN:4000", S),
    (f"{PADDLE}/issues/46630", "OSError",
     "(External) CUDNN error(4), CUDNN_STATUS_INTERNAL_ERROR. \n  [Hint:"
     " 'CUDNN_STATUS_INTERNAL_ERROR'.  An internal cuDNN operation failed.  ]"
     " (at /paddle/paddle/fluid/platform/device_context.h:407)", "CUDNN:4", S),
    (f"{PADDLE}/issues/52250", "OSError",
     "(External) CUDNN error(1), CUDNN_STATUS_NOT_INITIALIZED.", "CUDNN:1", S),
    (f"{PADDLE}Speech/issues/3191", "OSError",
     "(External) CUDNN error(9), CUDNN_STATUS_NOT_SUPPORTED. \n  [Hint:"
     " 'CUDNN_STATUS_NOT_SUPPORTED'.  The functionality requested is not presently supported by"
     " cuDNN.  ]\n  [operator < conv2d > error]", "CUDNN:9", U),
    (f"{PADDLE}/issues/35039", "OSError",
     "(External)  Cudnn error, CUDNN_STATUS_EXECUTION_FAILED"
     "  (at /paddle/paddle/fluid/operators/conv_cudnn_op.cu:731)", "CUDNN:EXECUTION_FAILED", S),
    (f"{PADDLE}/pull/33003", "OSError",
     "(External)  CUDNN error(3), CUDNN_STATUS_BAD_PARAM. \n  [Hint: 'CUDNN_STATUS_BAD_PARAM'. An"
     " incorrect value or parameter was passed to the function.]", "CUDNN:3", X),
    (f"{PADDLE}/issues/47749", "OSError",
     "(External) CUBLAS error(13).\n  [Hint: Please search for the error code(13) on website"
     " (https://docs.nvidia.com/cuda/cublas/index.html#cublasstatus_t)]"
     " (at /paddle/paddle/phi/kernels/funcs/blas/blas_impl.cu.h:35)\n"
     "  [operator < multihead_matmul > error]", "CUBLAS:13", S),
    (f"{PADDLE}/issues/54555", "OSError",
     "(External) CUBLAS error(1). \n  [Hint: 'CUBLAS_STATUS_NOT_INITIALIZED'.  The cuBLAS library"
     " was not initialized. This is usually caused by the lack of a prior cublasCreate() call, an"
     " error in the CUDA Runtime API called by the cuBLAS routine]", "CUBLAS:1", S),
    (f"{PADDLE}/issues/58539", "OSError", "(External) CUBLAS error(15).", "CUBLAS:15", U),
    (f"{PADDLE}/issues/45683", "OSError",
     "(External) CUBLAS error(7). \n  [Hint: 'CUBLAS_STATUS_INVALID_VALUE'.  An unsupported value"
     " or parameter was passed to the function (a negative vector size, for example).]",
     "CUBLAS:7", X),
    (f"{PADDLE}/issues/59075", "OSError", "(External) CUBLAS error(54).", "CUBLAS:54", X),
    (f"{PADDLE}/issues/37364", "OSError",
     "(External)  Cublas error, `CUBLAS_STATUS_EXECUTION_FAILED`. The GPU program failed to"
     " execute. This is often caused by a launch failure of the kernel on the GPU"
     "  (at /paddle/paddle/fluid/operators/math/blas_impl.cu.h:35)\n  [operator < fc > error]",
     "CUBLAS:EXECUTION_FAILED", S),
    (f"{PADDLE}/issues/30778", "OSError",
     "(External) Cublas error, `CUSOLVER_STATUS_INTERNAL_ERROR`. An internal cuSolver operation"
     " failed.", "CUSOLVER:INTERNAL_ERROR", S),
    (f"{PADDLE}X/issues/1950", "OSError",
     "(External) CUSOLVER error(7). \n  [Hint: 'CUSOLVER_STATUS_INTERNAL_ERROR'. An internal"
     " cuSolver operation failed. This error is usually caused by a cudaMemcpyAsync() failure.]",
     "CUSOLVER:7", S),
    (f"{PADDLE}/pull/33003", "OSError",
     "(External)  CURAND error(204). \n  [Hint: 'CURAND_STATUS_ARCH_MISMATCH'.  Architecture"
     " mismatch, GPU does not support requested feature. ]", "CURAND:204", U),
    (f"{PADDLE}Speech/issues/2580", "OSError", "(External) CUFFT error(50).", "CUFFT:50", X),
    (f"{PADDLE}Seg/issues/2159", "OSError", "(External) CUSPARSE error(1)", "CUSPARSE:1", S),
    (f"{PADDLE}Detection/issues/7380", "OSError",
     "(External) NCCL error(2), unhandled system error.\n  [Hint: Please search for the error"
     " code(2) on website (https://docs.nvidia.com/deeplearning/nccl/)]"
     " (at /paddle/paddle/fluid/distributed/collective/ProcessGroupNCCL.cc:236)", "NCCL:2", S),
    (f"{PADDLE}Detection/issues/4139", "OSError",
     "(External)  Nccl error, unhandled cuda error"
     "  (at /paddle/paddle/fluid/platform/collective_helper.cc:100)",
     "NCCL:unhandled cuda error", S),
    (f"{PADDLE}YOLO/issues/121", "RuntimeError",
     "Failed, NCCL error /paddle/paddle/fluid/distributed/collective/NCCLTools.h:227"
     " 'unhandled cuda error'", "NCCL:unhandled cuda error", S),
    (f"{PADDLE}Formers/issues/2318", "NotImplementedError",
     "UnimplementedError: There are no kernels which are registered in the pad2d operator.\n"
     " [Hint: Expected kernels_iter != all_op_kernels.end()]", "-204", U),
    (f"{PADDLE}NLP/issues/3265", "RuntimeError",
     "(NotFound) There are no kernels which are registered in the unsqueeze2 operator.",
     "-204", U),
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "exc_type", "text", "code", "fault_class"),
    CASES,
    ids=[f"{case[3]}-{case[0].rsplit('/', 1)[1]}" for case in CASES],
)
def test_published_text(
    source: str, exc_type: str, text: str, code: str, fault_class: FaultClass
) -> None:
    fault = classify(exc_type, text)
    assert (fault.code, fault.fault_class) == (code, fault_class), source


def test_message_is_one_line_without_the_hint() -> None:
    hinted = next(case for case in CASES if "49897" in case[0])
    message = classify(hinted[1], hinted[2]).message
    assert message == ("ExternalError: CUDA error(700), an illegal memory access was encountered.")
    summary = next(case for case in CASES if "1505" in case[0])
    assert classify(summary[1], summary[2]).message.startswith(
        "ResourceExhaustedError: Out of memory error on GPU 0. Cannot allocate 25.002197MB"
    )
