"""Relatives of LoRA, bottleneck adapters and Muon: real steps of tiny models on the processor."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from ftplan.launcher.dry_run.step import dry_run
from ftplan.launcher.emit import method_settings, training_arguments
from ftplan.launcher.training import bottlenecks
from ftplan.launcher.training.adapters import settle_adapters
from ftplan.launcher.training.build import (
    apply_method,
    count_trainable,
    keep_differentiable,
    quantization_config,
)
from ftplan.launcher.training.loftq import begin_with_what_is_lost
from ftplan.launcher.training.loop import planned_arguments
from ftplan.launcher.training.optimizers import MuonWithAdamW, settle_optimizer
from ftplan.launcher.training.trainer import PlannedTrainer
from ftplan.planner.combinations import CUDA_OPTIMIZERS
from ftplan.planner.errors import InputError
from ftplan.planner.families import spec_from_config
from ftplan.planner.optimizers import OPTIMIZERS
from ftplan.planner.plan import TrainingPlan, parse_setting
from ftplan.planner.trained import target_names
from tests.dry_runs import (
    GPT2,
    LLAMA,
    PHASES,
    QWEN3,
    SHAPE,
    WORKSPACE_BYTES,
    case,
    measured_peaks,
    real_trainer,
)
from tests.launcher_fixtures import CHATML, tiny_tokenizer
from tests.sweeps import swept

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

MIXTRAL = {
    **{"model_type": "mixtral", **SHAPE},
    **{"num_local_experts": 4, "num_experts_per_tok": 2},
}
# The usual 0.02 bounds a frozen head of this width to logits of about 1: nothing to learn.
CONFIGS = {
    family: {**config, "initializer_range": 0.2}
    for family, config in (
        *(("llama", LLAMA), ("qwen3", QWEN3)),
        *(("gpt2", GPT2), ("mixtral", MIXTRAL)),
    )
}
NF4: dict[str, Any] = {"quantization": "nf4"}
VARIANTS: dict[str, dict[str, Any]] = {
    "bottleneck": {"method": "bottleneck", "learning_rate": 5e-2},
    "loftq": {"method": "loftq", **NF4},
    "lora-plus": {"method": "lora-plus"},
    "lora-fa": {"method": "lora-fa"},
    "muon": {"method": "full", "optim": "muon"},
    "muon on adapters": {"method": "lora", "optim": "muon", "learning_rate": 5e-2},
}
# Each on Llama, and where modules are stored or routed otherwise.
CELLS = swept(
    [(name, family) for name in VARIANTS for family in CONFIGS],
    [
        *((name, "llama") for name in VARIANTS),
        *(("bottleneck", "gpt2"), ("loftq", "gpt2"), ("muon", "mixtral"), ("lora-fa", "qwen3")),
        *(("lora-plus", "mixtral"), ("muon on adapters", "gpt2")),
    ],
)
LENGTH, ROWS, STEPS = 24, 8, 12


def planned(config: dict[str, Any], **settings: Any) -> TrainingPlan:
    """A plan for the processor; adapters where the launcher would have them."""
    spec = spec_from_config(config, "tiny")
    given = {
        **{"dtype": "float32", "mixed_precision": "no", "loss": "stock", "max_length": LENGTH},
        **{"gradient_checkpointing": False, "per_device_train_batch_size": 4, "lora_rank": 4},
        **{"lora_alpha": 8, "learning_rate": 5e-3, "max_steps": STEPS, "warmup_ratio": 0.0},
        **{"optim": "adamw_torch", "target_modules": target_names(spec, ("all-linear",))},
    }
    return TrainingPlan(**{**given, **settings})


def base_model(config: dict[str, Any], plan: TrainingPlan, folder: Path) -> Any:
    """Random weights, in `folder`; loaded from there as the plan holds them."""
    if not folder.exists():
        torch.manual_seed(1)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        made.save_pretrained(folder)
    quantization = quantization_config(method_settings(plan))
    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if quantization is not None:
        keep_differentiable(loaded)
    return loaded


def rows() -> Dataset:
    """A pattern to be learnt: each token follows from the one before."""
    made = [[(7 * place + row) % 50 + 10 for place in range(LENGTH)] for row in range(ROWS)]
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in made])


def trainer_of(config: dict[str, Any], plan: TrainingPlan, folder: Path) -> Any:
    """The launcher's trainer, as `loop.build_trainer` puts it together."""
    planned_ones = training_arguments(plan, "cpu")
    arguments = planned_arguments("sft", planned_ones, str(folder / "checkpoints"))
    set_seed(0)
    model = base_model(config, plan, folder / "model")
    settings = method_settings(plan)
    peft_config = apply_method(model, plan.method, settings)
    trainer = PlannedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        row_lengths=[LENGTH] * ROWS,
        stock_loss=True,
        processing_class=tiny_tokenizer(CHATML, pad_token="<|bos|>"),
        peft_config=peft_config,
    )
    settle_adapters(trainer.model, settings)
    if plan.method == "loftq":
        begin_with_what_is_lost(trainer.model, folder / "model")
    settle_optimizer(trainer, plan.method, plan.optim, settings)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor(rows()["input_ids"][:2])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def loaded(plan: TrainingPlan, config: dict[str, Any], folder: Path) -> Any:
    """What a person loads of the run in `folder`."""
    base = base_model(config, plan, folder / "model")
    if plan.method == "bottleneck":
        return bottlenecks.load(folder / "adapter", base)
    if plan.method == "full":
        return AutoModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(folder / "adapter"))


