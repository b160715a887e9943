"""From a plan to the files that run it: pure functions of text and mappings."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftplan.launcher import remote_code
from ftplan.launcher.deepspeed import deepspeed_config
from ftplan.launcher.host import CPU_THREADS
from ftplan.launcher.parallelism import parallelism_config
from ftplan.launcher.run_dir import RunDir
from ftplan.planner.cycles import CYCLE_SETTINGS
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device, DeviceKind
from ftplan.planner.objectives import LOSS_SETTINGS, beta_of
from ftplan.planner.plan import LOSSES, QUANTIZATIONS, TrainingPlan, flag_name
from ftplan.planner.prequantized import PREQUANTIZED
from ftplan.planner.sharding import ZERO
from ftplan.planner.trained import ALL_LINEAR

TRAIN_MODULE = "ftplan.launcher.train"

# Settings of which runs are launched with these values only.
LAUNCHED: dict[str, tuple[Any, ...]] = {
    # torch's ring attention has kernels of GPUs alone, on which no run has been tried.
    "cp_size": (1,),
    "packing": (False,),
    "quantization": tuple(q for q in QUANTIZATIONS if q not in PREQUANTIZED),
    "loss": tuple(loss for loss in LOSSES if loss != "triton_ce"),
}


def accelerate_config(plan: TrainingPlan, device: Device) -> dict[str, Any]:
    """accelerate's configuration, of the first machine. Raises InputError for what is not launched.

    Several processes on processors are started as if they were on GPUs: with `use_cpu`, `accelerate
    launch` starts one process, whatever `num_processes` says (accelerate 1.15,
    `commands/launch.py`, `launch_command`).
    """
    check_launched(dataclasses.asdict(plan))
    several = plan.num_gpus > 1
    return {
        "compute_environment": "LOCAL_MACHINE",
        **_distribution(plan),
        "num_machines": plan.num_machines,
        "num_processes": plan.num_gpus,
        "machine_rank": 0,
        # A free port, so that runs beside each other do not meet; of several machines the engine
        # says which.
        **({"main_process_port": 0} if several and plan.num_machines == 1 else {}),
        "use_cpu": device.kind == "cpu" and not several and plan.sharding not in ZERO,
        "rdzv_backend": "static",
        "same_network": True,
        "main_training_function": "main",
        "downcast_bf16": "no",
        "debug": False,
    }


def _distribution(plan: TrainingPlan) -> dict[str, Any]:
    """How processes share the work: each a copy of the model, or each a part of it.

    accelerate refuses to be told of a precision beside a configuration of DeepSpeed's
    (`DeepSpeedPlugin._deepspeed_config_checks`), which train.yaml has.
    """
    if plan.sharding in ZERO:
        init = {"zero3_init_flag": plan.sharding == "zero3"}
        return {"distributed_type": "DEEPSPEED", "deepspeed_config": init}
    more: dict[str, Any] = {"mixed_precision": plan.mixed_precision}
    if sizes := parallelism_config(plan):
        more["parallelism_config"] = sizes
    if plan.sharding == "fsdp":
        return {"distributed_type": "FSDP", "fsdp_config": fsdp_config(plan), **more}
    return {"distributed_type": "MULTI_GPU" if plan.num_gpus > 1 else "NO", **more}


def fsdp_config(plan: TrainingPlan) -> dict[str, Any]:
    """accelerate's settings of FSDP2. The layers to wrap are those that the model names itself
    (`_no_split_modules`); checkpointing is the trainer's; checkpoints hold each process's part."""
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": plan.offload == "parameters",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_activation_checkpointing": False,
    }


def check_launched(settings: Mapping[str, Any]) -> None:
    """Raises InputError for what ftplan predicts and does not launch."""
    for name, launched in LAUNCHED.items():
        value = settings.get(name, launched[0])
        if value not in launched:
            shown = flag_name(name) + ("" if value is True else f" {value}")
            raise InputError(
                f"ftplan does not launch runs with `{shown}`",
                f"`ftplan estimate MODEL` predicts them; leave out `{flag_name(name)}` to launch",
            )


def training_arguments(plan: TrainingPlan, kind: DeviceKind) -> dict[str, Any]:
    """Arguments of TRL's configuration that follow from the plan."""
    return {
        **_objective_arguments(plan),
        "per_device_train_batch_size": plan.per_device_train_batch_size,
        "per_device_eval_batch_size": plan.per_device_train_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "gradient_checkpointing_kwargs": _checkpointing_arguments(plan),
        "optim": plan.optim,
        **({"optim_target_modules": ALL_LINEAR} if plan.optimizer.low_rank else {}),
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": plan.lr_scheduler_type,
        "warmup_ratio": plan.warmup_ratio,
        "weight_decay": plan.weight_decay,
        "max_grad_norm": plan.max_grad_norm,
        "num_train_epochs": plan.num_train_epochs,
        "max_steps": plan.max_steps or -1,
        "save_steps": plan.save_steps,
        "bf16": plan.mixed_precision == "bf16",
        "fp16": plan.mixed_precision == "fp16",
        "seed": plan.seed,
        "use_cpu": kind == "cpu",
    }


