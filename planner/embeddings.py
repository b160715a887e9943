"""What stands before and behind a model's layers, on a tape."""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.called import Called
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.modules import Module, Numerics, linear_module, norm_module
from ftplan.planner.prompts import PromptMaker
from ftplan.planner.tape import (
    ZERO,
    Tape,
    Tensor,
    Weight,
    add_forms,
    per_position,
    per_row,
    per_token,
)

# Of tokens and positions: they are counted with what the model is given.
NUMBERS = Tensor(None, ZERO, 8)


class Embeddings:
    """Token embeddings, learned positions, and what some families do before the first layer.

    `numerics`: with the names of what is trained outside of the layers. `width`: bytes a
    parameter. `input_learns`: a hook asks for a gradient of what the embeddings' module returns.
    `beside`: of the tokens' weight (`Weight`). `prompts` makes embeddings of `tokens_in_front`
    learned tokens, which rows are counted with; `num_trained_tokens`: tokens whose embeddings are
    trained beside the others.
    """

    def __init__(
        self,
        model: ModelSpec,
        numerics: Numerics,
        width: int,
        *,
        trains: bool,
        input_learns: bool,
        beside: int = 0,
        prompts: PromptMaker | None = None,
        tokens_in_front: int = 0,
        num_trained_tokens: int = 0,
    ) -> None:
        self.model, self.input_learns = model, input_learns
        self.prompts, self.tokens_in_front = prompts, tokens_in_front
        self.wide = model.embedding_width or model.hidden_size
        self.delta = Weight(num_trained_tokens * self.wide, f.FLOAT32, trained=True)
        # Of rows that several GPUs divide each has a gradient of all.
        rows = model.vocabulary_parts * model.embedding_parameters
        self.tokens = Weight(rows, width, trained=trains, beside=beside)
        trains_positions = "wpe.weight" in numerics.trained
        self.positions = Weight(
            model.positions * model.hidden_size, width, trained=trains_positions
        )
        self.gathers = numerics.gathers
        linears, norm = model.embedding_linears, model.embedding_norm
        self.project_in = linear_module(linears[0], numerics) if linears else None
        self.norm = norm_module(norm, numerics) if norm else None

    def __call__(self, tape: Tape, held: list[Tensor]) -> Tensor:
        """What the first layer reads. `held` gets what the model's forward pass holds on to."""
        model = self.model
        embedded = self._called(self._embedded, "embed_tokens")(tape, NUMBERS)
        embedded = self._behind_prompts(tape, embedded)
        if model.scales_inputs:
            embedded = f.scale(tape, embedded)
        if self.project_in is not None:
            embedded = self.project_in(tape, embedded)
        held.append(embedded)
        hidden = embedded
        del embedded
        if model.positions:
            places = self._called(self._placed, "wpe")(tape, NUMBERS)
            held.append(places)
            hidden = f.add(tape, hidden, places)
        if self.norm is not None:
            hidden = self.norm(tape, hidden)
        return f.dropout(tape, hidden, model.embedding_dropout)

    def _called(self, module: Module, name: str) -> Module:
        if not self.gathers:
            return module
        own = [p for p in self.model.outer_parameters if p.name == f"{name}.weight"]
        return Called(module, own, name=name)

    def _embedded(self, tape: Tape, numbers: Tensor) -> Tensor:
        embedded = self._looked_up(tape)
        if self.model.scales_embeddings:
            embedded = f.scale(tape, embedded)
        if self.input_learns and not embedded.requires_grad:
            tape.leaf(embedded)
            tape.hold(embedded)  # by the node that collects its gradient
        return embedded

    def _placed(self, tape: Tape, numbers: Tensor) -> Tensor:
        form = per_token if self.model.counts_positions else per_position
        return f.look_up(tape, self.positions, form(self.model.hidden_size))

    def _looked_up(self, tape: Tape) -> Tensor:
        """The row's own tokens. Where some are trained, all embeddings are copied for it
        (PEFT's `TrainableTokensLayer`)."""
        elements = add_forms(per_token(self.wide), per_row(-self.tokens_in_front * self.wide))
        if self.model.vocabulary_parts > 1:
            return f.clone(tape, f.look_up(tape, self.tokens, elements))  # summed over the GPUs
        if not self.delta.elements[0]:
            return f.look_up(tape, self.tokens, elements)
        merged = f.merge_rows(tape, self.tokens, f.cast(tape, self.delta, self.tokens.width))
        return f.look_up(tape, merged, elements)

    def _behind_prompts(self, tape: Tape, embedded: Tensor) -> Tensor:
        if self.prompts is None:
            return embedded
        parts = [f.cast(tape, self.prompts(tape), embedded.width), embedded]
        del embedded
        return f.join(tape, parts)
