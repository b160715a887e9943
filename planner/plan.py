"""A training plan: every setting of a run, and why each has its value.

Settings carry Hugging Face's names. The command line's flags, the plan file and the JSON output
all follow from the fields of TrainingPlan, so a new setting is one field here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from msgspec import Struct

from ftplan.planner.context_parallel import check_context_parallel
from ftplan.planner.cycles import PRUNE_METHODS, check_cycles
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.lora_optimizers import optimizer_of
from ftplan.planner.machines import check_machines
from ftplan.planner.method_checks import check_method_settings
from ftplan.planner.methods import METHODS, Method, resolve_method
from ftplan.planner.objective_checks import check_objective
from ftplan.planner.objectives import OBJECTIVES, Objective
from ftplan.planner.optimizers import OPTIMIZERS, Optimizer
from ftplan.planner.overlong import OVERLONG
from ftplan.planner.peft_options import read_options
from ftplan.planner.rewards import RULE_REWARDS
from ftplan.planner.sharding import OFFLOADS, PARAMETERS_SHARDED, SHARDINGS, check_sharding
from ftplan.planner.tasks import TASK_WEIGHTINGS, check_task_weighting, read_task_weights
from ftplan.planner.tensor_parallel import check_tensor_parallel
from ftplan.planner.trained import ALL_LINEAR, MethodSettings, check_target_modules
from ftplan.planner.units import BYTES_PER_DTYPE, resolve_dtype
from ftplan.planner.vocabulary import check_tokens, named_tokens

Origin = Literal["given", "derived", "default"]

QUANTIZATIONS = ("none", "nf4", "fp4", "int8", "gptq", "awq")
DTYPES = ("float32", "bfloat16", "float16")
MIXED_PRECISIONS = ("no", "bf16", "fp16")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
LOSSES = ("stock", "trl-fused", "liger", "triton_ce")
TRAINERS = ("trl", "transformers", "loop")
# Of transformers' `report_to`, those that have a way to work offline. Its callback for SwanLab
# (transformers 5.23) fails with SwanLab 0.10, which reads other variables and raises without a run.
TRACKERS = ("tensorboard", "wandb", "trackio")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")

AUTOCAST_DTYPE = {"no": None, "bf16": "bfloat16", "fp16": "float16"}


class Reason(Struct, frozen=True, kw_only=True):
    """Where a setting's value comes from."""

    origin: Origin
    why: str


