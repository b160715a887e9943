"""What the stand-ins for CUDA's kernels allocate, keep and return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ftplan.launcher.dry_run.attention import (
    EfficientAttention,
    FlashAttention,
    flash_attention_2,
    scaled_dot_product_attention,
)
from ftplan.launcher.dry_run.cuda import CUDA_KERNELS, cuda_behaviour
from ftplan.launcher.dry_run.draft import Draft
from ftplan.launcher.dry_run.fakes import make_fake, quantization_tensors, quantize_blank
from ftplan.launcher.dry_run.fused_kernels import FusedDropout, FusedNorm, fused_rotary_embeddings
from ftplan.launcher.dry_run.losses import LigerLoss, shifted_logits_loss
from ftplan.launcher.dry_run.quantized import int8_matmul, quantized_kernels
from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.launcher.dry_run.step import dry_run
from ftplan.planner.families import spec_from_config
from ftplan.planner.memory import estimate_memory
from ftplan.planner.memory_record import MemoryRecord
from ftplan.planner.stack import Stack, cublas_workspace_bytes
from tests.dry_runs import GPT2, LLAMA, cuda_case

pytestmark = pytest.mark.train

BATCH, LENGTH, HEADS, GROUPS, HEAD_DIM = 2, 40, 8, 2, 40
TOKENS = BATCH * LENGTH


class Recording:
    """A record being written; `record` is there at the end."""

    def __init__(self, draft: Draft, fake_mode: FakeTensorMode) -> None:
        self.draft, self.fake_mode = draft, fake_mode

    def begin(self, phase: str) -> None:
        self.draft.begin_phase(phase)

    @property
    def record(self) -> MemoryRecord:
        return self.draft.finish()

    def rise(self, phase: str) -> int:
        """How far allocated bytes rise in a phase above what was there when it began."""
        record = self.record
        start = next(start for name, start, _ in record.phase_ranges() if name == phase)
        before = record.levels[start - 1] if start else 0
        return record.phase_peaks()[phase].allocated_bytes - before

    def born(self, phase: str) -> list[tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of what is born in a phase, in order."""
        record = self.record
        (bounds,) = [(a, b) for name, a, b in record.phase_ranges() if name == phase]
        events = record.events[slice(*bounds)]
        return [(record.storages[e].shape, record.storages[e].dtype) for e in events if e >= 0]


@contextmanager
def recording(kernels: dict[Any, Callable[..., Any]] | None = None) -> Iterator[Recording]:
    """Fake tensors within; what they take is recorded."""
    draft = Draft("layers")
    fake_mode = FakeTensorMode()
    recorder = Recorder(draft, fake_mode, dict(kernels or {}), padded=False)
    with (
        torch.autograd.set_multithreading_enabled(False),
        fake_mode,
        recorder.watching(nn.Module()),
    ):
        draft.begin_phase("inputs")
        yield Recording(draft, fake_mode)


