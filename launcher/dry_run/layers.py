"""A shallow model that stands for the deep one: equal layers are traced a few times only."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

from peft import PeftConfig, PeftType
from torch import nn

from ftplan.launcher.training.build import decoder_layer_list
from ftplan.planner.repeat_layers import Selection, select_layers

# Attributes by which equal layers differ.
_PLACE = ("layer_idx", "layer_id", "layer_number")


# PEFT's methods whose adapters in one layer depend on the other layers: by shared numbers,
# prompts that reach into each layer by its place, or losses over all adapters.
_ACROSS_LAYERS = frozenset(
    (
        *(PeftType.ADALORA, PeftType.BEFT, PeftType.LILY, PeftType.SHADOW, PeftType.TINYLORA),
        *(PeftType.UNILORA, PeftType.VBLORA),
        *(PeftType.ADAPTION_PROMPT, PeftType.CARTRIDGE, PeftType.PREFIX_TUNING),
    )
)


def same_on_every_layer(peft_config: PeftConfig | None) -> bool:
    """Whether a method does to every layer what it does to its equals, and nothing besides.

    Lists of layers, and patterns that name one, do not.
    """
    if peft_config is None:
        return True
    if peft_config.peft_type in _ACROSS_LAYERS:
        return False
    for field in ("layers_to_transform", "layer_replication", "rank_pattern", "alpha_pattern"):
        if getattr(peft_config, field, None):
            return False
    names = [getattr(peft_config, field, None) for field in ("target_modules", "modules_to_save")]
    return not any(re.search(r"\.\d", str(name)) for name in names)


def meet_outside(config: Any, trainer: str) -> bool:
    """Whether something outside of the layers works on what each of them computed.

    The auxiliary loss of a mixture of experts takes every layer's router logits; TRL turns it on
    wherever the model has a coefficient for it.
    """
    text_config = config.get_text_config()
    if not hasattr(text_config, "output_router_logits"):
        return False
    coefficient = getattr(text_config, "router_aux_loss_coef", 0.0)
    return bool(text_config.output_router_logits or (trainer == "trl" and coefficient))


def keep_few_layers(
    model: nn.Module, reference: nn.Module | None = None, *, every_n_layers: int = 1
) -> Selection | None:
    """Take equal layers out of `model`, in place; which ones are left, and what repeats.

    A `reference` of the same architecture loses the same ones. So many layers at a time are left
    out that each n-th of the others, which is checkpointed, is the same one as before. None, and
    all stays whole, where the kinds of layers follow from their number.
    """
    models = [model] if reference is None else [model, reference]
    alike = zip(*map(_signatures, models), strict=True)
    selection = select_layers([(place % every_n_layers, *own) for place, own in enumerate(alike)])
    return selection if all(_cut(one, selection.kept) for one in models) else None


def _kinds(model: nn.Module) -> list[Any] | None:
    """What the configuration says of each layer, where it does."""
    config: Any = model.config
    kinds = getattr(config, "layer_types", None)
    _, layers = decoder_layer_list(model)
    return kinds if isinstance(kinds, list) and len(kinds) == len(layers) else None


def renumber(model: nn.Module) -> None:
    """Tell the layers that are left their places: a cache of keys and values goes by these."""
    for place, layer in enumerate(decoder_layer_list(model)[1]):
        for module in layer.modules():
            for name in _PLACE:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, place)


def _signatures(model: nn.Module) -> list[Hashable]:
    _, layers = decoder_layer_list(model)
    kinds = _kinds(model) or [None] * len(layers)
    shared: dict[int, int] = {}
    return [(kind, _signature(layer, shared)) for kind, layer in zip(kinds, layers, strict=True)]


def _cut(model: nn.Module, kept: tuple[int, ...]) -> bool:
    """Leave these layers only; False, and all of them, where it cannot be."""
    config: Any = model.config
    kinds = _kinds(model)
    if kinds is not None:
        try:
            config.layer_types = [kinds[place] for place in kept]
        except AttributeError:  # a property: Jamba, Bamba, Falcon-H1
            return False
    _, layers = decoder_layer_list(model)
    left = [layers[place] for place in kept]
    del layers[len(left) :]
    for place, layer in enumerate(left):
        layers[place] = layer
    if getattr(config, "num_hidden_layers", None) is not None:
        config.num_hidden_layers = len(left)
    return True


def _signature(layer: nn.Module, shared: dict[int, int]) -> Hashable:
    """All that a layer does follows from it: classes, settings, shapes, what is trained.

    A parameter that an earlier layer has too is known by its number.
    """
    parts: list[Hashable] = []
    own: set[int] = set()
    for name, module in layer.named_modules():
        parts.append((name, type(module).__name__, _settings(module)))
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                own.add(id(tensor))
                parts.append(
                    (key, tensor.shape, tensor.dtype, tensor.requires_grad, shared.get(id(tensor)))
                )
    for key in own:
        shared.setdefault(key, len(shared))
    return tuple(parts)


def _settings(module: nn.Module) -> Hashable:
    simple = (int, float, str, bool, type(None), tuple)
    return tuple(
        (name, value if not isinstance(value, tuple) else str(value))
        for name, value in sorted(vars(module).items())
        if isinstance(value, simple) and name not in _PLACE
    )
