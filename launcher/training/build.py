"""Model and method, built once, for training and dry run alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.quantizers import AutoHfQuantizer

from ftplan.launcher import remote_code
from ftplan.launcher.training.adapters import peft_config_of
from ftplan.launcher.training.bottlenecks import insert_bottlenecks
from ftplan.launcher.training.model_classes import MODEL_CLASSES, check_model_class
from ftplan.launcher.training.tensor_parallel import loading_arguments
from ftplan.launcher.training.zero import num_elements
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.families import spec_from_config
from ftplan.planner.methods import resolve_method

Settings = Mapping[str, Any]


def load_model(model: str, settings: Settings, device_type: str) -> PreTrainedModel:
    """The base model with its weights, on the device it trains on. Raises InputError for one that
    needs code of its own."""
    trust = remote_code.trusted(model)
    with remote_code.refused(model):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, settings["dtype"]),
        "attn_implementation": settings["attn_implementation"],
        **switched_on(config.to_dict(), settings),
        # Without a word, transformers would ask whoever sits at the terminal.
        "trust_remote_code": trust,
    }
    quantization = quantization_config(settings)
    if quantization is not None:
        arguments["quantization_config"] = quantization
    if is_fsdp_enabled():  # no GPU holds the whole model, which is divided in the host's RAM
        arguments["device_map"] = {"": "cpu"} if quantization is not None else None
    elif device_type == "cuda":
        arguments["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    divided = loading_arguments(settings)
    if divided:  # each process reads its part
        arguments.pop("device_map", None)
        arguments.update(divided)
    model_class = MODEL_CLASSES[settings["objective"]]
    arguments.update(model_class.settings)
    loaded = model_class.auto.from_pretrained(model, use_safetensors=True, **arguments)
    if quantization is not None:
        keep_differentiable(loaded)
    return loaded


def switched_on(config: Mapping[str, Any], settings: Settings) -> dict[str, bool]:
    """What of the config is switched on to train biases; transformers makes them zero."""
    if not settings["trains_biases"]:
        return {}
    try:
        return dict.fromkeys(spec_from_config(config, "the model").bias_switches, True)
    except InputError:  # no closed form, so no planned biases either
        return {}


def keep_differentiable(model: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit weights as they are. In evaluation mode on a processor it packs
    them for a kernel through which no gradient goes, in training either (0.50, nn/modules.py
    `Linear4bit.forward`)."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def meta_model(config: Mapping[str, Any], settings: Settings) -> PreTrainedModel:
    """The base model that `load_model` gives, without weights: on the meta device.

    `config`: what config.json holds. Raises InputError for a shape that transformers refuses.
    """
    attention = settings["attn_implementation"]
    # flash-attn need not be installed to ask what it would take.
    build_with = "eager" if attention == "flash_attention_2" else attention
    model_class = MODEL_CLASSES[settings["objective"]]
    try:
        switched = switched_on(config, settings)
        model_config = AutoConfig.for_model(**{**config, **switched, **model_class.settings})
        check_model_class(settings["objective"], model_config)
        with torch.device("meta"):
            model = model_class.auto.from_config(
                model_config,
                dtype=getattr(torch, settings["dtype"]),
                attn_implementation=build_with,
            )
    except (
        *(ValueError, KeyError, TypeError, AttributeError, RuntimeError, ZeroDivisionError),
        StrictDataclassError,
    ) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"transformers cannot build this model: {said}", "mend the model's config.json"
        ) from error
    model.config._attn_implementation = attention
    quantization = quantization_config(settings)
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization)
        quantizer.preprocess_model(model=model, dtype=model.dtype, device_map=None)
        quantizer.postprocess_model(model=model)
        model.hf_quantizer = quantizer
    return model.eval()  # as `from_pretrained` does


def quantization_config(settings: Settings) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration; None for an unquantized base."""
    kind = settings["quantization"]
    if kind == "none":
        return None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=settings["double_quant"],
        bnb_4bit_compute_dtype=getattr(torch, settings["compute_dtype"]),
        bnb_4bit_quant_storage=getattr(torch, settings["quant_storage"]),
    )


def apply_method(model: PreTrainedModel, method: str, settings: Settings) -> PeftConfig | None:
    """Prepare `model` in place; the PEFT configuration the trainer adds, None without one."""
    if method == "freeze":
        freeze_all_but_last(model, settings["num_trainable_layers"], settings["trainable_modules"])
    if method == "bitfit":
        train_biases_only(model)
    if method == "bottleneck":
        quantized = settings["quantization"] != "none"
        insert_bottlenecks(model, settings["lora_rank"], quantized=quantized)
    return peft_config_of(resolve_method(method), settings, model)


def train_biases_only(model: nn.Module) -> None:
    """Freeze every parameter but the biases. Raises InputError for a model without any."""
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    if not biases:
        raise InputError(
            "method `bitfit` trains biases, and this model neither has nor can have any",
            "use `--method lora`; `--method beft`, which adds some, and `ln-tuning` may need "
            "`--peft-config target_modules=[...]`",
        )
    model.requires_grad_(False)
    for bias in biases:
        bias.requires_grad_(True)


def freeze_all_but_last(model: nn.Module, num_layers: int, modules: Sequence[str] = ()) -> None:
    """Freeze every parameter outside the last `num_layers` decoder layers.

    With `modules`, all but those of these names, in these layers and outside of the layers.
    Raises UnknownNameError for a name that no module has.
    """
    model.requires_grad_(False)
    path, layers = decoder_layer_list(model)
    last = list(layers)[-num_layers:]
    if not modules:
        for layer in last:
            layer.requires_grad_(True)
        return
    found = [found for layer in last for found in layer.named_modules() if found[0]]
    found += [
        (name, module)
        for name, module in model.named_modules()
        if name and not path.startswith(name) and not name.startswith(f"{path}.")
    ]
    by_name: dict[str, list[nn.Module]] = {}
    for name, module in found:
        by_name.setdefault(name.rpartition(".")[2], []).append(module)
    for name in modules:
        if name not in by_name:
            raise UnknownNameError("module to train", name, by_name)
        for module in by_name[name]:
            module.requires_grad_(True)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order."""
    return list(decoder_layer_list(model)[1])


def decoder_layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(path, list) of the decoder layers: the longest list that is not within another one."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(outer + ".") for outer in lists)
        if isinstance(module, nn.ModuleList) and not nested:
            lists[path] = module
    if not lists:
        raise InputError("this model has no list of layers")
    return max(lists.items(), key=lambda item: len(item[1]))


def count_trainable(model: nn.Module) -> int:
    """Parameters that receive gradients."""
    return sum(num_elements(p) for p in model.parameters() if p.requires_grad)


def trained_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that receive gradients."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def count_parameters(model: nn.Module) -> int:
    """All parameters, tied ones once; of a quantized model, those it stands for."""
    return sum(p.numel() for p in model.parameters())