def _setting(
    default: Any, help_text: str, *, choices: tuple[str, ...] | None = None, recipe: bool = False
) -> Any:
    """A plan's field. `recipe` marks what changes training's result but not its memory."""
    metadata = {"help": help_text, "choices": choices, "recipe": recipe}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """All settings of one run, resolved. Raises InputError for values that cannot be."""

    method: str = _setting("lora", "what is trained", choices=tuple(METHODS))
    quantization: str = _setting("none", "how the frozen base is held", choices=QUANTIZATIONS)
    double_quant: bool = _setting(True, "quantize the quantization scales too (nf4, fp4)")
    dtype: str = _setting("bfloat16", "dtype of the loaded weights", choices=DTYPES)
    mixed_precision: str = _setting("bf16", "autocast dtype", choices=MIXED_PRECISIONS)
    lora_rank: int = _setting(16, "rank of the adapters")
    lora_alpha: int = _setting(32, "scale of the adapters: alpha / rank", recipe=True)
    lora_dropout: float = _setting(0.0, "dropout before the adapters")
    loraplus_lr_ratio: float = _setting(
        16.0,
        "learning rate of LoRA's second matrix, as a multiple of the first's (lora-plus)",
        recipe=True,
    )
    target_modules: tuple[str, ...] = _setting(
        (ALL_LINEAR,), "linear modules that carry adapters, comma-separated, or `all-linear`"
    )
    modules_to_save: tuple[str, ...] = _setting(
        (), "modules trained whole beside the adapters, such as `lm_head`"
    )
    peft_config: tuple[str, ...] = _setting(
        (), "further options of PEFT's configuration: `use_dora=true,bias=all`"
    )
    add_tokens: tuple[str, ...] = _setting(
        (), "tokens that the vocabulary gets, and that are trained: `<tool>,<think>`, or a file"
    )
    train_tokens: tuple[str, ...] = _setting(
        (), "tokens of the vocabulary that are trained beside adapters, or `template` for its own"
    )
    num_tasks: int | None = _setting(
        None, "tasks that adapters tell apart (multitask-prompt-tuning, poly)"
    )
    autocast_adapter_dtype: bool = _setting(True, "hold the adapters of a 16-bit base in fp32")
    num_trainable_layers: int = _setting(2, "layers trained by `freeze`, from the last")
    trainable_modules: tuple[str, ...] = _setting(
        (), "what `freeze` trains in place of whole layers, in these and outside: `q_proj,lm_head`"
    )
    jagged_restart_steps: int | None = _setting(
        None,
        "optimizer steps until adapters are merged and begun anew (relora, plora)",
        recipe=True,
    )
    jagged_restart_warmup_steps: int | None = _setting(
        None, "steps that warm up after it (relora)", recipe=True
    )
    relora_prune_ratio: float = _setting(
        0.99, "share of the optimizer's states that is set to 0 then (relora)", recipe=True
    )
    relora_prune_method: str = _setting(
        "magnitude", "which of them (relora)", choices=PRUNE_METHODS, recipe=True
    )
    plora_momentum: float = _setting(
        0.0, "share of a stage's update that is not merged into the base (plora)", recipe=True
    )
    lora_drop_threshold: float = _setting(
        0.9,
        "importance together of the layers that keep their own adapter (lora-drop)",
        recipe=True,
    )
    optim: str = _setting("adamw_torch_fused", "optimizer", choices=tuple(OPTIMIZERS))
    per_device_train_batch_size: int = _setting(1, "rows a GPU holds at once")
    gradient_accumulation_steps: int = _setting(1, "micro-batches before an optimizer step")
    max_length: int = _setting(2048, "tokens a row is cut at")
    chat_template: str = _setting(
        "auto",
        "what puts conversations into text: `model`, `plain`, `chatml` or a file with a template",
        recipe=True,
    )
    overlong: str = _setting(
        "truncate", "what becomes of rows longer than `max_length`", choices=OVERLONG, recipe=True
    )
    packing: bool = _setting(False, "fill rows up to `max_length` with several, without padding")
    gradient_checkpointing: bool = _setting(True, "keep layer inputs only, compute the rest again")
    every_n_layers: int = _setting(1, "checkpoint each n-th layer only, from the first one on")
    use_reentrant: bool = _setting(False, "checkpoint by torch's older, reentrant function")
    attn_implementation: str = _setting("sdpa", "attention kernel", choices=ATTENTIONS)
    loss: str = _setting("trl-fused", "loss kernel", choices=LOSSES)
    trainer: str = _setting("trl", "training stack", choices=TRAINERS)
    objective: str = _setting("sft", "what is learned", choices=tuple(OBJECTIVES))
    precompute_ref_log_probs: bool = _setting(
        False, "compute the reference's log-probabilities before training (dpo, kto)"
    )
    num_generations: int = _setting(8, "completions of each prompt that are compared (grpo, rloo)")
    max_completion_length: int = _setting(
        512, "tokens of `max_length` that are generated, the rest is the prompt (grpo, rloo)"
    )
    steps_per_generation: int | None = _setting(
        None, "micro-batches generated at once, instead of those of an optimizer step (grpo, rloo)"
    )
    reward_model: str | None = _setting(
        None,
        "what judges completions: a run of `--objective reward`, a folder or a Hub id (grpo, rloo)",
    )
    reward: tuple[str, ...] = _setting(
        (),
        "rules that reward completions: " + ", ".join(RULE_REWARDS) + " (grpo, rloo)",
        recipe=True,
    )
    beta: float | None = _setting(
        None,
        "what a preference weighs with; of completions: the distance from the reference model, "
        "0 for none",
        recipe=True,
    )
    loss_type: str | None = _setting(
        None, "TRL's name of the preference loss: sigmoid, ipo, hinge, ... (dpo)", recipe=True
    )
    gamma_beta_ratio: float | None = _setting(
        None, "by how much the chosen answer is to lead, as a share of beta (simpo)", recipe=True
    )
    num_gpus: int = _setting(
        1, "GPUs to use; with `--num-machines` of each machine, and the plan has all of them"
    )
    num_machines: int = _setting(1, "machines that train together, each with as many GPUs")
    sharding: str = _setting(
        "none", "what several GPUs divide among them instead of each holding it", choices=SHARDINGS
    )
    dp_replicate_size: int = _setting(
        1, "copies of the model over all GPUs, each divided among its own (hybrid sharding: fsdp)"
    )
    offload: str = _setting("none", "what is kept in the host's memory", choices=OFFLOADS)
    tp_size: int = _setting(1, "GPUs that divide each layer's matrices (tensor parallelism)")
    cp_size: int = _setting(1, "GPUs that divide each row (context parallelism)")
    learning_rate: float = _setting(2e-4, "peak learning rate", recipe=True)
    lr_scheduler_type: str = _setting(
        "cosine", "learning-rate schedule", choices=SCHEDULES, recipe=True
    )
    warmup_ratio: float = _setting(0.03, "share of the steps that warm up", recipe=True)
    weight_decay: float = _setting(0.0, "weight decay", recipe=True)
    max_grad_norm: float = _setting(1.0, "gradient clipping", recipe=True)
    num_train_epochs: float = _setting(1.0, "passes over the data", recipe=True)
    max_steps: int | None = _setting(None, "optimizer steps, instead of epochs", recipe=True)
    save_steps: int = _setting(50, "optimizer steps between checkpoints", recipe=True)
    report_to: tuple[str, ...] = _setting(
        (), f"where metrics go besides metrics.jsonl: {', '.join(TRACKERS)}", recipe=True
    )
    task_weighting: str = _setting(
        "proportional", "how often each task's rows come", choices=TASK_WEIGHTINGS, recipe=True
    )
    task_temperature: float = _setting(
        2.0, "tasks weigh as their rows to the power 1/T (temperature, dynamic)", recipe=True
    )
    task_weights: tuple[str, ...] = _setting(
        (), "weights of tasks: `sentiment=2,summary=1` (fixed, dynamic)", recipe=True
    )
    seed: int = _setting(42, "seed of shuffling and initialization", recipe=True)

    def __post_init__(self) -> None:
        for name in SETTING_NAMES:
            check_setting(name, getattr(self, name))
        _check_precision(self)
        _check_loss(self)
        _check_method(self)
        check_method_settings(self)
        _check_packing(self)
        _check_every_n_layers(self)
        check_objective(self)
        check_task_weighting(self)
        _check_optimizer(self)
        check_machines(self)
        check_sharding(self)
        check_tensor_parallel(self)
        check_context_parallel(self)
        check_cycles(self)
        check_tokens(self)

    @property
    def resolved_method(self) -> Method:
        return resolve_method(self.method)

    @property
    def resolved_objective(self) -> Objective:
        return OBJECTIVES[self.objective]

    @property
    def optimizer(self) -> Optimizer:
        """As the method uses it: LoRA-FA has one of its own."""
        return optimizer_of(self.method, self.optim)

    @property
    def method_settings(self) -> MethodSettings:
        return MethodSettings(
            lora_rank=self.lora_rank,
            target_modules=self.target_modules,
            modules_to_save=self.modules_to_save,
            num_trained_tokens=0 if self.modules_to_save else len(self.trained_tokens),
            peft_config=self.peft_config,
            num_tasks=self.num_tasks,
            num_trainable_layers=self.num_trainable_layers,
            trainable_modules=self.trainable_modules,
            quantization=self.quantization,
        )

    @property
    def trained_tokens(self) -> tuple[str, ...]:
        """Tokens that are to be trained, new or not."""
        return named_tokens(self.train_tokens, self.add_tokens)

    @property
    def weight_bytes(self) -> int:
        """Bytes of one unquantized weight."""
        return BYTES_PER_DTYPE[self.dtype]

    @property
    def compute_dtype(self) -> str:
        """The dtype of most products."""
        return AUTOCAST_DTYPE[self.mixed_precision] or self.dtype

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element that a matrix product returns."""
        autocast = AUTOCAST_DTYPE[self.mixed_precision]
        return BYTES_PER_DTYPE[autocast or self.dtype]

    @property
    def quantized_compute_dtype(self) -> str:
        """What a 4-bit base multiplies in (`bnb_4bit_compute_dtype`): autocast's dtype; without it
        ftplan asks for fp32, and people's own loops for the dtype of the weights."""
        autocast = AUTOCAST_DTYPE[self.mixed_precision]
        return autocast or (self.dtype if self.trainer == "loop" else "float32")

    @property
    def autocast(self) -> bool:
        return self.mixed_precision != "no"

    @property
    def casts_weights(self) -> bool:
        """Whether autocast turns the loaded weights into another dtype for each product."""
        return self.autocast and AUTOCAST_DTYPE[self.mixed_precision] != self.dtype

    @property
    def shards_parameters(self) -> bool:
        """Whether each GPU holds a share of the parameters only, and gathers them as it goes."""
        return self.sharding in PARAMETERS_SHARDED

    @property
    def gpus_per_machine(self) -> int:
        return self.num_gpus // self.num_machines

    @property
    def dp_shard_size(self) -> int:
        """GPUs that divide one copy of the model, where the plan shards."""
        return self.num_gpus // self.dp_replicate_size

    @property
    def effective_batch_size(self) -> int:
        """Rows an optimizer step sees, over all GPUs."""
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return rows * self.data_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Groups of GPUs that have rows of their own."""
        return self.num_gpus // (self.tp_size * self.cp_size)

    @property
    def generated_rows(self) -> int:
        """Rows that a GPU generates at once (TRL's `generation_batch_size`)."""
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        return self.per_device_train_batch_size * steps

    def replace(self, **changes: Any) -> TrainingPlan:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)