def _checkpointing_arguments(plan: TrainingPlan) -> dict[str, Any]:
    """What transformers' trainer passes to `activation_checkpointing_enable`."""
    some = {"every_n_layers": plan.every_n_layers} if plan.every_n_layers > 1 else {}
    return {"use_reentrant": plan.use_reentrant, **some}


def _objective_arguments(plan: TrainingPlan) -> dict[str, Any]:
    """What only the configuration of the plan's objective has."""
    if plan.resolved_objective.generates:
        return {
            "num_generations": plan.num_generations,
            "max_completion_length": plan.max_completion_length,
            "steps_per_generation": plan.steps_per_generation,
            "beta": beta_of(plan),
            "num_generations_eval": 1,
        }
    arguments: dict[str, Any] = {"max_length": plan.max_length}
    if plan.resolved_method.fills_cache and not plan.resolved_objective.scores:
        # A mixture's loss for balanced experts takes the mask of a row for that of its tokens, and
        # fails where keys stand in front (transformers 5.23, `load_balancing_loss_func`). What it
        # is for, the router, is frozen.
        arguments["router_aux_loss_coef"] = 0.0
    if plan.objective == "sft":
        arguments["packing"] = plan.packing
    elif plan.resolved_objective.has_reference:
        arguments["precompute_ref_log_probs"] = plan.precompute_ref_log_probs
    given = {name: getattr(plan, name) for name in LOSS_SETTINGS}
    return arguments | {name: value for name, value in given.items() if value is not None}


def method_settings(plan: TrainingPlan, token_ids: Sequence[int] | None = None) -> dict[str, Any]:
    """What `training.build` needs to know of the plan. `token_ids`: of its trained tokens; where
    there is no tokenizer, as many others stand for them."""
    tokens = range(len(plan.trained_tokens)) if token_ids is None else token_ids
    return {
        "objective": plan.objective,
        "quantization": plan.quantization,
        "double_quant": plan.double_quant,
        # What divides parameters among GPUs divides only those of one dtype.
        **({"tp_size": plan.tp_size} if plan.tp_size > 1 else {}),
        "quant_storage": plan.dtype if plan.shards_parameters else "uint8",
        "dtype": plan.dtype,
        "compute_dtype": plan.quantized_compute_dtype,
        "mixed_precision": plan.mixed_precision,
        "attn_implementation": plan.attn_implementation,
        "lora_rank": plan.lora_rank,
        "lora_alpha": plan.lora_alpha,
        "lora_dropout": plan.lora_dropout,
        "loraplus_lr_ratio": plan.loraplus_lr_ratio,
        "target_modules": list(plan.target_modules),
        "modules_to_save": list(plan.modules_to_save),
        "trained_token_ids": list(tokens),
        "peft_config": list(plan.peft_config),
        "num_tasks": plan.num_tasks,
        "autocast_adapter_dtype": plan.autocast_adapter_dtype,
        "num_trainable_layers": plan.num_trainable_layers,
        "trainable_modules": list(plan.trainable_modules),
        "trains_biases": plan.method == "bitfit",
        **{name: getattr(plan, name) for name in CYCLE_SETTINGS},
    }