@pytest.mark.parametrize(("name", "family"), CELLS)
def test_a_variant_learns_and_is_loaded_again(name: str, family: str, tmp_path: Path) -> None:
    config = CONFIGS[family]
    plan = planned(config, **VARIANTS[name])
    trainer = trainer_of(config, plan, tmp_path)
    counted = plan.resolved_method.count(spec_from_config(config, "tiny"), plan.method_settings)
    assert count_trainable(trainer.model) == counted.num_trainable_parameters
    before = logits(trainer.model)
    trainer.train()
    told = losses(trainer)
    assert len(told) == STEPS and all(map(math.isfinite, told))
    assert sum(told[-3:]) < 0.97 * sum(told[:3])
    trainer.save_model(str(tmp_path / "adapter"))
    after = logits(trainer.model)
    assert not torch.allclose(before, after)
    # Beside a quantized base TRL holds adapters in bf16, and PEFT loads them in fp32.
    near = {"atol": 5e-2, "rtol": 2e-2} if "quantization" in VARIANTS[name] else {}
    torch.testing.assert_close(logits(loaded(plan, config, tmp_path)), after, **near)


# --- memory


@pytest.mark.parametrize(("name", "family"), CELLS)
def test_a_dry_step_takes_what_the_real_one_takes(name: str, family: str, tmp_path: Path) -> None:
    config = CONFIGS[family]
    targets = target_names(spec_from_config(config, "tiny"), ("all-linear",))
    dry_case = case(config, target_modules=targets, **VARIANTS[name])
    trainer = real_trainer(dry_case, tmp_path)
    settle_adapters(trainer.model, method_settings(dry_case.plan))
    measured = measured_peaks(trainer)
    done = dry_run(dry_case)
    assert done.num_trainable_parameters == count_trainable(trainer.model)
    peaks = done.record.phase_peaks()
    in_16_bits = name.startswith("muon") or name == "lora-fa"
    for phase in PHASES:
        unseen = WORKSPACE_BYTES if in_16_bits and phase == "optimizer step" else 0
        predicted = peaks[phase].allocated_bytes
        assert predicted <= 1.01 * measured[phase], phase
        assert predicted >= 0.99 * measured[phase] - unseen, phase


# --- LoRA's relatives