_POSITIVE_SETTINGS = (
    "lora_rank",
    "lora_alpha",
    "loraplus_lr_ratio",
    "num_trainable_layers",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "every_n_layers",
    "num_generations",
    "max_completion_length",
    "steps_per_generation",
    "num_gpus",
    "num_machines",
    "tp_size",
    "cp_size",
    "dp_replicate_size",
    "learning_rate",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "save_steps",
    "jagged_restart_steps",
    "jagged_restart_warmup_steps",
    "num_tasks",
    "task_temperature",
)
_SHARE_SETTINGS = ("lora_dropout", "warmup_ratio", "weight_decay", "plora_momentum")
# Shares that may be all.
_FULL_SHARE_SETTINGS = ("relora_prune_ratio", "lora_drop_threshold")
_LOSS_WEIGHTS = ("beta", "gamma_beta_ratio")

# Settings that may be absent, and what they are otherwise.
_OPTIONAL: Mapping[str, type] = {
    "max_steps": int,
    "steps_per_generation": int,
    "num_tasks": int,
    "jagged_restart_steps": int,
    "jagged_restart_warmup_steps": int,
    "beta": float,
    "gamma_beta_ratio": float,
    "loss_type": str,
    "reward_model": str,
}

# What commas do not divide: options of PEFT may be lists, and texts in double quotes.
_OUTER_PART = re.compile(r"""(?:"[^"]*"|\[[^\]]*\]|\{[^}]*\}|\([^)]*\)|[^,])+""")

