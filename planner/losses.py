"""The output projection and the loss on a tape: stock, Liger's and TRL's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from msgspec import Struct

from ftplan.planner import functions as f
from ftplan.planner.exchange import Call
from ftplan.planner.tape import (
    Form,
    Tape,
    Tensor,
    Weight,
    constant,
    per_row,
    per_token,
    subtract_forms,
    times,
)

FLOAT32 = f.FLOAT32

# TRL's fused loss works on tiles of so many tokens and vocabulary entries
# (trl.kernels.chunked_logprob, trl.trainer.utils in TRL 1.16).
TILE_TOKENS = 4096
TILE_VOCABULARY = 32768
# Without Triton a tile is folded by a chain of torch operations. Alive at once beside the buffer,
# in fp32: scaled logits, their difference from the maximum and its exponential in forward, and a
# bool array where it is asked whether the target comes first; scaled logits twice,
# log-probabilities, probabilities, gradient, the one-hot difference and its product, and a bool
# array, in backward, and a softcap's tanh.
_TILE_FORWARD_BYTES = 3 * FLOAT32
_TILE_TOP1_BYTES = 1
_TILE_BACKWARD_BYTES = 7 * FLOAT32 + 1


class LossShape(Struct, frozen=True, kw_only=True):
    """How the loss divides a micro-batch. `tile_is_full`: at least TILE_TOKENS positions predict.
    `chunk_tokens`: tokens that Liger projects at a time. `several`: more positions predict than are
    projected at a time. `of_each_row`: how many predict, where it is not all but the last."""

    tile_is_full: bool = False
    chunk_tokens: int = 0
    several: bool = False
    of_each_row: int | None = None

    @property
    def predicting(self) -> Form:
        return PREDICTING if self.of_each_row is None else per_row(self.of_each_row)

    @staticmethod
    def of(
        loss: str,
        rows: int,
        length: int,
        vocab_size: int,
        hidden_size: int,
        of_each_row: int | None = None,
    ) -> LossShape:
        predicting = rows * (length - 1 if of_each_row is None else of_each_row)
        if loss == "liger":
            chunks = -(-vocab_size // hidden_size)
            chunk = 1 << (-(-predicting // chunks) - 1).bit_length() if predicting else 0
            return LossShape(chunk_tokens=min(chunk, predicting), several=predicting > chunk)
        if loss != "trl-fused":
            return LossShape()
        return LossShape(
            tile_is_full=predicting >= TILE_TOKENS,
            several=predicting > TILE_TOKENS,
            of_each_row=of_each_row,
        )


class Head(Struct, frozen=True, kw_only=True):
    """The output projection's shape and what is done to its logits. `parts`: GPUs that divide its
    rows."""

    vocab_size: int
    hidden_size: int
    softcapped: bool = False
    scaled: bool = False
    parts: int = 1


PREDICTING: Form = subtract_forms(per_token(1), per_row(1))  # a row's last token predicts nothing


class StockLoss:
    """Logits, and cross-entropy of an fp32 copy (transformers' ForCausalLMLoss)."""

    def __init__(
        self,
        head: Head,
        weight: Weight,
        bias: Weight | None,
        delta: Weight | None = None,
        *,
        shifts_logits: bool,
        lets_logits_go: bool = False,
        in_16_bits: bool = False,
        in_place: bool = False,
        watch: Callable[[Tape, Tensor], Tensor],
        called: Callable[[Call], Call],
    ) -> None:
        """`delta`: rows that are trained in the place of the weight's. `lets_logits_go`: the fp32
        logits take the name of the 16-bit ones; `in_16_bits`: there are none. `in_place`: the
        cross-entropy writes its gradient over the logits (Unsloth's, in fms-acceleration). `watch`
        gets the output projection's result, and returns it; `called` gets the projection itself.
        """
        self.head, self.watch = head, watch
        self.project = called(partial(_project, head=head, weight=weight, bias=bias, delta=delta))
        self.shifts_logits = shifts_logits
        self.lets_logits_go, self.in_16_bits = lets_logits_go, in_16_bits
        self.in_place = in_place

    def __call__(self, tape: Tape, hidden: Tensor, held: list[Tensor]) -> Tensor:
        """The loss. `held` gets the logits as the model returns them."""
        logits = self.logits(tape, hidden)
        if self.lets_logits_go and not self.in_16_bits:
            logits = f.cast(tape, logits, FLOAT32)
        loss = self._cross_entropy(tape, logits)
        held.append(logits)
        return loss

    def logits(self, tape: Tape, hidden: Tensor) -> Tensor:
        """As the model gives them."""
        head = self.head
        logits = self.watch(tape, self.project(tape, hidden))
        if head.scaled:
            logits = f.scale(tape, logits)
        if head.softcapped:
            logits = f.scale(tape, logits)
            logits = f.tanh(tape, logits)
            logits = f.scale(tape, logits)
        return logits

    def _cross_entropy(self, tape: Tape, logits: Tensor) -> Tensor:
        if not self.in_16_bits:
            logits = f.cast(tape, logits, FLOAT32)
        cross_entropy = f.cross_entropy_in_place if self.in_place else f.cross_entropy
        if not self.shifts_logits:
            return cross_entropy(tape, logits)
        shifted = f.part_copied(tape, logits, times(PREDICTING, self.head.vocab_size))
        return cross_entropy(tape, shifted)


def _project(
    tape: Tape,
    hidden: Tensor,
    *,
    head: Head,
    weight: Weight,
    bias: Weight | None,
    delta: Weight | None = None,
) -> Tensor:
    """The logits: a torch.nn.Linear, whose rows several GPUs may divide."""
    parts = head.parts
    if parts > 1:
        hidden = f.sum_gradient_over_gpus(tape, hidden)
    hidden = f.to_product(tape, hidden)
    matrix = (
        tape.cast_weight(weight, is_view=parts > 1 and not tape.grad_enabled)
        if delta is None
        else f.to_product(tape, _merged(tape, weight, delta))
    )
    added = None if bias is None else tape.cast_weight(bias)
    rows = head.vocab_size // parts
    logits = f.product(tape, hidden, matrix, head.hidden_size, rows, added)
    del hidden
    return f.gather_columns(tape, logits, parts) if parts > 1 else logits


def _merged(tape: Tape, weight: Weight, delta: Weight) -> Tensor:
    """A copy of the weight with the trained rows in it (PEFT's `TrainableTokensLayer`)."""
    return f.merge_rows(tape, weight, f.cast(tape, delta, weight.width))


class TrlFusedLoss:
    """TRL's `ChunkedLogProbFunction`: log-probabilities tile by tile, gradients in fp32.

    `delta`: rows that are trained in the place of the weight's. `finds_top1`: it also tells whether
    the target is the most probable token.
    """

    def __init__(
        self,
        head: Head,
        weight: Weight,
        shape: LossShape,
        delta: Weight | None = None,
        *,
        finds_top1: bool,
    ) -> None:
        self.head, self.weight, self.shape, self.delta = head, weight, shape, delta
        self.forward_bytes = _TILE_FORWARD_BYTES + finds_top1 * _TILE_TOP1_BYTES

    def __call__(self, tape: Tape, hidden: Tensor, held: list[Tensor]) -> Tensor:
        head, shape = self.head, self.shape
        predicting = f.part_copied(tape, hidden, times(shape.predicting, head.hidden_size))
        del hidden
        weight: Tensor = self.weight
        if head.parts > 1:
            weight = f.gather_rows(tape, self.weight, head.parts)
        if self.delta is not None:
            weight = _merged(tape, self.weight, self.delta)
        compute = tape.autocast or predicting.width
        tape.count(times(shape.predicting, 2 * head.hidden_size * head.vocab_size), compute)
        held = self._fold(tape, shape, predicting.width, compute, self.forward_bytes)
        self._copied_weight(tape, compute, [min(head.vocab_size, TILE_VOCABULARY)])
        del held
        loss = tape.empty(shape.predicting, FLOAT32)
        if not tape.differentiates(predicting, weight):
            return loss
        saved = tape.save(predicting, weight, tape.empty(shape.predicting, FLOAT32))
        size, weight_width = (predicting.elements, predicting.width), weight.width
        weight_size = (weight.elements, weight_width) if weight.requires_grad else None
        fold, copied, tiles = self._fold, self._copied_weight, self._tiles()
        backward_bytes = _TILE_BACKWARD_BYTES + head.softcapped * FLOAT32

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            flops = times(shape.predicting, 2 * head.hidden_size * head.vocab_size)
            tape.count(times(flops, 3 if weight_size else 2), compute)
            of_hidden = tape.empty(size[0], FLOAT32)
            of_weight = tape.empty(weight_size[0], FLOAT32) if weight_size else None
            tile = fold(tape, shape, size[1], compute, backward_bytes)
            tile += copied(tape, compute, tiles)
            grads: f.Gradients = [f.cast(tape, of_hidden, size[1])]
            grads.append(f.cast(tape, of_weight, weight_width) if of_weight else None)
            del tile
            return grads

        tape.attach([loss], [predicting, weight], saved, backward)
        return loss

    def _fold(
        self, tape: Tape, shape: LossShape, width: int, compute: int, torch_bytes: int
    ) -> list[Tensor]:
        """The buffer for a tile of logits, as wide as a tile may be, and the copy of hidden states
        that its product reads, which live until the function returns; without Triton also what
        torch's operations make."""
        tokens = constant(TILE_TOKENS) if shape.tile_is_full else shape.predicting
        head, entries = self.head, min(self.head.vocab_size, TILE_VOCABULARY)
        held = [tape.empty(times(tokens, TILE_VOCABULARY), compute)]
        if compute != width:
            held.append(tape.empty(times(tokens, head.hidden_size), compute))
        if not tape.on_cuda:
            tape.empty(times(tokens, entries), torch_bytes)
        return held

    def _tiles(self) -> list[int]:
        """Entries of the vocabulary in the first tile, the one after it if any, and the last."""
        vocab_size = self.head.vocab_size
        first = min(vocab_size, TILE_VOCABULARY)
        second = min(vocab_size - first, TILE_VOCABULARY) or first * self.shape.several
        last = vocab_size % TILE_VOCABULARY or TILE_VOCABULARY
        return [first, second, last] if second else [first]

    def _copied_weight(self, tape: Tape, compute: int, tiles: list[int]) -> list[Tensor]:
        """Copies of the weight for a product, of so many entries each. The name of one holds it
        until the next is there; the last stays."""
        if compute == self.weight.width:
            return []
        width, copies = self.head.hidden_size, list[Tensor]()
        for entries in tiles:
            del copies[:-1]
            copies.append(tape.empty(constant(entries * width), compute, "autocast_copies"))
        return copies[-1:]


class Score:
    """A reward model's head: one number for each token, of which each row's last is its score. What
    follows works on a number a row."""

    def __init__(self, hidden_size: int, weight: Weight) -> None:
        self.hidden_size, self.weight = hidden_size, weight

    def __call__(self, tape: Tape, hidden: Tensor, held: list[Tensor]) -> Tensor:
        hidden = f.to_product(tape, hidden)
        weight = tape.cast_weight(self.weight)
        scores = f.product(tape, hidden, weight, self.hidden_size, 1)
        return f.part_copied(tape, scores, per_row(1))


class LigerLoss:
    """Liger's fused linear cross-entropy: both gradients are computed in forward, a chunk of tokens
    at a time (liger_kernel.ops.fused_linear_cross_entropy)."""

    def __init__(self, head: Head, weight: Weight, shape: LossShape) -> None:
        self.head, self.weight, self.shape = head, weight, shape

    def __call__(self, tape: Tape, hidden: Tensor, held: list[Tensor]) -> Tensor:
        shifted = f.part_copied(tape, hidden, times(PREDICTING, self.head.hidden_size))
        del hidden
        shifted = f.to_product(tape, shifted)
        weight, head = self.weight, self.head
        of_hidden = tape.like(shifted)
        of_weight = tape.like(weight) if tape.differentiates(weight) else None
        chunk = constant(self.shape.chunk_tokens)
        flops = times(PREDICTING, (6 if of_weight else 4) * head.hidden_size * head.vocab_size)
        tape.count(flops, shifted.width)
        self._work(tape, chunk, shifted.width)
        loss = tape.empty(PREDICTING, FLOAT32)
        if tape.differentiates(shifted, weight):
            saved = tape.save(of_hidden, *([of_weight] if of_weight else []))

            def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
                return [saved[0], saved[1] if len(saved) > 1 else None]

            tape.attach([loss], [shifted, weight], saved, backward)
        return loss

    def _work(self, tape: Tape, chunk: Form, width: int) -> None:
        """Chunks of logits, each with its part of the gradients. The name of one chunk holds it
        until the next is there."""
        size = times(chunk, self.head.vocab_size)
        logits = self._project(tape, size, width)
        matrix = tape.cast_weight(self.weight)
        hidden = tape.empty(times(chunk, self.head.hidden_size), width)
        del matrix, hidden
        if tape.differentiates(self.weight):
            copies = tape.empty(size, width)
            del copies
        if self.shape.several:
            self._project(tape, size, width)
        del logits

    def _project(self, tape: Tape, size: Form, width: int) -> Tensor:
        """Logits, by the weight transposed."""
        matrix = tape.cast_weight(self.weight, is_view=True)
        logits = tape.empty(size, width)
        del matrix
        return logits