def train_config(
    plan: TrainingPlan,
    device: Device,
    *,
    model: str,
    data: Mapping[str, Any],
    eval_data: Mapping[str, Any] | None,
    hashes: Mapping[str, str],
    test_share: float = 0.0,
    reward_model: Mapping[str, str | None] | None = None,
    template_text: str | None = None,
    token_ids: Sequence[int] | None = None,
    tasks: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """train.yaml: all that the training process reads. Relative paths are within the run.

    `template_text`: None for the tokenizer's own. `token_ids`: of the trained tokens. `tasks`: of
    rows that are of several ones, as `launcher.data.tasks.RowTasks` has them.
    """
    return {
        "model": model,
        "data": data,
        "eval_data": eval_data,
        "test_share": test_share,
        "tasks": tasks,
        "task_weighting": {
            "weighting": plan.task_weighting,
            "temperature": plan.task_temperature,
            "weights": list(plan.task_weights),
        },
        "overlong": plan.overlong,
        "hashes": dict(hashes),
        "template": {"name": plan.chat_template, "text": template_text},
        "add_tokens": list(plan.add_tokens),
        "method": plan.method,
        "method_settings": method_settings(plan, token_ids),
        "trainer": plan.trainer,
        "loss": plan.loss,
        "training_arguments": training_arguments(plan, device.kind),
        "num_processes": plan.data_parallel_size,
        "deepspeed": deepspeed_config(plan),
        "report_to": list(plan.report_to),
        "rewards": rewards(plan, reward_model) if plan.resolved_objective.generates else None,
    }


def rewards(plan: TrainingPlan, reward_model: Mapping[str, str | None] | None) -> dict[str, Any]:
    """What judges completions. `reward_model`: its folders, `model` and `adapter`."""
    return {
        "reward_model": plan.reward_model,
        "rules": list(plan.reward),
        **(reward_model or {"model": None, "adapter": None}),
        "dtype": plan.compute_dtype,
        "attn_implementation": plan.attn_implementation,
        "rows": plan.per_device_train_batch_size,
        "max_length": plan.max_length,
    }


def launch_command(
    run: RunDir,
    checkpoint: Path | None = None,
    *,
    again: bool = False,
    trusts_code: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> list[str]:
    """`accelerate launch` of the training module on a run directory. `checkpoint`: of it, which the
    run goes on from; `again`: what it has measured so far is kept where there is none;
    `trusts_code`: of the model's repository, which may run; `sizes`: what is otherwise than in
    accelerate.yaml."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(run.accelerate)]
    command += [word for name, size in (sizes or {}).items() for word in (f"--{name}", str(size))]
    command += ["-m", TRAIN_MODULE, str(run.root)]
    command += [remote_code.FLAG] if trusts_code else []
    if checkpoint:
        return [*command, "--resume", checkpoint.name]
    return [*command, "--resume"] if again else command


def environment_changes(
    devices: Sequence[Device], plan: TrainingPlan, num_cores: int
) -> dict[str, str]:
    """What the child's environment has on top of the parent's, to run on these devices."""
    changed = engine_environment(devices[0].kind, num_cores // plan.num_gpus)
    return changed | (_only(devices) if devices[0].kind == "cuda" else {})


def engine_environment(kind: DeviceKind, num_threads: int) -> dict[str, str]:
    """The same where an engine gives each process its devices.

    PYTHONSAFEPATH keeps a `torch.py` in the user's folder from replacing torch. accelerate
    would set one thread a process unless OMP_NUM_THREADS says otherwise.
    """
    changed = {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": str(max(1, num_threads)),
    }
    if kind == "cuda":
        return changed | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return changed | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", **CPU_THREADS}


def _only(devices: Sequence[Device]) -> dict[str, str]:
    """What leaves these GPUs visible. Of AMD's, ROCm's runtime takes the UUID or, of cards without
    one, the number, and HIP numbers anew what that leaves."""
    names = [device.uuid for device in devices if device.uuid]
    if devices[0].vendor == "amd":
        numbers = ",".join(str(number) for number in range(len(devices)))
        left = {"HIP_VISIBLE_DEVICES": numbers, "CUDA_VISIBLE_DEVICES": numbers}
        mixed = ",".join(device.uuid or str(device.index) for device in devices)
        return {"ROCR_VISIBLE_DEVICES": mixed, **left}
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)} if len(names) == len(devices) else {}


def launch_environment(
    environ: Mapping[str, str], devices: Sequence[Device], plan: TrainingPlan, num_cores: int
) -> dict[str, str]:
    """The child's environment: the parent's, made safe and quiet. A thread count that the
    person has set is kept."""
    merged = {**environ, **environment_changes(devices, plan, num_cores)}
    if "OMP_NUM_THREADS" in environ:
        merged["OMP_NUM_THREADS"] = environ["OMP_NUM_THREADS"]
    return merged


def shell_line(command: list[str], settings: Mapping[str, str]) -> str:
    """The command as one line for a shell, with the environment it needs."""
    assignments = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    return " ".join([*assignments, shlex.join(command)])
