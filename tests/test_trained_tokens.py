"""Tokens that are trained: what they take, what is refused, and that a tuned model stops."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import torch

from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.launching import write_run
from ftplan.launcher.planning import make_plan
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training import loop
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.families import spec_from_config
from ftplan.planner.memory import estimate_memory
from ftplan.planner.methods import resolve_method
from ftplan.planner.plan import TrainingPlan
from tests.dry_runs import GPT2, GPT2_MODULES, LLAMA, QWEN3, case
from tests.launcher_fixtures import tiny_tokenizer
from tests.sweeps import only_whole
from tests.test_adapter_memory import TOLERANCE, WIDE_GPT2, WIDE_LLAMA, relative_error
from tests.test_dry_run_methods import compare

pytestmark = pytest.mark.train

NEW = ("<tool>", "<think>")
TIED = {**WIDE_LLAMA, "tie_word_embeddings": True}
WIDE_QWEN3 = {**QWEN3, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


# --- what they take


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        pytest.param(LLAMA, "stock", id="untied"),
        pytest.param(QWEN3, "trl-fused", id="tied, fused loss"),
        pytest.param({**GPT2, "vocab_size": 4000}, "stock", id="GPT-2"),
        only_whole((LLAMA, "trl-fused"), "untied, fused loss"),
        only_whole((QWEN3, "stock"), "tied"),
    ],
)
def test_a_dry_run_of_trained_rows_takes_what_they_take_for_real(
    config: dict[str, Any], loss: str, tmp_path: Path
) -> None:
    modules = {"target_modules": GPT2_MODULES} if config["model_type"] == "gpt2" else {}
    compare(case(config, add_tokens=NEW, loss=loss, **modules), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"config": WIDE_LLAMA},
        {"config": TIED},
        only_whole({"config": WIDE_QWEN3}, "qwen3"),
        {"config": WIDE_GPT2},
        {"config": TIED, "loss": "trl-fused"},
        {"config": WIDE_LLAMA, "loss": "trl-fused", "quantization": "nf4"},
        {"config": TIED, "dtype": "float32", "gradient_checkpointing": True},
        only_whole({"config": TIED, "objective": "dpo", "loss": "trl-fused"}),
        {"config": WIDE_LLAMA, "method": "vera", "modules_to_save": ("embed_tokens", "lm_head")},
    ],
    ids=lambda given: "-".join(str(v) for k, v in given.items() if k != "config") or "plain",
)
def test_the_closed_form_of_trained_rows_is_the_dry_runs(settings: dict[str, Any]) -> None:
    given = dict(settings)
    config = {**given.pop("config"), "vocab_size": 40_000}
    assert abs(relative_error(config, train_tokens=NEW, **given)) < TOLERANCE


@pytest.mark.parametrize(
    ("tied", "method", "rows"), [(True, "lora", 1), (False, "lora", 2), (False, "full", 0)]
)
def test_rows_are_counted_once_where_ends_are_tied(tied: bool, method: str, rows: int) -> None:
    spec = spec_from_config({**LLAMA, "tie_word_embeddings": tied}, "tiny")
    numbers = [
        resolve_method(method)
        .count(spec, TrainingPlan(method=method, **more).method_settings)
        .num_trainable_parameters
        for more in ({}, {"train_tokens": NEW})
    ]
    assert numbers[1] - numbers[0] == rows * len(NEW) * spec.hidden_size


def test_a_grown_vocabulary_costs_rows_of_both_ends() -> None:
    small, large = (spec_from_config({**LLAMA, "vocab_size": size}, "tiny") for size in (500, 502))
    weights = [
        estimate_memory(spec, TrainingPlan()).phases[0].allocated_peak_bytes
        for spec in (small, large)
    ]
    assert weights[1] - weights[0] == pytest.approx(2 * 2 * 2 * LLAMA["hidden_size"], abs=1024)


# --- what is refused


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "prompt-tuning"},
        {"method": "bitfit"},
        {"method": "freeze"},
        {"method": "vera"},
        {"peft_config": ("trainable_token_indices=[3]",)},
    ],
    ids=str,
)
def test_methods_that_would_not_train_them_say_which_do(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        TrainingPlan(add_tokens=NEW, **settings)
    said = f"{caught.value.message} {caught.value.hint}"
    assert "--method lora" in said or "--train-tokens" in said


def test_a_head_with_a_bias_is_refused_as_peft_forgets_it() -> None:
    phi = {**LLAMA, "model_type": "phi", "partial_rotary_factor": 0.5}
    with pytest.raises(InputError, match="leaves out the bias") as caught:
        plan = TrainingPlan(train_tokens=NEW)
        resolve_method("lora").count(spec_from_config(phi, "tiny"), plan.method_settings)
    assert "--modules-to-save embed_tokens,lm_head" in (caught.value.hint or "")


LEARNING_RATES = {"full": 0.005, "lora": 0.02, "ia3": 0.02}


# --- from the rows to a model that stops


def tiny_model(folder: Path, *, tied: bool) -> Path:
    """A base model: its texts end with `<|bos|>`, and it has no chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(eos_token="<|bos|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=tied,
        initializer_range=0.25,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TUNED = [
    "lora, tied",
    pytest.param("lora, untied", marks=pytest.mark.slow),
    only_whole("full, tied"),
    pytest.param("ia3, untied", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=TUNED)
def tuned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """A few rows learnt by heart in ChatML, which the tokenizer gets two tokens for."""
    method, ends = request.param.split(", ")
    folder = tmp_path_factory.mktemp(method)
    model = tiny_model(folder / "tiny", tied=ends == "tied")
    rows = [
        {"instruction": f"Say {word}.", "output": f"<tool>{word}"}
        for word in ("here", "there", "answer", "question")
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        planned = make_plan(
            Ui(as_json=True),
            asked=DataAsked(paths=(str(data),), eval_paths=(str(data),)),
            model_name=str(model),
            named_device=None,
            given={
                **{"method": method, "chat_template": "chatml", "add_tokens": ("<tool>",)},
                **{"max_steps": 100, "learning_rate": LEARNING_RATES[method]},
                "warmup_ratio": 0.1,
            },
            runs_dir=folder / "runs",
            for_launch=True,
        )
        run = write_run(planned, "run", folder / "runs")
        assert loop.train(run, resume=False) == 0
    return SimpleNamespace(run=run, planned=planned, base=model, method=method)


def loaded(tuned: SimpleNamespace) -> tuple[Any, Any]:
    """As docs/data.md says, with plain transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    run: RunDir = tuned.run
    folder = run.model if tuned.method == "full" else run.adapter
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tuned.method == "full":
        return AutoModelForCausalLM.from_pretrained(folder), tokenizer
    base = AutoModelForCausalLM.from_pretrained(tuned.base)
    base.resize_token_embeddings(max(len(tokenizer), base.config.vocab_size))
    model = PeftModel.from_pretrained(base, str(folder))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, tokenizer


def test_a_tuned_model_stops_where_its_answers_ended(tuned: SimpleNamespace) -> None:
    model, tokenizer = loaded(tuned)
    assert tokenizer.padding_side == "left"
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Say {word}."}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for word in ("here", "question")
    ]
    batch = tokenizer(asked, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        answers = model.generate(**batch, max_new_tokens=20, do_sample=False)
    new = answers[:, batch["input_ids"].shape[1] :]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert new.shape[1] < 20
    for row, said in zip(new.tolist(), ("<tool>here", "<tool>question"), strict=True):
        assert tokenizer.decode(row[: row.index(end)]) == said


def test_what_is_saved_gives_the_logits_of_the_run(tuned: SimpleNamespace) -> None:
    """Loaded twice, so that rows which begin by chance would show."""
    first, tokenizer = loaded(tuned)
    second, _ = loaded(tuned)
    ids = torch.tensor([tokenizer("Say <tool>here.")["input_ids"]])
    with torch.no_grad():
        logits = [model.eval()(ids).logits for model in (first, second)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    record = tuned.run.read_record()
    assert record["tokenizer"]["added_tokens"] == ["<tool>"]
    assert record["evaluation"]["after"] < 0.1


def test_as_many_numbers_are_trained_as_were_planned(tuned: SimpleNamespace) -> None:
    record, plan = tuned.run.read_record(), tuned.planned.chosen.plan
    spec = tuned.planned.source.spec
    assert spec.vocab_size == record["tokenizer"]["vocab_size"]
    counted = plan.resolved_method.count(spec, plan.method_settings)
    assert record["num_trainable_parameters"] == counted.num_trainable_parameters


def test_the_plan_says_where_its_tokens_are_from(tuned: SimpleNamespace) -> None:
    reasons = tuned.planned.chosen.reasoned.reasons
    assert tuned.planned.chosen.plan.chat_template == "chatml"
    assert reasons["add_tokens"].origin == "given"
    if tuned.method == "ia3":
        assert "copies of both matrices" in reasons["modules_to_save"].why