def num_bytes(tensors: Sequence[torch.Tensor | None]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def heads_first(heads: int, dtype: torch.dtype = torch.bfloat16, dim: int = HEAD_DIM) -> Any:
    """(batch, heads, length, head_dim), as projections give it: a turned view."""
    shape = (BATCH, LENGTH, heads, dim)
    return torch.empty(shape, dtype=dtype, requires_grad=True).transpose(1, 2)


# --- attention: what is kept ---------------------------------------------------------------------


@pytest.mark.parametrize("groups", [HEADS, GROUPS])
def test_flash_attention_keeps_inputs_result_and_sums(groups: int) -> None:
    with recording() as made:
        q, k, v = (heads_first(heads).transpose(1, 2) for heads in (HEADS, groups, groups))
        made.begin("forward")
        result = FlashAttention.apply(q, k, v)
    assert result.shape == (BATCH, LENGTH, HEADS, HEAD_DIM)
    half = 2 * TOKENS * HEAD_DIM  # bytes of one head
    sums = 4 * TOKENS * HEADS
    saved = result.grad_fn.saved_tensors
    assert num_bytes(saved) == (HEADS + 2 * groups + HEADS) * half + sums
    assert made.rise("forward") == HEADS * half + sums


def test_some_models_repeated_heads_for_flash_attention() -> None:
    def repeats(model_type: str, version: tuple[int, ...] | None) -> bool:
        return Stack(transformers_version=version).repeats_heads(model_type, "flash_attention_2")

    assert repeats("mistral", (4, 47))
    assert not repeats("llama", (4, 47))
    assert not repeats("mistral", (4, 48))
    assert not repeats("mistral", None)


@pytest.mark.parametrize("repeats", [False, True])
def test_repeated_heads_are_kept(repeats: bool) -> None:
    with recording() as made:
        q, k, v = (heads_first(heads) for heads in (HEADS, GROUPS, GROUPS))
        made.begin("forward")
        result, _ = flash_attention_2(nn.Module(), q, k, v, None, repeats_key_value=repeats)
    half = 2 * TOKENS * HEAD_DIM  # bytes of one head
    key_heads = HEADS if repeats else GROUPS
    saved = num_bytes(result.grad_fn.saved_tensors)
    assert saved == (2 * HEADS + 2 * key_heads) * half + 4 * TOKENS * HEADS


@pytest.mark.parametrize("groups", [HEADS, GROUPS])
def test_flash_attention_returns_a_gradient_for_each_head_it_got(groups: int) -> None:
    """In backward: three gradients, an fp32 accumulator and products padded to 128 rows and 32
    head dimensions; of grouped heads first as many gradients as the query has."""
    with recording() as made:
        q, k, v = (heads_first(heads).transpose(1, 2) for heads in (HEADS, groups, groups))
        result = FlashAttention.apply(q, k, v)
        incoming = torch.empty_like(result)
        made.begin("backward")
        gradients = torch.autograd.grad(result, (q, k, v), incoming)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    assert {g.dtype for g in gradients} == {torch.bfloat16}
    half = 2 * TOKENS * HEAD_DIM
    rows, width = 128, 64
    accumulated = 4 * BATCH * HEADS * rows * (width + 1)
    expanded = 2 * HEADS * half if groups != HEADS else 0
    assert made.rise("backward") == (HEADS + 2 * groups) * half + accumulated + expanded


def test_efficient_attention_keeps_inputs_result_bias_and_sums() -> None:
    with recording() as made:
        q, k, v = (heads_first(HEADS) for _ in range(3))
        bias = torch.empty((BATCH, 1, LENGTH, 48), dtype=torch.bfloat16)
        made.begin("forward")
        result = EfficientAttention.apply(q, k, v, bias)
    assert result.shape == q.shape
    one = 2 * TOKENS * HEADS * HEAD_DIM
    sums = 4 * BATCH * HEADS * 64  # rows up to a multiple of 32
    assert made.rise("forward") == one + sums
    assert num_bytes(result.grad_fn.saved_tensors) == 4 * one + sums + num_bytes([bias])


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_efficient_attention_returns_three_gradients(dtype: torch.dtype, turned: bool) -> None:
    """In half precision the query's gradient is summed up in fp32, whole. In fp32 the incoming
    gradient is first multiplied with the result. One that does not come as rows of tokens, which
    models give it as, is copied."""
    with recording() as made:
        q, k, v = (heads_first(HEADS, dtype) for _ in range(3))
        result = EfficientAttention.apply(q, k, v, None)
        incoming = torch.empty_like(result)
        if not turned:
            incoming = incoming.contiguous()
        made.begin("backward")
        gradients = torch.autograd.grad(result, (q, k, v), incoming)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    one = dtype.itemsize * TOKENS * HEADS * HEAD_DIM
    sums = 4 * TOKENS * HEADS
    within = one if dtype is torch.float32 else 2 * one + sums
    assert made.rise("backward") == 3 * one + within + (0 if turned else one)


# --- attention: which kernel ---------------------------------------------------------------------


def functions_behind(tensor: torch.Tensor) -> set[str]:
    """Names of the autograd functions that a result comes from."""
    names: set[str] = set()
    pending = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None:
            names.add(node.name())
            pending += [before for before, _ in node.next_functions]
    return names


FLASH, EFFICIENT, MATH = "FlashAttentionBackward", "EfficientAttentionBackward", "math"


def kernel(
    capability: tuple[int, int] = (8, 0),
    dtype: torch.dtype = torch.bfloat16,
    *,
    groups: int = HEADS,
    repeats: bool = False,
    head_dim: int = HEAD_DIM,
    value_dim: int | None = None,
    masked: bool = False,
) -> str:
    """The kernel that runs."""
    with FakeTensorMode():
        mask = torch.empty((BATCH, 1, LENGTH, LENGTH), dtype=torch.bool) if masked else None
        result = scaled_dot_product_attention(capability, repeats)(
            heads_first(HEADS, dtype, head_dim),
            heads_first(groups, dtype, head_dim),
            heads_first(groups, dtype, value_dim or head_dim),
            attn_mask=mask,
            is_causal=not masked,
            enable_gqa=groups != HEADS and not repeats,
        )
        assert result.shape == (BATCH, HEADS, LENGTH, value_dim or head_dim)
        return next((n for n in (FLASH, EFFICIENT) if n in functions_behind(result)), MATH)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attention_runs_in_half_precision_from_ampere_on(dtype: torch.dtype) -> None:
    assert kernel((8, 0), dtype) == FLASH
    assert kernel((9, 0), dtype) == FLASH
    assert kernel((8, 0), dtype, groups=GROUPS) == FLASH


def test_what_flash_attention_cannot_do_the_efficient_kernel_does() -> None:
    assert kernel(dtype=torch.float32) == EFFICIENT
    assert kernel((7, 5), torch.float16) == EFFICIENT
    assert kernel(masked=True) == EFFICIENT
    assert kernel(head_dim=257) == EFFICIENT
    assert kernel(head_dim=256) == FLASH
    assert kernel(head_dim=96, value_dim=64) == EFFICIENT


def test_what_no_kernel_can_do_is_done_by_operations() -> None:
    assert kernel((7, 5), torch.bfloat16) == MATH
    assert kernel(groups=GROUPS, masked=True) == MATH


def test_repeated_heads_are_no_longer_grouped() -> None:
    assert kernel(groups=GROUPS, masked=True, repeats=True) == EFFICIENT
    assert kernel(groups=GROUPS, repeats=True) == FLASH


def test_repeating_heads_copies_keys_and_values() -> None:
    with recording() as made:
        q, k, v = heads_first(HEADS), heads_first(GROUPS), heads_first(GROUPS)
        made.begin("forward")
        result = scaled_dot_product_attention((8, 0), True)(q, k, v, is_causal=True)
    assert result.shape == q.shape
    one = 2 * TOKENS * HEADS * HEAD_DIM
    assert made.rise("forward") >= 3 * one


def test_under_autocast_attention_runs_in_its_dtype() -> None:
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = (heads_first(HEADS, torch.float32) for _ in range(3))
        result = scaled_dot_product_attention((8, 0), False)(q, k, v, is_causal=True)
    assert result.dtype is torch.bfloat16
    assert FLASH in functions_behind(result)


@pytest.mark.parametrize(("length", "padded"), [(100, 112), (96, 96)])
def test_the_mask_becomes_a_bias_of_padded_rows(length: int, padded: int) -> None:
    with recording() as made:
        shape = (BATCH, length, HEADS, HEAD_DIM)
        q, k, v = (
            torch.empty(shape, dtype=torch.bfloat16, requires_grad=True).transpose(1, 2)
            for _ in range(3)
        )
        mask = torch.empty((BATCH, 1, length, length), dtype=torch.bool)
        made.begin("forward")
        result = scaled_dot_product_attention((8, 0), False)(q, k, v, attn_mask=mask)
    bias = result.grad_fn.saved_tensors[3]
    assert bias.shape == (BATCH, 1, length, padded)
    assert bias.dtype is torch.bfloat16


def test_flash_attention_of_transformers_computes_in_the_layers_dtype() -> None:
    """Norms in fp32 give fp32 queries; the kernel takes half precision only."""
    with FakeTensorMode():
        module = nn.Linear(2, 2, dtype=torch.bfloat16)
        q, k, v = (heads_first(HEADS, torch.float32) for _ in range(3))
        result, _ = flash_attention_2(module, q, k, v, None)
    assert result.dtype is torch.bfloat16
    assert result.shape == (BATCH, LENGTH, HEADS, HEAD_DIM)


# --- softmax, dropout, workspaces ----------------------------------------------------------------


def test_softmax_turns_half_scores_into_float_probabilities_at_once() -> None:
    """fp16 scores need no fp32 copy on CUDA; bf16 ones do. Backward holds a product beside the
    gradient that it returns."""
    with recording(CUDA_KERNELS) as made, cuda_behaviour((8, 0), repeats_key_value=False):
        scores = torch.empty((LENGTH, LENGTH), dtype=torch.float16, requires_grad=True)
        made.begin("forward")
        result = nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
        incoming = torch.empty_like(result)
        made.begin("backward")
        (gradient,) = torch.autograd.grad(result, scores, incoming)
        made.begin("bf16")
        rounded = torch.empty((LENGTH, LENGTH), dtype=torch.bfloat16)
        nn.functional.softmax(rounded, dim=-1, dtype=torch.float32)
    assert (result.dtype, gradient.dtype) == (torch.float32, torch.float16)
    square = (LENGTH, LENGTH)
    assert made.born("forward") == [(square, "float32"), (square, "float32")]
    assert made.born("backward") == [(square, "float32"), (square, "float16")]
    assert [dtype for _, dtype in made.born("bf16")] == ["bfloat16", "float32", "float32"]


def test_dropout_keeps_a_mask_of_one_byte_a_value() -> None:
    with recording() as made, cuda_behaviour((8, 0), repeats_key_value=False):
        values = torch.empty((LENGTH, LENGTH), requires_grad=True)
        made.begin("forward")
        result = nn.functional.dropout(values, 0.1)
        made.begin("evaluation")
        same = nn.functional.dropout(values, 0.1, training=False)
        nothing = nn.functional.dropout(values, 0.0)
    square = (LENGTH, LENGTH)
    assert sorted(made.born("forward")) == [(square, "bool"), (square, "float32")]
    assert result.shape == values.shape
    assert same is values and nothing is values
    assert made.born("evaluation") == []


def test_what_cuda_does_is_undone() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = set(ALL_ATTENTION_FUNCTIONS)
    before = (nn.functional.scaled_dot_product_attention, nn.functional.softmax)
    with cuda_behaviour((8, 0), repeats_key_value=False):
        assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"].func is flash_attention_2
        assert nn.functional.scaled_dot_product_attention is not before[0]
    assert (nn.functional.scaled_dot_product_attention, nn.functional.softmax) == before
    assert set(ALL_ATTENTION_FUNCTIONS) == known
    assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"] is not flash_attention_2


@pytest.mark.parametrize("operation", ["exp", "rsqrt", "softplus", "cumsum"])
def test_autocast_runs_in_float_what_it_does_on_cuda(operation: str) -> None:
    with FakeTensorMode(), cuda_behaviour((8, 0), repeats_key_value=False):
        values = torch.empty(8, dtype=torch.bfloat16)
        function = getattr(torch, operation, None) or getattr(nn.functional, operation)
        further = (0,) if operation == "cumsum" else ()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert function(values, *further).dtype is torch.float32
        assert function(values, *further).dtype is torch.bfloat16


def test_cublas_takes_more_from_hopper_on() -> None:
    assert cublas_workspace_bytes((8, 9)) == 8_519_680
    assert cublas_workspace_bytes((9, 0)) == 33_554_432


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "width", "chunks"),
    [
        # Chunks hold tokens / (vocabulary / width), up to a power of two.
        (256, 512, 64, [32] * 8),
        (254, 500, 64, [32] * 7 + [30]),
        (300, 512, 64, [64] * 4 + [44]),
        (90, 128, 64, [64, 26]),
        (100, 50, 64, [100]),
        (7, 640, 64, [1] * 7),
    ],
)
@pytest.mark.parametrize("head_is_trained", [False, True])
def test_liger_projects_a_chunk_of_tokens_at_a_time(
    tokens: int, vocabulary: int, width: int, chunks: list[int], head_is_trained: bool
) -> None:
    """What it keeps for backward is the gradients, of the hidden states and of a trained head."""
    with recording() as made:
        hidden = torch.empty((tokens, width), dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(
            (vocabulary, width), dtype=torch.bfloat16, requires_grad=head_is_trained
        )
        labels = torch.empty(tokens, dtype=torch.int64)
        made.begin("forward")
        loss = LigerLoss.apply(hidden, weight, labels)
        kept = num_bytes(loss.grad_fn.saved_tensors)
        inputs = (hidden, weight) if head_is_trained else (hidden,)
        gradients = torch.autograd.grad(loss, inputs)
    logits = [shape for shape, _ in made.born("forward") if shape[1:] == (vocabulary,)]
    assert [shape[0] for shape in logits] == chunks
    assert kept == 2 * width * (tokens + vocabulary * head_is_trained)
    assert [g.shape for g in gradients] == [t.shape for t in inputs]


def test_logits_were_shifted_before_transformers_4_50() -> None:
    assert Stack(transformers_version=(4, 49)).shifts_logits
    assert not Stack(transformers_version=(4, 50)).shifts_logits
    assert not Stack().shifts_logits


@pytest.mark.parametrize("version", [(4, 45), (4, 47)])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["fp32 loss", "16-bit loss"])
def test_losses_of_former_releases_take_what_the_closed_form_says(
    config: dict[str, Any], version: tuple[int, ...]
) -> None:
    wide = {**config, "vocab_size": 4000}
    settings = {"method": "full", "trainer": "loop", "loss": "stock", "mixed_precision": "no"}
    dry_case = cuda_case(wide, 2, **settings, transformers_version=version)
    peaks = dry_run(dry_case).record.phase_peaks()
    model, stack = spec_from_config(wide, "wide"), Stack(transformers_version=version)
    closed = {p.name: p for p in estimate_memory(model, dry_case.plan, stack=stack).phases}
    highest = max(closed["loss"].allocated_peak_bytes, closed["backward"].allocated_peak_bytes)
    assert highest == pytest.approx(peaks["backward"].allocated_bytes, rel=0.003)