def test_lora_plus_falls_faster_than_lora(tmp_path: Path) -> None:
    """At the rates that the policy gives both: twice LoRA+'s for LoRA."""
    fallen = {}
    for method, rate in (("lora", 2e-3), ("lora-plus", 1e-3)):
        plan = planned(LLAMA, method=method, learning_rate=rate)
        trainer = trainer_of(LLAMA, plan, tmp_path / method)
        trainer.train()
        told = losses(trainer)
        fallen[method] = told[0] - told[-1]
    assert fallen["lora-plus"] > 2 * fallen["lora"] > 0


def test_lora_fa_trains_the_second_matrices_alone_after_a_reference_was_asked(
    tmp_path: Path,
) -> None:
    """TRL switches adapters off and on for it, and PEFT then trains what the adapter has."""
    trainer = trainer_of(LLAMA, planned(LLAMA, method="lora-fa"), tmp_path)
    before = count_trainable(trainer.model)
    with trainer.model.disable_adapter():
        pass
    assert count_trainable(trainer.model) == before


def takes_groups(optim: str) -> bool:
    return not OPTIMIZERS[optim].needs_trainer


@pytest.mark.parametrize("optim", sorted(filter(takes_groups, OPTIMIZERS)))
def test_lora_plus_has_two_rates_with_every_optimizer_that_takes_groups(
    optim: str, tmp_path: Path
) -> None:
    if OPTIMIZERS[optim].module:
        pytest.importorskip(OPTIMIZERS[optim].module or "")
    plan = planned(LLAMA, method="lora-plus", optim=optim, loraplus_lr_ratio=4.0)
    trainer = trainer_of(LLAMA, plan, tmp_path)
    optimizer = trainer.create_optimizer()
    rates = {
        name: round(float(group["lr"]), 9)
        for group in optimizer.param_groups
        for name, p in trainer.model.named_parameters()
        if any(p is other for other in group["params"])
    }
    assert {r for n, r in rates.items() if "lora_A" in n} == {plan.learning_rate}
    assert {r for n, r in rates.items() if "lora_B" in n} == {4 * plan.learning_rate}


