"""Bottleneck adapters: small networks behind attention and feed-forward of each layer.

Houlsby et al. 2019 (arXiv 1902.00751), section 2.1 and figure 2: down to `lora_rank` numbers a
token, GELU, up again, and a skip connection around it. PEFT has no such adapters.

    from ftplan.launcher.training import bottlenecks

    model = bottlenecks.load("runs/NAME/adapter")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ftplan.planner.errors import InputError

# Where a layer has its attention and its feed-forward: paths in the order they are looked for. Of
# BLOOM's, which add what skips them, the last linear module alone.
_PLACES = {
    "attention": ("self_attention.dense", "self_attn", "self_attention", "attn", "attention"),
    "feed-forward": ("mlp.dense_4h_to_h", "mlp", "feed_forward", "block_sparse_moe", "fc2"),
}

# The trained numbers have the name by which transformers' trainer finds a checkpoint's weights.
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "bottleneck_config.json"
_VERSION = 1

# "a zero-mean Gaussian with standard deviation 1e-2, truncated to two standard deviations"
# (section 3.6 of the paper): a network that hardly changes what passes through it.
_INITIAL_DEVIATION = 1e-2


class Bottleneck(nn.Module):
    """(..., hidden size) to the same, near the identity at first."""

    def __init__(
        self, hidden_size: int, rank: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, dtype=dtype, device=device)
        self.up = nn.Linear(rank, hidden_size, dtype=dtype, device=device)
        for linear in (self.down, self.up):
            limit = 2 * _INITIAL_DEVIATION
            nn.init.trunc_normal_(linear.weight, std=_INITIAL_DEVIATION, a=-limit, b=limit)
            nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.weight.dtype)
        return x + self.up(nn.functional.gelu(self.down(own))).to(x.dtype)


def insert_bottlenecks(model: Any, rank: int, *, quantized: bool) -> None:
    """Freeze `model` and put adapters in: in fp32, or in bf16 beside a `quantized` base, where TRL
    has adapters so.

    What `model` saves from now on are the adapters. Raises InputError for a model whose layers
    have no attention or feed-forward known by name.
    """
    model.requires_grad_(False)
    model._hf_peft_config_loaded = True  # transformers trains a quantized model with adapters only
    dtype = torch.bfloat16 if quantized else torch.float32
    width = model.config.get_text_config().hidden_size
    for module in _adapted_modules(model):
        device = next(module.parameters()).device
        module.bottleneck = Bottleneck(width, rank, dtype=dtype, device=device)
        module.register_forward_hook(_adapt)
    model.save_pretrained = partial(save, model)


def save(model: nn.Module, folder: str | Path, **_: Any) -> None:
    """The adapters of `model`, and what they belong to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value.contiguous() for name, value in _weights(model)}
    save_file(kept, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config: Any = model.config
    description = {
        "version": _VERSION,
        "base_model_name_or_path": config.name_or_path,
        "hidden_size": config.get_text_config().hidden_size,
        "rank": next(m.down.out_features for m in model.modules() if isinstance(m, Bottleneck)),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path, base: Any = None, **options: Any) -> Any:
    """The base model with the adapters that `save` wrote into `folder`, in evaluation mode.

    `base`: the model they were trained beside, where it is loaded already; else
    AutoModelForCausalLM loads it, with `options`. Raises InputError for a folder that has no such
    adapters, or those of another model.
    """
    folder = Path(folder)
    description = _described(folder)
    if base is None:
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(
            description["base_model_name_or_path"], **options
        )
    quantized = getattr(base, "hf_quantizer", None) is not None
    insert_bottlenecks(base, description["rank"], quantized=quantized)
    saved = load_file(folder / WEIGHTS_FILE)
    own = dict(_weights(base))
    if {name: value.shape for name, value in saved.items()} != {
        name: value.shape for name, value in own.items()
    }:
        raise InputError(
            f"the adapters in `{folder}` are of another model",
            f"load them beside `{description['base_model_name_or_path']}`",
        )
    with torch.no_grad():
        for name, value in saved.items():
            own[name].copy_(value)
    return base.eval()


def _described(folder: Path) -> Mapping[str, Any]:
    try:
        description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if description["version"] == _VERSION and {"rank", "base_model_name_or_path"} <= set(
            description
        ):
            return dict(description)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"`{folder}` has no bottleneck adapters of version {_VERSION}",
        f"they are {WEIGHTS_FILE} and {CONFIG_FILE}, in the `adapter` folder of a run",
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in model.named_modules():
        if isinstance(module, Bottleneck):
            for name, parameter in module.named_parameters():
                yield f"{path}.{name}", parameter.data


def _adapted_modules(model: Any) -> Iterator[nn.Module]:
    """Whose results are adapted, before they are added to what skips them."""
    from ftplan.launcher.training.build import decoder_layers

    for layer in decoder_layers(model):
        modules = dict(layer.named_modules())
        for kind, paths in _PLACES.items():
            found = next((modules[path] for path in paths if path in modules), None)
            if found is None:
                raise InputError(
                    f"method `bottleneck` finds no {kind} in layers of class "
                    f"`{type(layer).__name__}`",
                    "use `--method lora`",
                )
            yield found


def _adapt(module: Any, arguments: Any, result: Any) -> Any:
    if isinstance(result, tuple):
        return module.bottleneck(result[0]), *result[1:]
    return module.bottleneck(result)
