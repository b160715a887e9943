"""What the host takes for one operation of a training step: `python -m benchmarks.launching`.

Llama-shaped models of the usual number of layers, so narrow that computing takes no time, are
trained on one thread of the processor by transformers and PEFT: what is left is Python, torch's
dispatcher and autograd. A GPU's kernels are launched besides. Operations that only look at tensors
are not counted. The tape's own count stands beside.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

from ftplan.planner.compiled_step import compiled_step
from ftplan.planner.families import spec_from_config
from ftplan.planner.hardware_spec import Device
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stack import OWN_STACK

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 30,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LENGTH = 8
REPEATS = 8

CPU = Device(
    name="processor",
    kind="cpu",
    total_bytes=1,
    free_bytes=1,
    memory_bandwidth_bytes_per_second=1.0,
    peak_flops_per_second={"float32": 1.0},
)

# Operations that make no tensor's values: they look at one, or ask for memory.
NO_KERNEL = frozenset(
    [
        "_local_scalar_dense",
        "_unsafe_view",
        "alias",
        "as_strided",
        "detach",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
    ]
)


def plans() -> list[TrainingPlan]:
    """Full tuning and LoRA on all linear layers, with and without checkpointing and autocast."""
    return [
        TrainingPlan(
            method=method,
            dtype="float32",
            mixed_precision=mixed_precision,
            gradient_checkpointing=checkpointing,
            attn_implementation="sdpa",
            loss="stock",
            optim="adamw_torch",
            per_device_train_batch_size=1,
            max_length=LENGTH,
        )
        for method in ("full", "lora")
        for mixed_precision in ("no", "bf16")
        for checkpointing in (False, True)
    ]


def counted(plan: TrainingPlan) -> int:
    """Kernels of forward and backward by the closed form."""
    model = spec_from_config(CONFIG, name="narrow")
    return compiled_step(model, plan, 1, LENGTH, CPU, OWN_STACK).trace.num_kernels


def dispatched(step: Callable[[], object]) -> int:
    """Operations that torch carries out in a step, those that launch no kernel left out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.number += func.overloadpacket.__name__ not in NO_KERNEL
            return func(*args, **(kwargs or {}))

    with Counting() as counting:
        step()
    return counting.number


def step_of(plan: TrainingPlan) -> Callable[[], None]:
    """Forward and backward of a model that transformers and PEFT build."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**CONFIG)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.config.use_cache = False
    if plan.method == "lora":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    rows = torch.zeros((1, LENGTH), dtype=torch.long)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.autocast):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()

    return step


def main() -> int:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("method  autocast  checkpointing  dispatched  by the tape  µs an operation")
    steps = [(plan, step_of(plan)) for plan in plans()]
    seconds = {id(plan): [] for plan, _ in steps}
    for _ in range(REPEATS):
        for plan, step in steps:
            began = time.process_time()
            step()
            seconds[id(plan)].append(time.process_time() - began)
    for plan, step in steps:
        operations = dispatched(step)
        each = min(seconds[id(plan)]) / operations
        print(
            f"{plan.method:6}  {plan.mixed_precision:8}  {plan.gradient_checkpointing!s:13}  "
            f"{operations:10,}  {counted(plan):11,}  {1e6 * each:.1f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