# NumPy's generator, which transformers seeds too, takes no other.
_SEEDS = range(2**32)

SETTING_NAMES: tuple[str, ...] = tuple(item.name for item in dataclasses.fields(TrainingPlan))
_DEFAULTS: dict[str, Any] = {item.name: item.default for item in dataclasses.fields(TrainingPlan)}


def check_setting(name: str, value: Any) -> None:
    """Raises InputError when no plan can have this value for the setting."""
    choices = TrainingPlan.__dataclass_fields__[name].metadata["choices"]
    if choices is not None and value not in choices:
        raise UnknownNameError(name.replace("_", " "), str(value), choices)
    if name in _POSITIVE_SETTINGS and value is not None and not 0 < value < math.inf:
        raise InputError(f"`{flag_name(name)} {value}` must be a finite number above 0")
    if name in _SHARE_SETTINGS and not 0 <= value < 1:
        raise InputError(f"`{flag_name(name)} {value}` must be at least 0 and below 1")
    if name in _FULL_SHARE_SETTINGS and not 0 <= value <= 1:
        raise InputError(f"`{flag_name(name)} {value}` must be from 0 to 1")
    if name in _LOSS_WEIGHTS and value is not None and not 0 <= value < math.inf:
        raise InputError(f"`{flag_name(name)} {value}` must be a finite number, 0 or above")
    if name == "seed" and value not in _SEEDS:
        raise InputError(f"`--seed {value}` must be from 0 to {_SEEDS[-1]}")
    if name == "report_to":
        for tracker in value:
            if tracker not in TRACKERS:
                raise UnknownNameError("tracker", tracker, TRACKERS)
    if name == "target_modules":
        check_target_modules(value)
    if name == "peft_config":
        read_options(value)
    if name == "task_weights":
        read_task_weights(value)


