"""Model and method, built once: one builder for each entry of `planner.methods.METHODS`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from ftplan.planner.errors import InputError
from ftplan.planner.methods import ALL_LINEAR

Settings = Mapping[str, Any]


def load_model(model: str, settings: Settings, device_type: str) -> PreTrainedModel:
    """The base model with its weights, on the device it trains on."""
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, settings["dtype"]),
        "attn_implementation": settings["attn_implementation"],
    }
    quantization = quantization_config(settings)
    if quantization is not None:
        arguments["quantization_config"] = quantization
    if device_type == "cuda":
        arguments["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    return AutoModelForCausalLM.from_pretrained(model, use_safetensors=True, **arguments)


def meta_model(config: Mapping[str, Any], settings: Settings) -> PreTrainedModel:
    """The base model that `load_model` gives, without weights: on the meta device.

    `config`: what config.json holds. Raises InputError for a shape that transformers refuses.
    """
    attention = settings["attn_implementation"]
    # flash-attn need not be installed to ask what it would take.
    build_with = "eager" if attention == "flash_attention_2" else attention
    try:
        model_config = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
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
    return model


def quantization_config(settings: Settings) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration; None for an unquantized base."""
    kind = settings["quantization"]
    if kind == "none":
        return None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=settings["double_quant"],
        bnb_4bit_compute_dtype=compute[settings["mixed_precision"]],
        bnb_4bit_quant_storage=getattr(torch, settings["quant_storage"]),
    )


def apply_method(model: nn.Module, method: str, settings: Settings) -> PeftConfig | None:
    """Prepare `model` in place; the PEFT configuration the trainer adds, None without one."""
    if method in ("lora", "qlora"):
        return lora_config(settings)
    if method == "freeze":
        freeze_all_but_last(model, settings["num_trainable_layers"])
        return None
    if method == "full":
        return None
    raise InputError(f"no builder for method `{method}`")


def lora_config(settings: Settings) -> LoraConfig:
    targets = list(settings["target_modules"])
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
    )


def freeze_all_but_last(model: nn.Module, num_layers: int) -> None:
    """Freeze every parameter outside the last `num_layers` decoder layers."""
    model.requires_grad_(False)
    for layer in decoder_layers(model)[-num_layers:]:
        layer.requires_grad_(True)


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
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_parameters(model: nn.Module) -> int:
    """All parameters, tied ones once; of a quantized model, those it stands for."""
    return sum(p.numel() for p in model.parameters())
