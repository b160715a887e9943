"""CUDA's ways on fake tensors of the processor.

torch's processor build cannot run autograd on fake CUDA tensors, so the step runs on fake CPU
tensors, and what CUDA does otherwise is put in place here: which operations autocast casts, which
attention kernels run, that optimizers work on lists of tensors, that dropout keeps a mask of one
byte, and the workspaces of cuBLAS.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from ftplan.launcher.dry_run.attention import flash_attention_2, scaled_dot_product_attention

# Operations that autocast runs in fp32 on CUDA and not on the processor, as far as language models
# use them (ATen/autocast_mode.h: AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE).
_FLOAT32_OPERATIONS = (
    "exp",
    "log",
    "rsqrt",
    "reciprocal",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "group_norm",
    "rms_norm",
    "cosine_similarity",
    "logsumexp",
    "softmax.int",
    "log_softmax.int",
)
# These it asks for an fp32 result; their kernels read 16 bits as they are
# (AT_FORALL_FP32_SET_OPT_DTYPE; ATen/native/ReduceOps.cpp, `gpu_lowp_to_f32`).
_FLOAT32_RESULTS = ("sum", "sum.dim_IntList", "prod", "cumsum")

# Types that torch's optimizers and clipping take as lists.
_PARAMETERS = [torch.nn.Parameter, FakeTensor, DTensor]
_TENSORS = [torch.Tensor, FakeTensor, DTensor]


def _in_float32(operation: Any, *args: Any, **kwargs: Any) -> Any:
    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
            return value.to(torch.float32)
        return value

    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(key):
        return operation(*map(cast, args), **{k: cast(v) for k, v in kwargs.items()})


def _to_float32(operation: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    sixteen = args[0].dtype in (torch.float16, torch.bfloat16)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(key):
        return operation(*args, dtype=dtype or (torch.float32 if sixteen else None), **kwargs)


@contextmanager
def cuda_behaviour(
    capability: tuple[int, int], *, repeats_key_value: bool, efficient_takes_groups: bool = False
) -> Iterator[None]:
    """Within, the processor's fake tensors behave as those of a card of that capability."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    library = torch.library.Library("aten", "IMPL")
    with ExitStack() as stack:
        stack.callback(library._destroy)
        for name in (*_FLOAT32_OPERATIONS, *_FLOAT32_RESULTS):
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
                continue  # the processor's autocast does so too
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
            widened = _to_float32 if name in _FLOAT32_RESULTS else _in_float32
            library.impl(name, partial(widened, operation), "AutocastCPU")
        flash = partial(flash_attention_2, repeats_key_value=repeats_key_value)
        ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = flash
        stack.callback(ALL_ATTENTION_FUNCTIONS.pop, "flash_attention_2")
        attention = scaled_dot_product_attention(
            capability, repeats_key_value, efficient_takes_groups
        )
        for target, replacement in (
            ("torch.nn.functional.scaled_dot_product_attention", attention),
            ("torch.nn.functional.dropout", _dropout),
            ("torch.nn.functional.softmax", _softmax),
            ("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", _devices),
            ("torch.optim.optimizer._get_foreach_kernels_supported_devices", _devices),
            ("torch.optim.optimizer._foreach_supported_types", _PARAMETERS),
            ("torch.utils._foreach_utils._foreach_supported_types", _TENSORS),
            # CUDA's autocast may be on without CUDA: checkpointing turns it on to recompute.
            ("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", _no),
            ("torch.cuda.is_bf16_supported", _always),
            ("torch.utils.checkpoint._infer_device_type", _cuda),
            # TRL's fused loss: Triton kernels that write in place, on the labelled tokens.
            ("trl.trainer.utils._use_triton", _always),
            ("trl.kernels.chunked_logprob._forward_tile", _in_place),
            ("trl.kernels.chunked_logprob._backward_tile", _in_place),
            ("trl.kernels.chunked_logprob._addmm_fp32", _in_place),
            ("accelerate.accelerator.get_mixed_precision_context_manager", autocast),
        ):
            stack.enter_context(mock.patch(target, replacement))
        yield


def _devices() -> list[str]:
    return ["cpu", "cuda"]


def _softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """CUDA turns fp16 scores into fp32 probabilities in one kernel (ATen/native/SoftMax.cpp)."""
    assert dim is not None
    if input.dtype is torch.float16 and dtype is torch.float32:
        return torch._softmax(input, dim, True)
    return input.softmax(dim) if dtype is None else input.softmax(dim, dtype=dtype)


def _softmax_kernel(input: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    return torch.empty_like(input, dtype=torch.float32 if half_to_float else None)


def _softmax_backward_kernel(
    gradient: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype
) -> torch.Tensor:
    """The product of both inputs lives beside the result (ATen/native/cuda/SoftMax.cu)."""
    product = torch.empty_like(gradient)
    result = torch.empty_like(output, dtype=input_dtype)
    del product
    return result


CUDA_KERNELS: dict[Any, Any] = {
    torch.ops.aten._softmax.default: _softmax_kernel,
    torch.ops.aten._softmax_backward_data.default: _softmax_backward_kernel,
}


def _always(*args: Any) -> bool:
    return True


def _no() -> bool:
    return False


def _cuda(*args: Any) -> str:
    return "cuda"


def _in_place(*args: Any, **kwargs: Any) -> None:
    """A kernel that allocates nothing."""


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """CUDA's fused dropout keeps a bool mask (ATen/native/Dropout.cpp)."""
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]


@contextmanager
def autocast(native_amp: bool = False, autocast_kwargs: Any = None) -> Iterator[None]:
    """accelerate's autocast: the processor's casts, and CUDA's flag, which PEFT asks for."""
    from accelerate.state import AcceleratorState

    if not native_amp:
        yield
        return
    fp16 = AcceleratorState().mixed_precision == "fp16"
    dtype = torch.float16 if fp16 else torch.bfloat16
    with torch.autocast("cpu", dtype=dtype), torch.autocast("cuda", dtype=dtype):
        yield