def _check_packing(plan: TrainingPlan) -> None:
    """Raises InputError where packed rows would see each other, or are not to be had."""
    if plan.packing and plan.attn_implementation != "flash_attention_2":
        raise InputError(
            f"packed rows would see each other under `--attn-implementation "
            f"{plan.attn_implementation}`",
            "use `--attn-implementation flash_attention_2`, which takes rows of any length",
        )
    if plan.packing and (plan.trainer != "trl" or plan.objective != "sft"):
        raise InputError(
            "`--packing` is for TRL's trainer and plain fine-tuning", "leave out `--packing`"
        )


def _check_every_n_layers(plan: TrainingPlan) -> None:
    """Raises InputError where there is no checkpointing to spare layers from."""
    if plan.every_n_layers > 1 and not plan.gradient_checkpointing:
        raise InputError(
            f"`--every-n-layers {plan.every_n_layers}` says which layers gradient checkpointing "
            "takes, and it is off",
            "use `--gradient-checkpointing true`, or leave out `--every-n-layers`",
        )


def _check_method(plan: TrainingPlan) -> None:
    """Raises InputError when the method cannot train weights held as the plan says."""
    method = resolve_method(plan.method)
    if plan.quantization != "none" and not method.adapter:
        raise InputError(
            f"method `{plan.method}` cannot train a base quantized to {plan.quantization}",
            "quantized weights cannot be trained themselves: use `--method qlora`, "
            "or `--quantization none`",
        )
    if plan.quantization == "none" and method.quantized_base:
        raise InputError(
            f"method `{plan.method}` needs a quantized base",
            "use `--quantization nf4`, or `--method lora`",
        )
    method.check_base(plan.quantization, plan.peft_config)
    for setting in ("modules_to_save", "peft_config"):
        if getattr(plan, setting) and method.peft_type is None:
            raise InputError(
                f"`{flag_name(setting)}` is PEFT's, and method `{plan.method}` trains without it",
                "leave it out, or use `--method lora`",
            )
    if plan.trainable_modules and plan.method != "freeze":
        raise InputError(
            f"`--trainable-modules` is for method `freeze`, and this is `{plan.method}`",
            "use `--target-modules` or `--modules-to-save`, or `--method freeze`",
        )
    if plan.method == "freeze" and plan.gradient_checkpointing and plan.use_reentrant:
        raise InputError(
            "reentrant checkpointing hands no gradients to layers whose input needs none, which "
            "is so of those that method `freeze` trains",
            "leave out `--use-reentrant`",
        )
    if method.fills_cache and plan.gradient_checkpointing:
        raise InputError(
            f"method `{plan.method}` puts keys and values into the layers' cache, and checkpointed "
            "layers are given none",
            "use `--gradient-checkpointing false`",
        )
    if plan.dtype == "float16" and plan.mixed_precision == "fp16":
        _check_trained_in_float32(plan, method)


