"""What a device can do at most: `python -m benchmarks.gpu.ceilings DEVICE [--small]`.

Matrix products by dtype and size, attention by kernel and length, copies and element-wise kernels
by size, an optimizer's step, and how fast the host launches. One JSON object a line on stdout, as
soon as it is known: `what` was measured, its sizes, `seconds`, and a rate. Numbers are random:
zeros cost less power and would be faster.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ftplan.planner.units import GIB, KIB, MIB

Line = dict[str, Any]

# How long each is repeated, and how often that is measured; the middle counts.
_SECONDS, _TIMES = 0.05, 3

_SQUARES = (512, 1024, 2048, 4096, 8192, 16384)
# (tokens, out, in) of layers that people train: queries, keys and values, feed-forward, and heads
# of 0.5, 1.5, 8 and 32 billion parameters.
_OF_TRAINING = tuple(
    (tokens, out, into)
    for tokens in (512, 2048, 8192)
    for out, into in (
        (896, 896),
        (4864, 896),
        (1536, 1536),
        (8960, 1536),
        (1024, 4096),
        (4096, 4096),
        (14336, 4096),
        (4096, 14336),
        (27648, 5120),
        (16, 4096),
        (4096, 16),
    )
)
_HEADS = ((32, 32, 128), (32, 8, 128), (14, 2, 64))
_LENGTHS = (512, 2048, 4096, 8192, 16384)
_ATTENTION_TOKENS = 16384
_COPIES = (64 * KIB, MIB, 16 * MIB, 256 * MIB, 2 * GIB)


def main() -> int:
    device, small = sys.argv[1], "--small" in sys.argv[2:]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in Ceilings(device, small=small).measured():
        answers.write(json.dumps(line) + "\n")
        answers.flush()
    return 0


class Ceilings:
    """`small`: sizes and times at which the code is tried out, nothing to judge a device by."""

    def __init__(self, device: str, *, small: bool) -> None:
        self.device, self.small = device, small
        self.is_cuda = device == "cuda"
        self.seconds = 0.005 if small else _SECONDS

    def measured(self) -> Iterator[Line]:
        """Everything that the device has; what it has not says why."""
        for measure in (self.products, self.attention, self.copies, self.steps, self.launches):
            lines = measure()
            while True:
                try:
                    yield next(lines)
                except StopIteration:
                    break
                except Exception as error:
                    # The rest of the same kind needs what failed here.
                    said = " ".join(str(error).split())[:300]
                    yield {"what": measure.__name__, "failed": f"{type(error).__name__}: {said}"}
                    break

    def products(self) -> Iterator[Line]:
        """(m, k) x (k, n), the second one stored as weights are."""
        squares = tuple((n, n, n) for n in (_SQUARES[:1] if self.small else _SQUARES))
        shapes = squares + (_OF_TRAINING[:1] if self.small else _OF_TRAINING)
        for dtype, product in self._kinds_of_product().items():
            for m, n, k in shapes:
                if dtype in ("float32", "tf32") and m * n * k > 4096**3:
                    continue
                yield self._tried(
                    {"what": "matmul", "dtype": dtype, "m": m, "n": n, "k": k},
                    lambda product=product, m=m, n=n, k=k: product(m, n, k),
                    flops=2 * m * n * k,
                )

    def _kinds_of_product(self) -> dict[str, Callable[[int, int, int], Callable[[], object]]]:
        kinds = {
            "bfloat16": self._product(torch.bfloat16),
            "float32": self._product(torch.float32),
        }
        if not self.is_cuda:
            return kinds
        capability = torch.cuda.get_device_capability()
        kinds["float16"] = self._product(torch.float16)
        if capability >= (8, 0):
            kinds["tf32"] = self._product(torch.float32, tf32=True)
        if capability >= (7, 5):
            kinds["int8"] = self._int8_product
        if capability >= (8, 9):
            kinds["float8"] = self._float8_product
        return kinds

    def _product(
        self, dtype: torch.dtype, *, tf32: bool = False
    ) -> Callable[[int, int, int], Callable[[], object]]:
        def make(m: int, n: int, k: int) -> Callable[[], object]:
            a, b = self._random(m, k, dtype=dtype), self._random(n, k, dtype=dtype)
            torch.backends.cuda.matmul.allow_tf32 = tf32
            return lambda: a @ b.t()

        return make

    def _int8_product(self, m: int, n: int, k: int) -> Callable[[], object]:
        a, b = (
            torch.randint(-127, 127, shape, dtype=torch.int8, device=self.device)
            for shape in ((m, k), (n, k))
        )
        return lambda: torch._int_mm(a, b.t())

    def _float8_product(self, m: int, n: int, k: int) -> Callable[[], object]:
        kind = torch.float8_e4m3fn
        a, b = self._random(m, k).to(kind), self._random(n, k).to(kind)
        one = torch.ones((), device=self.device)
        return lambda: torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )

    def attention(self) -> Iterator[Line]:
        """Causal, of (query heads, key-value heads, head dimension); FLOPs are those of the half
        that causality leaves, backward's two and a half times forward's."""
        heads, lengths = (_HEADS[-1:], (128,)) if self.small else (_HEADS, _LENGTHS)
        for name, backend in self._attention_kernels().items():
            for query, key, dim in heads:
                for length in lengths:
                    if name == "math" and length > 4096:
                        continue
                    yield from self._attention(name, backend, query, key, dim, length)

    def _attention_kernels(self) -> dict[str, Any]:
        from torch.nn.attention import SDPBackend

        kernels = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
        if self.is_cuda:
            kernels["efficient"] = SDPBackend.EFFICIENT_ATTENTION
            kernels["cudnn"] = SDPBackend.CUDNN_ATTENTION
        return kernels

    def _attention(
        self, name: str, backend: Any, query: int, key: int, dim: int, length: int
    ) -> Iterator[Line]:
        from torch.nn.attention import sdpa_kernel

        rows = 1 if self.small else max(1, _ATTENTION_TOKENS // length)
        line = {
            **{"what": "attention", "kernel": name, "rows": rows, "length": length},
            **{"heads": query, "key_value_heads": key, "head_dim": dim},
        }
        flops = 2 * rows * query * length * length * dim

        def make(backward: bool) -> Callable[[], object]:
            q, k, v = (
                self._random(rows, n, length, dim).requires_grad_(backward)
                for n in (query, key, key)
            )
            if name == "efficient" and query != key:  # it does not take groups everywhere
                k, v = (x.detach().repeat_interleave(query // key, 1) for x in (k, v))
                k.requires_grad_(backward)
                v.requires_grad_(backward)

            def step() -> None:
                grouped = {"enable_gqa": True} if k.shape[1] != query else {}
                with sdpa_kernel(backend):
                    out = functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, **grouped
                    )
                if backward:
                    out.backward(out.detach())

            return step

        yield self._tried(line | {"pass": "forward"}, lambda: make(False), flops=flops)
        line["pass"] = "forward and backward"
        yield self._tried(line, lambda: make(True), flops=3.5 * flops)

    def copies(self) -> Iterator[Line]:
        """Bytes are those read and written."""
        for size in _COPIES[:2] if self.small else _COPIES:
            elements = size // 2
            yield self._tried(
                {"what": "copy", "bytes": size},
                lambda elements=elements: self._copy(elements),
                moved=2 * size,
            )
            yield self._tried(
                {"what": "add", "bytes": size},
                lambda elements=elements: self._add(elements),
                moved=3 * size,
            )
        if self.is_cuda:
            size = 256 * MIB
            for pinned in (True, False):
                for to in ("cuda", "cpu"):
                    yield self._tried(
                        {"what": f"copy to {to}", "bytes": size, "pinned": pinned},
                        lambda pinned=pinned, to=to: self._across(size, pinned, to),
                        moved=size,
                    )

    def _copy(self, elements: int) -> Callable[[], object]:
        source = self._random(elements)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def _add(self, elements: int) -> Callable[[], object]:
        a, b = self._random(elements), self._random(elements)
        out = torch.empty_like(a)
        return lambda: torch.add(a, b, out=out)

    def _across(self, size: int, pinned: bool, to: str) -> Callable[[], object]:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        device = torch.empty(size, dtype=torch.uint8, device="cuda")
        source, target = (host, device) if to == "cuda" else (device, host)
        return lambda: target.copy_(source, non_blocking=pinned)

    def steps(self) -> Iterator[Line]:
        """AdamW's step on parameters of one size; bytes are those that it must read and write."""
        each, count = (1024, 2) if self.small else (16 * MIB, 24)
        for dtype in (torch.float32, torch.bfloat16):
            for how in ("fused", "foreach"):
                # Parameters, gradients and two states read, all but the gradients written.
                moved = 7 * each * count * dtype.itemsize
                yield self._tried(
                    {
                        **{"what": "adamw", "how": how, "dtype": str(dtype).removeprefix("torch.")},
                        "parameters": each * count,
                    },
                    lambda dtype=dtype, how=how: self._adamw(each, count, dtype, how),
                    moved=moved,
                )

    def _adamw(self, each: int, count: int, dtype: torch.dtype, how: str) -> Callable[[], object]:
        parameters = [nn.Parameter(self._random(each, dtype=dtype)) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return torch.optim.AdamW(parameters, lr=1e-6, **{how: True}).step

    def launches(self) -> Iterator[Line]:
        """Seconds of the host for one operation on next to nothing, autograd off and on."""
        for recorded in (False, True):
            yield self._tried(
                {"what": "launch", "autograd": recorded},
                lambda recorded=recorded: self._launch(recorded),
                times=100,
            )

    def _launch(self, recorded: bool) -> Callable[[], object]:
        one = torch.ones(1, device=self.device, requires_grad=recorded)

        def many() -> None:
            value = one
            for _ in range(100):
                value = value * 1.0

        return many

    def _random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def _tried(
        self,
        line: Line,
        make: Callable[[], Callable[[], object]],
        *,
        flops: float | None = None,
        moved: float | None = None,
        times: int = 1,
    ) -> Line:
        """The line with its seconds and rate; with the reason where the device cannot do it."""
        try:
            seconds = self._seconds(make()) / times
        except (RuntimeError, torch.OutOfMemoryError) as error:
            self._forget()
            return {**line, "failed": " ".join(str(error).split())[:200]}
        self._forget()
        rates = {
            "flops_per_second": flops and flops / seconds,
            "bytes_per_second": moved and moved / seconds,
        }
        return {**line, "seconds": seconds, **{k: v for k, v in rates.items() if v}}

    def _forget(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()

    def _seconds(self, step: Callable[[], object]) -> float:
        """Of one call, the middle of several measurements of many in a row."""
        for _ in range(3):
            step()
        once = self._of(step, 2) / 2
        repeat = max(2, min(10_000, round(self.seconds / max(once, 1e-7))))
        return statistics.median(self._of(step, repeat) / repeat for _ in range(_TIMES))

    def _of(self, step: Callable[[], object], repeat: int) -> float:
        self._wait()
        began = time.perf_counter()
        for _ in range(repeat):
            step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