def test_loftq_begins_nearer_to_the_model_than_the_quantized_base(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        config, folder = CONFIGS[family], tmp_path / family
        plan = planned(config, lora_rank=16, **VARIANTS["loftq"])
        trainer = trainer_of(config, plan, folder)
        whole = logits(AutoModelForCausalLM.from_pretrained(folder / "model"))
        begun = logits(trainer.model)
        with trainer.model.disable_adapter():
            quantized = logits(trainer.model)
        assert torch.dist(begun, whole) < 0.85 * torch.dist(quantized, whole), family


def test_loftq_says_which_weight_it_does_not_find(tmp_path: Path) -> None:
    plan = planned(LLAMA, **VARIANTS["loftq"])
    trainer = trainer_of(LLAMA, plan, tmp_path)
    other = {**LLAMA, "num_hidden_layers": 1}
    base_model(other, planned(LLAMA), tmp_path / "other")
    with pytest.raises(InputError, match=r"finds no `model\.layers\.1\.self_attn\.q_proj\.weight`"):
        begin_with_what_is_lost(trainer.model, tmp_path / "other")


def test_a_4_bit_base_gives_gradients_after_an_evaluation(tmp_path: Path) -> None:
    """bitsandbytes would pack it for a kernel without any, on processors with bf16."""
    plan = planned(LLAMA, method="qlora", **NF4)
    trainer = trainer_of(LLAMA, plan, tmp_path)
    model, ids = trainer.model, torch.tensor(rows()["input_ids"])

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found = [p.grad for n, p in model.named_parameters() if "0.self_attn.q_proj.lora_B" in n]
        return found[0].clone()

    before = gradient()
    logits(model)
    torch.testing.assert_close(gradient(), before)


# --- optimizers of transformers


@pytest.mark.parametrize(
    "optim",
    [
        *("adafactor", "adamw_8bit", "apollo_adamw", "apollo_adamw_layerwise", "galore_adafactor"),
        *("galore_adamw", "galore_adamw_layerwise", "lion_32bit", "lion_8bit", "lomo"),
        *("paged_adamw_8bit", "schedule_free_adamw", "stable_adamw"),
    ],
)
def test_an_optimizer_takes_steps_on_the_processor(optim: str, tmp_path: Path) -> None:
    if OPTIMIZERS[optim].module:
        pytest.importorskip(OPTIMIZERS[optim].module or "")
    config = CONFIGS["llama"]
    trainer = trainer_of(config, planned(config, method="full", optim=optim), tmp_path)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert sum(losses(trainer)[-3:]) < 0.97 * sum(losses(trainer)[:3])
    assert not any(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize("optim", sorted(CUDA_OPTIMIZERS))
def test_an_optimizer_that_calls_cuda_does_not(optim: str, tmp_path: Path) -> None:
    pytest.importorskip(OPTIMIZERS[optim].module or "")
    config = CONFIGS["llama"]
    trainer = trainer_of(config, planned(config, method="full", optim=optim), tmp_path)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        trainer.train()


# --- Muon


def test_muon_takes_hidden_matrices_and_adamw_the_rest(tmp_path: Path) -> None:
    for family, matrices in (("llama", 14), ("gpt2", 8), ("mixtral", 10)):
        config = CONFIGS[family]
        trainer = trainer_of(config, planned(config, **VARIANTS["muon"]), tmp_path / family)
        optimizer = trainer.create_optimizer()
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        hidden = [names[id(p)] for p in optimizer.param_groups[0]["params"]]
        assert len(hidden) == matrices, hidden
        assert not [n for n in hidden if "embed" in n or "wte" in n or "lm_head" in n]
        beside = [p for group in optimizer.param_groups[1:] for p in group["params"]]
        assert len(hidden) + len(beside) == len(names)


def test_muons_update_is_as_large_as_adamws() -> None:
    """A root mean square of 0.2 learning rates (arXiv 2502.16982, section 2.2)."""
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(96, 64)), torch.nn.Parameter(torch.ones(8))
    before = matrix.detach().clone()
    optimizer = MuonWithAdamW([matrix], [{"params": [vector]}], lr=0.1, weight_decay=0.0)
    for parameter in (matrix, vector):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert (matrix.detach() - before).square().mean().sqrt() == pytest.approx(0.02, rel=0.2)
    assert (vector.detach() - 1).abs().mean() == pytest.approx(0.1, rel=0.01)


def test_muon_goes_on_from_a_checkpoint() -> None:
    torch.manual_seed(0)
    twins = [(torch.nn.Parameter(torch.ones(8, 4)), torch.nn.Parameter(torch.ones(4)))] * 2
    twins = [copy.deepcopy(pair) for pair in twins]
    optimizers = [MuonWithAdamW([m], [{"params": [v]}], lr=0.1, weight_decay=0.0) for m, v in twins]
    gradients = [(torch.randn(8, 4), torch.randn(4)) for _ in range(2)]
    for number, pair in enumerate(gradients):
        for (m, v), optimizer in zip(twins, optimizers, strict=True):
            m.grad, v.grad = pair[0].clone(), pair[1].clone()
            optimizer.step()
        if number == 0:
            optimizers[1] = MuonWithAdamW(
                [twins[1][0]], [{"params": [twins[1][1]]}], lr=9.0, weight_decay=0.0
            )
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for left, right in zip(*twins, strict=True):
        torch.testing.assert_close(left, right)


# --- bottlenecks


def test_bottlenecks_begin_near_the_identity(tmp_path: Path) -> None:
    plan = planned(LLAMA, method="bottleneck")
    model = base_model(LLAMA, plan, tmp_path / "model")
    before = logits(model)
    apply_method(model, plan.method, method_settings(plan))
    after = logits(model)
    assert not torch.equal(before, after)
    assert torch.dist(before, after) < 0.01 * before.norm()


def test_a_run_with_bottlenecks_goes_on_from_a_checkpoint_of_them_alone(tmp_path: Path) -> None:
    plan = planned(
        CONFIGS["llama"], method="bottleneck", save_steps=6, lr_scheduler_type="constant"
    )
    whole = trainer_of(LLAMA, plan, tmp_path)
    whole.train()
    (checkpoint,) = (p for p in (tmp_path / "checkpoints").iterdir() if p.name.endswith("-6"))
    trained = 4 * count_trainable(whole.model)
    assert (checkpoint / bottlenecks.WEIGHTS_FILE).stat().st_size < trained + 4096
    resumed = trainer_of(LLAMA, plan, tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-1] == pytest.approx(losses(whole)[-1], rel=1e-4)


def test_bottlenecks_of_another_model_are_refused(tmp_path: Path) -> None:
    plan = planned(LLAMA, method="bottleneck")
    trainer = trainer_of(LLAMA, plan, tmp_path)
    trainer.save_model(str(tmp_path / "adapter"))
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template == CHATML
    other = base_model({**LLAMA, "num_hidden_layers": 1}, plan, tmp_path / "other")
    with pytest.raises(InputError, match="are of another model"):
        bottlenecks.load(tmp_path / "adapter", other)
    with pytest.raises(InputError, match="has no bottleneck adapters"):
        bottlenecks.load(tmp_path / "model")
    alone = bottlenecks.load(tmp_path / "adapter")
    torch.testing.assert_close(logits(alone), logits(trainer.model))


def test_a_saved_adapter_names_its_base(tmp_path: Path) -> None:
    plan = planned(LLAMA, method="lora-fa")
    trainer = trainer_of(LLAMA, plan, tmp_path)
    trainer.save_model(str(tmp_path / "adapter"))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(trainer.model))