def _check_loss(plan: TrainingPlan) -> None:
    """Raises InputError for fms-acceleration's loss in another stack than its own."""
    if plan.loss == "triton_ce" and plan.trainer != "transformers":
        raise InputError(
            f"`--loss triton_ce` is fms-acceleration's, for transformers' trainer: "
            f"`--trainer {plan.trainer}` has it not",
            "use `--trainer transformers`, or `--loss liger`",
        )


def _check_precision(plan: TrainingPlan) -> None:
    """Raises InputError for 16-bit weights under autocast to the other 16 bits."""
    autocast = AUTOCAST_DTYPE[plan.mixed_precision]
    if autocast is not None and plan.dtype not in ("float32", autocast):
        raise InputError(
            f"`--dtype {plan.dtype}` under `--mixed-precision {plan.mixed_precision}`: torch's "
            "autocast does not join tensors of both 16-bit dtypes",
            f"use `--dtype {autocast}`, or `--dtype float32`",
        )


def _check_trained_in_float32(plan: TrainingPlan, method: Method) -> None:
    """Raises InputError where float16 weights would be trained under fp16 autocast."""
    why = "torch's GradScaler refuses fp16 gradients"
    if not method.adapter:
        raise InputError(
            f"method `{plan.method}` cannot train float16 weights under fp16 autocast: {why}",
            "use `--dtype float32`: autocast computes its products in fp16 all the same",
        )
    if plan.modules_to_save:
        raise InputError(
            f"`--modules-to-save` would train float16 weights under fp16 autocast: {why}",
            "use `--dtype float32`, or `--mixed-precision bf16` with `--dtype bfloat16`",
        )
    if plan.quantization == "none" and not plan.autocast_adapter_dtype:
        raise InputError(
            f"float16 adapters cannot be trained under fp16 autocast: {why}",
            "leave out `--autocast-adapter-dtype no`",
        )


def _check_optimizer(plan: TrainingPlan) -> None:
    """Raises InputError when the optimizer cannot work as the plan would have it."""
    optimizer = plan.optimizer
    if optimizer.needs_trainer and plan.trainer == "loop":
        raise InputError(
            f"`--optim {plan.optim}` is set up by transformers' trainer, a plain loop has none",
            "use `--trainer trl` or `--trainer transformers`",
        )
    if optimizer.layerwise and plan.gradient_accumulation_steps > 1:
        raise InputError(
            f"`--optim {plan.optim}` steps in every backward and cannot accumulate gradients",
            f"use `--gradient-accumulation-steps 1`, or `--optim {_not_layerwise(plan.optim)}`",
        )
    if optimizer.layerwise and plan.num_gpus > 1:
        raise InputError(
            f"`--optim {plan.optim}` is for one GPU: transformers refuses it under DDP",
            f"use `--num-gpus 1`, or `--optim {_not_layerwise(plan.optim)}`",
        )


def _not_layerwise(optim: str) -> str:
    return optim.removesuffix("_layerwise")


