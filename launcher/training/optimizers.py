"""Optimizers that are made of a model: what transformers has no name for, and what a method asks.

All others are transformers' own, by `TrainingArguments.optim`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer, TrainingArguments

from ftplan.planner.muon import is_hidden_matrix

Settings = Mapping[str, Any]
Maker = Callable[[TrainingArguments, Settings, Any], torch.optim.Optimizer]


def settle_optimizer(trainer: Any, method: str, optim: str, settings: Settings) -> None:
    """Have `trainer` make the plan's optimizer, once the adapters are there.

    `settings`: what `launcher.emit.method_settings` gives. What the method's optimizer does not
    step is frozen.
    """
    if method == "lora-fa":
        freeze_first_matrices(trainer.model)
    make = _maker(method, optim)
    if make is not None:
        made = partial(make, trainer.args, settings)
        trainer.optimizer_cls_and_kwargs = (lambda: made, {})  # a factory that is called


def _maker(method: str, optim: str) -> Maker | None:
    if method == "lora-fa":
        return _lora_fa
    if method == "lora-plus":
        return _lora_plus
    return _muon if optim == "muon" else None


# --- LoRA's relatives


def freeze_first_matrices(model: nn.Module) -> None:
    """LoRA-FA's: with A frozen, its input is not kept for backward. PEFT is told so as well: it
    would train A again once adapters are switched off and on, as objectives with a reference do."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.frozen_peft_weight_names = dict.fromkeys(module.lora_A, ("lora_A",))
            module.lora_A.requires_grad_(False)


def _lora_fa(arguments: TrainingArguments, settings: Settings, model: Any) -> torch.optim.Optimizer:
    """PEFT's AdamW, which takes A's part out of the gradients of B (arXiv 2308.03303)."""
    config = model.active_peft_config
    return create_lorafa_optimizer(
        model,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
    )


def _lora_plus(
    arguments: TrainingArguments, settings: Settings, model: Any
) -> torch.optim.Optimizer:
    """Any optimizer of transformers that takes groups, B's rate a multiple of A's (arXiv
    2402.12354)."""
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if options.get("optim_bits") == 8:
        _keep_embeddings_wide(model)
    return create_loraplus_optimizer(
        model,
        optimizer_class,
        lr=options.pop("lr"),
        loraplus_lr_ratio=settings["loraplus_lr_ratio"],
        loraplus_weight_decay=arguments.weight_decay,
        **options,
    )


def _keep_embeddings_wide(model: nn.Module) -> None:
    """Embeddings' states in 32 bits, as transformers' trainer asks of bitsandbytes."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


# --- Muon


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and fused AdamW for all else, as one optimizer.

    Both take AdamW's learning rate: Muon's update is scaled to the size of AdamW's (Liu et al.
    2025, arXiv 2502.16982, section 2.2).
    """

    def __init__(
        self,
        hidden: list[nn.Parameter],
        others: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        **adamw: Any,
    ) -> None:
        groups = [group for group in others if group["params"]]
        self._muon = torch.optim.Muon(
            hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(groups, lr=lr, fused=True, **adamw) if groups else None
        beside = self._adamw.param_groups if self._adamw else []
        super().__init__([*self._muon.param_groups, *beside], defaults={"lr": lr})

    def step(self, closure: Any = None) -> Any:
        """One step of both, on the groups and states of this one (a loaded checkpoint replaces
        them)."""
        loss = None if closure is None else closure()
        self._step_on(self._muon, self.param_groups[:1])
        if self._adamw is not None:
            self._step_on(self._adamw, self.param_groups[1:])
        return loss

    def _step_on(self, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        optimizer.state, optimizer.param_groups = self.state, groups
        optimizer.step()


def _muon(arguments: TrainingArguments, settings: Settings, model: Any) -> torch.optim.Optimizer:
    rows = _looked_up_or_projecting(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [
        p for name, p in trained if id(p) not in rows and is_hidden_matrix(name, tuple(p.shape))
    ]
    ours = {id(p) for p in hidden}
    others = [p for _, p in trained if id(p) not in ours]
    return MuonWithAdamW(
        hidden,
        [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": arguments.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
    )


def _looked_up_or_projecting(model: Any) -> set[int]:
    """Embeddings, whatever their names are, and the output projection."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    modules += [head] if head is not None else []
    return {id(p) for module in modules for p in module.parameters()}
