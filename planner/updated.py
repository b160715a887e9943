"""What an optimizer is given: the trained parameters, and of which kind each is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import structs

from ftplan.planner.model_spec import ModelSpec, Parameter
from ftplan.planner.muon import is_hidden_matrix
from ftplan.planner.optimizer_steps import Updated
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.step_settings import trained_widths
from ftplan.planner.trained import LM_HEAD, Tally, Trained, embedding_name

Kind = Literal["embedding", "linear", "other"]


def updated_parameters(model: ModelSpec, plan: TrainingPlan, trained: Trained) -> list[Updated]:
    """The trained parameters, equal ones together. Text gives a vision tower's no gradients."""
    kinds = _Kinds(model, plan)
    own = Tally()
    own.add(trained.own)
    there = {(p.name, p.shape) for p in trained.own}
    own.add((p for p in model.parameters_beside if (p.name, p.shape) in there), -1)
    used = structs.replace(trained, own=tuple(p for p in own.parameters() if p.count > 0))
    return [
        Updated(
            shape=p.shape,
            width=width,
            count=p.count,
            kind=kinds.of(p),
            is_hidden_matrix=kinds.of(p) != "embedding" and is_hidden_matrix(p.name, p.shape),
            is_lora_b=p.name.endswith("lora_B.weight"),
        )
        for parameters, width in trained_widths(plan, used)
        for p in parameters
    ]


def frozen_parameters(model: ModelSpec, plan: TrainingPlan, trained: Trained) -> list[Updated]:
    """The model's own parameters that are not trained, as they are held: bitsandbytes packs the
    numbers of 4 bits into one column of bytes."""
    tally = Tally()
    for layer, times in model.layer_counts.items():
        tally.add(layer.parameters(), times)
    tally.add(model.outer_parameters)
    tally.add(trained.own, -1)
    packed = {
        f"{linear.name}.weight"
        for layer in model.layer_counts
        for linear in layer.linears
        if linear.quantizable and plan.quantization in ("nf4", "fp4")
    }
    return [
        Updated(
            shape=(-(-p.size // 2), 1) if p.name in packed else p.shape,
            width=plan.weight_bytes,
            count=p.count,
        )
        for p in tally.parameters()
        if p.count
    ]


class _Kinds:
    """Tells modules of torch by the parameters' names."""

    def __init__(self, model: ModelSpec, plan: TrainingPlan) -> None:
        # What transformers' trainer tells optimizers of embeddings, a loop of one's own does not.
        embeddings = {"embed_tokens", "wpe", embedding_name(model)}
        self.embeddings = _weights(embeddings if plan.trainer != "loop" else ())
        self.linear = _weights({LM_HEAD, *(x.name for x in model.linears if not x.transposed)})

    def of(self, parameter: Parameter) -> Kind:
        name = parameter.name
        if name in self.embeddings:
            return "embedding"
        added = name.endswith(("lora_A.weight", "lora_B.weight"))
        return "linear" if added or name in self.linear else "other"


def _weights(modules: Iterable[str]) -> frozenset[str]:
    """Their weights' names, and those of copies that `modules_to_save` makes."""
    return frozenset(
        f"{name}{copy}.weight" for name in modules for copy in ("", ".modules_to_save")
    )