# --- prompts

TEXT = 'prompt_tuning_init=TEXT,prompt_tuning_init_text="A question, then"'
PROMPTS: dict[str, tuple[str, str]] = {
    "random": ("prompt-tuning", "prompt_tuning_init=RANDOM"),
    "vocabulary": ("prompt-tuning", "prompt_tuning_init=SAMPLE_VOCAB"),
    "text": ("prompt-tuning", TEXT),
    "MLP": ("p-tuning", "encoder_hidden_size=32"),
    "LSTM": ("p-tuning", "encoder_reparameterization_type=LSTM,encoder_hidden_size=32"),
    "deep prompts": ("p-tuning-v2", ""),
    "deep prompts by a network": ("prefix-tuning", "prefix_projection=true"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_learns_and_is_loaded_again(name: str, tmp_path: Path) -> None:
    config, (method, options) = CONFIGS["llama"], PROMPTS[name]
    given = parse_setting("peft_config", options)
    plan = planned(config, method=method, peft_config=given, learning_rate=5e-2)
    tokenizer = tiny_tokenizer(CHATML, pad_token="<|bos|>")
    base_model(config, plan, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = trainer_of(config, plan, tmp_path)
    counted = plan.resolved_method.count(spec_from_config(config, "tiny"), plan.method_settings)
    assert count_trainable(trainer.model) == counted.num_trainable_parameters
    if name == "text":
        words = tokenizer("A question, then")["input_ids"]
        begun = trainer.model.prompt_encoder["default"].embedding.weight[: len(words)]
        rows_of_words = trainer.model.get_base_model().get_input_embeddings().weight[words]
        torch.testing.assert_close(begun, rows_of_words[: len(begun)])
    trainer.train()
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])
    trainer.save_model(str(tmp_path / "adapter"))
    after = logits(trainer.model)
    torch.testing.assert_close(logits(loaded(plan, config, tmp_path)), after)
