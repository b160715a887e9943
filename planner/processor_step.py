"""The optimizer's step on a processor, where torch's own work on one tensor after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from ftplan.planner.model_spec import ModelSpec, Parameter
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.step_settings import adapter_weight_bytes
from ftplan.planner.trained import Trained


def one_by_one_bytes(model: ModelSpec, plan: TrainingPlan, trained: Trained, copies: int) -> int:
    """Bytes of the largest tensor's `copies`, beside the last one of the tensor before it, which
    its name still holds (torch.optim, `_single_tensor_*`)."""
    sizes = [0, *_tensor_bytes(model, plan, trained)]
    return max((before + copies * size for before, size in pairwise(sizes)), default=0)


def _tensor_bytes(model: ModelSpec, plan: TrainingPlan, trained: Trained) -> Iterator[int]:
    """Of each trained matrix, in the order of the model: norms and biases, which have no weight
    decay, come behind and are small."""
    width = plan.weight_bytes
    layers = model.layers[model.num_hidden_layers - trained.trained_layers :]
    outer = model.outer_parameters if trained.trains_embeddings else ()
    heads = [p for p in outer if p.name.startswith("lm_head")]
    yield from _matrices((p for p in outer if p not in heads), width)
    for layer in layers:
        yield from _matrices(layer.parameters(), width)
    yield from _matrices(heads, width)
    for layer in model.layers if trained.adapted else ():
        for linear in layer.linears:
            if linear in trained.adapted:
                yield trained.rank * linear.in_features * adapter_weight_bytes(plan)
                yield trained.rank * linear.out_features * adapter_weight_bytes(plan)


def _matrices(parameters: Iterable[Parameter], width: int) -> Iterator[int]:
    for parameter in parameters:
        if len(parameter.shape) > 1:
            yield from [parameter.size * width] * parameter.count
