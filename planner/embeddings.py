"""What stands before and behind a model's layers, on a tape."""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.modules import Numerics, linear_module, norm_module
from ftplan.planner.tape import Tape, Tensor, Weight, per_position, per_token


class Embeddings:
    """Token embeddings, learned positions, and what some families do before the first layer.

    `numerics`: with the names of what is trained outside of the layers. `width`: bytes a
    parameter. `input_learns`: the result needs a gradient though nothing before it is trained.
    `beside`: of the tokens' weight (`Weight`).
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
    ) -> None:
        self.model, self.input_learns = model, input_learns
        self.tokens = Weight(model.embedding_parameters, width, trained=trains, beside=beside)
        trains_positions = "wpe.weight" in numerics.trained
        self.positions = Weight(
            model.positions * model.hidden_size, width, trained=trains_positions
        )
        linears, norm = model.embedding_linears, model.embedding_norm
        self.project_in = linear_module(linears[0], numerics) if linears else None
        self.norm = norm_module(norm, numerics) if norm else None

    def __call__(self, tape: Tape, held: list[Tensor]) -> Tensor:
        """What the first layer reads. `held` gets what the model's forward pass holds on to."""
        model = self.model
        width = model.embedding_width or model.hidden_size
        embedded = f.look_up(tape, self.tokens, per_token(width))
        if model.scales_embeddings:
            embedded = f.scale(tape, embedded)
        if self.input_learns and not embedded.requires_grad:
            tape.leaf(embedded)
            if self._goes_on:
                tape.hold(embedded)  # by the node that collects its gradient
        if model.scales_inputs:
            embedded = f.scale(tape, embedded)
        if self.project_in is not None:
            embedded = self.project_in(tape, embedded)
        held.append(embedded)
        hidden = embedded
        del embedded
        if model.positions:
            form = per_token if model.counts_positions else per_position
            places = f.look_up(tape, self.positions, form(model.hidden_size))
            held.append(places)
            hidden = f.add(tape, hidden, places)
        if self.norm is not None:
            hidden = self.norm(tape, hidden)
        return f.dropout(tape, hidden, model.embedding_dropout)

    @property
    def _goes_on(self) -> bool:
        """The first layer reads something else than what the embeddings' module returns."""
        model = self.model
        further = (model.positions, model.scales_inputs, model.embedding_dropout)
        return bool(any(further) or self.project_in or self.norm)