def flag_name(setting: str) -> str:
    """`per_device_train_batch_size` as the command line spells it."""
    return "--" + setting.replace("_", "-")


class ReasonedPlan(Struct, frozen=True, kw_only=True):
    """A plan with a reason for every setting."""

    plan: TrainingPlan
    reasons: Mapping[str, Reason]

    def __post_init__(self) -> None:
        assert set(self.reasons) == set(SETTING_NAMES), "every setting has its reason"

    def replace(self, origin: Origin, why: str, **changes: Any) -> ReasonedPlan:
        """A copy with some settings changed, for the one reason given."""
        reasons = {**self.reasons, **dict.fromkeys(changes, Reason(origin=origin, why=why))}
        return ReasonedPlan(plan=self.plan.replace(**changes), reasons=reasons)

    def explained(self, reasons: Mapping[str, Reason]) -> ReasonedPlan:
        """A copy with other reasons for some settings."""
        return ReasonedPlan(plan=self.plan, reasons={**self.reasons, **reasons})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """`{setting: {"value", "from", "why"}}`, as in the JSON output and the plan file."""
        return {
            name: {
                "value": _plain(getattr(self.plan, name)),
                "from": self.reasons[name].origin,
                "why": self.reasons[name].why,
            }
            for name in SETTING_NAMES
        }

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> ReasonedPlan:
        """Read back what `to_dict` wrote; raises InputError naming what is wrong."""
        for name in settings:
            if name not in SETTING_NAMES:
                raise UnknownNameError("plan setting", name, SETTING_NAMES)
        values, reasons = {}, {}
        for name in SETTING_NAMES:
            entry = settings.get(name)
            if not isinstance(entry, Mapping) or not {"value", "from", "why"} <= set(entry):
                raise InputError(f"plan setting `{name}` needs `value`, `from` and `why`")
            if entry["from"] not in get_args(Origin):
                raise InputError(
                    f"plan setting `{name}` is from `{entry['from']}`",
                    "`from` is one of: " + ", ".join(get_args(Origin)),
                )
            values[name] = typed_setting(name, entry["value"])
            reasons[name] = Reason(origin=entry["from"], why=str(entry["why"]))
        return ReasonedPlan(plan=TrainingPlan(**values), reasons=reasons)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def typed_setting(name: str, value: Any) -> Any:
    """A value read from a file, as the type of the setting; raises InputError."""
    if value is None and name in _OPTIONAL:
        return None
    kind = setting_type(name)
    if kind is tuple:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise InputError(f"plan setting `{name}` must be a list of names")
        return tuple(value)
    expected = (float, int) if kind is float else (kind,)
    fits = isinstance(value, expected) and (bool in expected or not isinstance(value, bool))
    if not fits:
        raise InputError(f"plan setting `{name}` has a value of the wrong type: {value!r}")
    return float(value) if kind is float else value


def setting_type(name: str) -> type:
    """What the setting's values are, where it has one."""
    return _OPTIONAL.get(name) or type(_DEFAULTS[name])


def parse_setting(name: str, text: str) -> Any:
    """The value of a setting as a person writes it on the command line.

    Raises InputError when the text cannot be read as the setting's type.
    """
    kind = setting_type(name)
    try:
        if kind is bool:
            return {"true": True, "yes": True, "false": False, "no": False}[text.lower()]
        if name == "report_to" and text == "none":
            return ()
        if kind is tuple:
            return tuple(part.strip() for part in _OUTER_PART.findall(text) if part.strip())
        if kind in (float, int):
            return kind(text)
    except (KeyError, ValueError):
        kinds: dict[type, str] = {bool: "true or false", float: "a number"}
        expected = kinds.get(kind, "a whole number")
        raise InputError(f"`{flag_name(name)} {text}`: {expected} is expected") from None
    return resolve_dtype(text) if name == "dtype" else text