def test_shifting_logits_copies_them() -> None:
    """In bf16: logits in fp32, a copy of all but the last of each row, and log-probabilities."""
    vocabulary = 300
    with recording() as made:
        logits = torch.empty((BATCH, LENGTH, vocabulary), dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty((BATCH, LENGTH), dtype=torch.int64)
        made.begin("forward")
        shifted_logits_loss(logits, labels, vocabulary)
    large = [shape for shape, dtype in made.born("forward") if shape[-1:] == (vocabulary,)]
    assert large == [
        (BATCH, LENGTH, vocabulary),
        (BATCH, LENGTH - 1, vocabulary),
        (BATCH * (LENGTH - 1), vocabulary),
    ]


# --- fused kernels -------------------------------------------------------------------------------


def test_a_fused_norm_keeps_its_input_and_a_number_a_row() -> None:
    with recording() as made:
        hidden = torch.empty((BATCH, LENGTH, 64), dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(64, dtype=torch.bfloat16, requires_grad=True)
        incoming = torch.empty_like(hidden)
        made.begin("forward")
        result = FusedNorm.apply(hidden, weight)
        kept = [tensor.shape for tensor in result.grad_fn.saved_tensors]
        made.begin("backward")
        to_hidden, to_weight = torch.autograd.grad(
            result, (hidden, weight), incoming, allow_unused=True
        )
    assert kept == [hidden.shape, weight.shape, (BATCH, LENGTH)]
    assert made.born("forward") == [
        ((BATCH, LENGTH), "float32"),
        ((BATCH, LENGTH, 64), "bfloat16"),
    ]
    assert made.born("backward") == [] and to_weight is None
    assert to_hidden.untyped_storage()._cdata == incoming.untyped_storage()._cdata


def test_fused_dropout_keeps_what_it_got_and_gave_but_no_mask() -> None:
    with recording() as made:
        inputs = torch.empty((TOKENS, 64), dtype=torch.bfloat16, requires_grad=True)
        made.begin("forward")
        left = FusedDropout.apply(inputs, 0.1)
        made.begin("backward")
    record = made.record
    alive = record.alive_at(len(record.events) - 1)
    assert [record.storages[index].dtype for index in alive] == ["bfloat16", "bfloat16"]
    assert num_bytes(left.grad_fn.saved_tensors) == 2 * 2 * TOKENS * 64


def test_fused_kernels_leave_no_fp32_hidden_states_and_train_no_norms() -> None:
    def record(**settings: Any) -> MemoryRecord:
        return dry_run(cuda_case(LLAMA, 2, method="full", dtype="bfloat16", **settings)).record

    def fp32_hidden(record: MemoryRecord) -> bool:
        return any(
            s.dtype == "float32" and s.shape == hidden and "norm" in s.module
            for s in record.storages
        )

    def norm_states(record: MemoryRecord) -> bool:
        return any(
            s.component == "optimizer_states" and "norm" in s.module for s in record.storages
        )

    hidden = (2, 64, LLAMA["hidden_size"])
    own, fused = record(), record(fused_kernels=True)
    assert fp32_hidden(own) and not fp32_hidden(fused)
    assert norm_states(own) and not norm_states(fused)
    assert fused.peak.allocated_bytes < own.peak.allocated_bytes


# --- quantized weights ---------------------------------------------------------------------------

SHAPES = [(256, 512), (96, 64), (64, 130)]
CODE_BYTES = 16 * 4


def meta_linear_4bit(shape: tuple[int, int], kind: str, double_quant: bool) -> Any:
    """A layer as the quantizer leaves it before weights are loaded."""
    from bitsandbytes.nn import Linear4bit

    rows, columns = shape
    with torch.device("meta"):
        return Linear4bit(
            columns,
            rows,
            bias=False,
            quant_type=kind,
            compress_statistics=double_quant,
            compute_dtype=torch.bfloat16,
        )


def fake_4bit(shape: tuple[int, int], kind: str, double_quant: bool) -> list[torch.Tensor]:
    """The storages that the dry run gives a quantized layer."""
    layer = meta_linear_4bit(shape, kind, double_quant)
    quantize_blank(layer, torch.bfloat16)
    make_fake(layer, FakeTensorMode())
    return [layer.weight, *quantization_tensors(layer)]


def real_4bit(shape: tuple[int, int], kind: str, double_quant: bool) -> list[torch.Tensor]:
    """The storages of the same layer after bitsandbytes has quantized it on the processor."""
    from bitsandbytes.nn import Linear4bit

    rows, columns = shape
    layer = Linear4bit(columns, rows, bias=False, quant_type=kind, compress_statistics=double_quant)
    layer.to("cpu")
    found, state = [layer.weight.data], layer.weight.quant_state
    while state is not None:
        found += [t for t in (state.absmax, state.code, state.offset) if t is not None]
        state = state.state2
    return found


def described(tensors: Sequence[torch.Tensor]) -> list[tuple[tuple[int, ...], str, int]]:
    return sorted((tuple(t.shape), str(t.dtype), t.untyped_storage().nbytes()) for t in tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_fake_4_bit_layer_has_the_storages_of_a_real_one(
    shape: tuple[int, int], double_quant: bool, kind: str
) -> None:
    real = real_4bit(shape, kind, double_quant)
    assert described(fake_4bit(shape, kind, double_quant)) == described(real)


@pytest.mark.parametrize(
    ("double_quant", "bytes_per_weight", "tables"),
    [
        # arXiv 2305.14314, section 3: 4 bits, and a scale of 32 bits for each 64 weights; or of 8
        # bits, with one of 32 bits for each 256 scales.
        (False, 0.5 + 4 / 64, CODE_BYTES),
        (True, 0.5 + 1 / 64 + 4 / (64 * 256), CODE_BYTES + 256 * 4 + 4),
    ],
)
def test_4_bit_bytes_are_the_papers(
    double_quant: bool, bytes_per_weight: float, tables: int
) -> None:
    taken = num_bytes(fake_4bit((256, 512), "nf4", double_quant))
    assert taken == 256 * 512 * bytes_per_weight + tables


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fake_8_bit_layer_has_the_storages_of_a_real_one(shape: tuple[int, int]) -> None:
    """A byte a weight and a scale of fp32 a row."""
    from bitsandbytes.nn import Linear8bitLt

    rows, columns = shape
    with torch.device("meta"):
        layer = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0)
    quantize_blank(layer, torch.float16)
    make_fake(layer, FakeTensorMode())
    fake = [layer.weight, *quantization_tensors(layer)]
    real = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0)
    real.to("cpu")
    assert described(fake) == described([real.weight.data, real.weight.SCB])
    assert num_bytes(fake) == rows * columns + 4 * rows


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_4_bit_product_dequantizes_the_whole_weight(double_quant: bool) -> None:
    """Of a weight whose scales are quantized themselves, the scales in fp32 too. Nothing of it is
    kept: backward does so again."""
    rows, columns = 256, 512
    layer = meta_linear_4bit((rows, columns), "nf4", double_quant)
    quantize_blank(layer, torch.bfloat16)
    with recording(quantized_kernels("nf4")) as made:
        make_fake(layer, made.fake_mode)
        inputs = torch.empty((TOKENS, columns), dtype=torch.bfloat16, requires_grad=True)
        made.begin("forward")
        result = layer(inputs)
        incoming = torch.empty_like(result)
        made.begin("backward")
        (gradient,) = torch.autograd.grad(result, inputs, incoming)
    assert gradient.shape == inputs.shape
    dense, scales = 2 * rows * columns, 4 * rows * columns // 64 * double_quant
    assert made.rise("forward") == dense + scales + 2 * TOKENS * rows
    assert made.rise("backward") == dense + max(scales, 2 * TOKENS * columns)


def test_an_8_bit_product_is_that_of_a_gpu() -> None:
    """Inputs in int8 with a scale a row, the product in int32, then in fp16. bitsandbytes trains
    by another function on the processor, which would dequantize the weight in forward."""
    from bitsandbytes.nn import Linear8bitLt

    rows, columns = 256, 512
    with torch.device("meta"):
        layer = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0)
    kernels = quantized_kernels("int8")
    quantize_blank(layer, torch.float16)
    with recording(kernels) as made, mock.patch("bitsandbytes.matmul", int8_matmul):
        make_fake(layer, made.fake_mode)
        inputs = torch.empty((TOKENS, columns), dtype=torch.float16, requires_grad=True)
        made.begin("forward")
        result = layer(inputs)
        incoming = torch.empty_like(result)
        made.begin("backward")
        (gradient,) = torch.autograd.grad(result, inputs, incoming)
    assert gradient.shape == inputs.shape
    codes = TOKENS * columns + 4 * TOKENS
    assert made.rise("forward") == codes + (4 + 2) * TOKENS * rows
    dense = 2 * rows * columns
    assert made.rise("backward") == dense + 2 * TOKENS * columns


def test_a_model_that_learns_positions_has_no_rotary_embeddings_to_fuse() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with fused_rotary_embeddings(model) as replaced:
        assert replaced is None
