"""PEFT's configuration of a method, from its entry in `planner.methods` and a plan's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import AdaptionPromptModel
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from ftplan.launcher.training.model_classes import MODEL_CLASSES
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.methods import Method, derived_options
from ftplan.planner.peft_options import read_options
from ftplan.planner.prompt_counts import ADAPTION_PROMPT_LAYERS
from ftplan.planner.trained import ALL_LINEAR
from ftplan.planner.vocabulary import trains_rows

# Tuners that ask which task a row belongs to.
_MULTI_TASK = (PeftType.MULTITASK_PROMPT_TUNING, PeftType.POLY)

# AdaLoRA takes ranks away over the steps of a run, which are known when it begins
# (`cycles/adalora.py`); PEFT asks for some number before, larger than any `tinit` and `tfinal`.
_ADALORA_STEPS = 2**31


def peft_config_of(
    method: Method, settings: Mapping[str, Any], model: nn.Module
) -> PeftConfig | None:
    """The configuration that PEFT is given; None for a method without PEFT.

    Raises InputError for an option that PEFT does not have or refuses.
    """
    if method.peft_type is None:
        return None
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[method.peft_type]]
    known = {item.name for item in dataclasses.fields(config_class)}
    given = read_options(settings["peft_config"])
    options = {
        name: settings[setting]
        for name, setting in method.takes.items()
        if settings[setting] is not None
    }
    if options.get("target_modules") == [ALL_LINEAR]:
        options["target_modules"] = ALL_LINEAR
    if settings["modules_to_save"]:
        options["modules_to_save"] = list(settings["modules_to_save"])
    elif (tokens := settings.get("trained_token_ids")) and trains_rows(method):
        options["trainable_token_indices"] = _rows(model, tokens)
    options = {
        **_derived(method, model, {**method.peft_options, **given}),
        **method.peft_options,
        **options,
        **derived_options(method.peft_type, settings["lora_rank"], given),
        **given,
    }
    for name in options:
        if name not in known:
            raise UnknownNameError(f"option of {config_class.__name__}", name, known)
    task_type = MODEL_CLASSES[settings["objective"]].task_type
    try:
        return config_class(task_type=task_type, **options)
    except (ValueError, TypeError) as error:
        raise refused(method, error) from error


def _rows(model: Any, tokens: Sequence[int]) -> dict[str, list[int]]:
    """The tokens' rows of the embeddings, and of an output projection that has its own."""
    ends = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not ends[0].weight:
        ends.append(head)
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    return {name.rpartition(".")[2]: list(tokens) for name in names}


def _derived(method: Method, model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that PEFT has no default for, which follow from the model and the `given` ones."""
    if given.get("prompt_tuning_init") == "TEXT":
        return {"tokenizer_name_or_path": _folder_of(model)}
    if method.peft_type == "ADALORA":
        return {"total_step": _ADALORA_STEPS}
    if method.peft_type == "ADAPTION_PROMPT":
        config: Any = model.config
        return {"adapter_layers": min(ADAPTION_PROMPT_LAYERS, config.num_hidden_layers)}
    return {}


def _folder_of(model: nn.Module) -> str:
    """Where the model was loaded from, with its tokenizer; a model without weights is from
    nowhere, and needs no text either."""
    config: Any = model.config
    return str(config.name_or_path) or "."


def refused(method: Method, error: Exception) -> InputError:
    """What PEFT said, for a person."""
    said = " ".join(str(error).split())
    return InputError(
        f"PEFT refuses method `{method.name}` here: {said}",
        "give it other options with `--peft-config name=value`, other `--target-modules`, "
        "or take another method",
    )


class CurrentTasks(Protocol):
    """`ids`: the tasks of the rows that the model is about to be given; None where not known."""

    ids: torch.Tensor | None


def settle_adapters(
    model: nn.Module, settings: Mapping[str, Any], tasks: CurrentTasks | None = None
) -> None:
    """What is left to do once the trainer has added the adapters. Without `tasks`, all rows are of
    the first."""
    if not isinstance(model, PeftModel):
        return
    if tells_tasks_apart(model):
        _name_the_task(model, tasks)
    if isinstance(model.base_model, AdaptionPromptModel):
        # It has the forward that the model had before TRL put its loss into it.
        model.base_model.forward = model.base_model.model.forward
    _keep_rank_numbers(model)
    _name_the_bias(model)
    if not settings["autocast_adapter_dtype"]:
        _hold_adapters_as_base(model, getattr(torch, settings["dtype"]))


def tells_tasks_apart(model: nn.Module) -> bool:
    """Whether the model asks for `task_ids`."""
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type in _MULTI_TASK


def _name_the_task(model: PeftModel, tasks: CurrentTasks | None) -> None:
    """Give tuners of many tasks each row's."""

    def with_task(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if "task_ids" in kwargs:
            return args, kwargs
        ids = tasks.ids if tasks is not None else None
        if ids is None:
            tokens = kwargs["input_ids"]
            ids = tokens.new_zeros(tokens.shape[0])
        return args, {**kwargs, "task_ids": ids}

    model.register_forward_pre_hook(with_task, with_kwargs=True)


def _keep_rank_numbers(model: PeftModel) -> None:
    """AdaLoRA's numbers of ranks as they are: PEFT's cast to fp32 makes parameters of them that
    would be trained, and no file of an adapter holds them."""
    if model.active_peft_config.peft_type is PeftType.ADALORA:
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)


def _name_the_bias(model: PeftModel) -> None:
    """Rows of an output projection are trained in a wrapper that has its weight alone (PEFT 0.21,
    `TrainableTokensWrapper`); TRL's losses read a bias as well, where there is none."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper) and not hasattr(module, "bias"):
            module.register_parameter("bias", None)


def _hold_adapters_as_base(model: PeftModel, dtype: torch.dtype) -> None:
    """Adapters in the base's dtype: what PEFT's `autocast_adapter_dtype=False` gives.

    Done afterwards, because TRL's trainers add the adapters themselves.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype is torch.float32:
            parameter.data = parameter.data.to(dtype)
