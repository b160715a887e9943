"""Combinations that cannot be, or disappoint: each is met on the command line, by its name."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from ftplan.launcher import cli, planning
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.planner.combination import Combination
from ftplan.planner.combinations import (
    COMBINATIONS,
    WITHOUT_FLASH_ATTENTION,
    cautions,
    check_together,
)
from ftplan.planner.errors import InputError
from ftplan.planner.families import FAMILIES
from ftplan.planner.hardware_spec import Device, Host, Machine
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.refused_steps import DECODERS_BY_OTHER_NAMES, MISNAMED_DECODERS
from ftplan.planner.units import GIB
from tests.launcher_fixtures import CHATML, tiny_tokenizer

DATA = Path(__file__).parent.parent / "examples" / "python_docs.jsonl"
SMALL = "smollm2-135m-instruct"
FLASH = ("--attn-implementation", "flash_attention_2")
PURE_FLOAT32 = ("--dtype", "float32", "--mixed-precision", "no")
FSDP = ("--sharding", "fsdp", "--num-gpus", "2")
ZERO2 = ("--sharding", "zero2", "--num-gpus", "2")
ZERO3 = ("--sharding", "zero3", "--num-gpus", "2")
TP = ("--method", "full", "--num-gpus", "2", "--tp-size", "2")
FP16 = ("--dtype", "float32", "--mixed-precision", "fp16")
CHECKPOINTED = ("--gradient-checkpointing", "true")
EVERY_SECOND = ("--every-n-layers", "2")
LLAMA_4 = "llama-4-scout-17b-16e-instruct"

# Settings that meet each combination, and its neighbours that do not.
MET: dict[str, tuple[str, ...]] = {
    "no-bf16": (SMALL, "--gpu", "t4", "--dtype", "bf16"),
    "other-vendor": (SMALL, "--gpu", "mi300x"),
    "no-flash-attention": (SMALL, "--gpu", "v100-16gb", *FLASH),
    "flash-attention-float32": (SMALL, *FLASH, *PURE_FLOAT32),
    "no-flash-attention-class": ("bloom-560m", *FLASH),
    "quantized-on-processor": (SMALL, "--method", "qlora"),
    "no-quantization-kernels": (SMALL, "--gpu", "v100-16gb", "--quantization", "int8"),
    "optimizer-on-processor": (SMALL, "--method", "full", "--optim", "adalomo"),
    "apollo-zero-start": (SMALL, "--optim", "apollo_adamw"),
    "fp16-overflow": (SMALL, "--dtype", "float16"),
    "beyond-positions": (SMALL, "--max-length", "8193"),
    "adapted-router": ("phi-3.5-moe-instruct", "--target-modules", "q_proj,router"),
    "tied-embeddings": (SMALL, "--modules-to-save", "lm_head"),
    "score-for-head": (SMALL, "--objective", "reward", "--modules-to-save", "lm_head"),
    "generating-experts": ("granite-3.0-1b-a400m-instruct", "--objective", "grpo"),
    "adalomo-experts": ("granite-3.0-1b-a400m-instruct", "--method", "full", "--optim", "adalomo"),
    "liger-beside-trl": (SMALL, "--loss", "liger"),
    "default-eval-batch": (SMALL, "--trainer", "transformers"),
    "data-parallel-memory": (SMALL, "--num-gpus", "2"),
    "zero-whole-quantized-base": (
        *(SMALL, "--method", "qlora", "--sharding", "zero2", "--num-gpus", "2"),
    ),
    "quant-storage": (SMALL, "--method", "qlora", *FSDP),
    "tensor-parallel-pcie": ("llama-3.1-8b", *TP, "--gpu", "l40s"),
    "every-process-loads": (SMALL, "--method", "qlora", *FSDP),
    "fsdp-reentrant": (SMALL, *FSDP, "--use-reentrant"),
    "relora-sharded": (SMALL, "--method", "relora", "--sharding", "zero1", "--num-gpus", "2"),
    "merged-in-16-bits": (SMALL, "--method", "plora", "--gpu", "l4"),
    "lora-drop-bound": (SMALL, "--method", "lora-drop"),
    "adalora-fused-loss": (SMALL, "--method", "adalora"),
    "flash-attention-alibi": ("falcon-rw-1b", *FLASH),
    "misnamed-decoder": (LLAMA_4, "--loss", "trl-fused"),
    "muon-no-matrix": (SMALL, "--method", "ln-tuning", "--optim", "muon"),
    "low-rank-no-linear": ("gpt2", "--method", "full", "--optim", "galore_adamw"),
    "lomo-fp16": (SMALL, "--method", "full", "--optim", "lomo", *FP16),
    "poly-checkpointed": (SMALL, "--method", "poly", *CHECKPOINTED),
    "every-n-layers-reference": (SMALL, "--objective", "dpo", *EVERY_SECOND),
    "every-n-layers-generation": (SMALL, "--objective", "grpo", *EVERY_SECOND),
    "every-n-layers-remote": ("internlm2-7b", *EVERY_SECOND),
    "adalora-zero3": ("llama-3.1-8b", "--method", "adalora", *ZERO3),
    "fsdp-adalora": (SMALL, "--method", "adalora", *FSDP),
    "fsdp-shared-adapters": (SMALL, "--method", "tinylora", *FSDP),
    "fsdp-dora-quantized": (SMALL, "--method", "dora", "--quantization", "nf4", *FSDP),
    "fsdp-copied-ties": (SMALL, "--modules-to-save", "lm_head", *FSDP),
    "fsdp-liger-adapters": ("llama-3.1-8b", "--loss", "liger", *FSDP),
}
NOT_MET: dict[str, tuple[str, ...]] = {
    "no-bf16": (SMALL, "--gpu", "t4"),
    "other-vendor": (SMALL, "--gpu", "h100-sxm"),
    "no-flash-attention": (SMALL, "--gpu", "l4", *FLASH),
    "flash-attention-float32": (SMALL, *FLASH, "--dtype", "float32"),
    "no-flash-attention-class": (SMALL, *FLASH),
    "quantized-on-processor": (SMALL, "--method", "qlora", "--gpu", "t4"),
    "no-quantization-kernels": (SMALL, "--gpu", "t4", "--quantization", "int8"),
    "optimizer-on-processor": (SMALL, "--method", "full", "--optim", "adalomo", "--gpu", "l4"),
    "apollo-zero-start": (SMALL, "--method", "full", "--optim", "apollo_adamw"),
    "fp16-overflow": (SMALL, *PURE_FLOAT32),
    "beyond-positions": (SMALL, "--max-length", "8192"),
    "adapted-router": ("phi-3.5-moe-instruct",),
    "tied-embeddings": ("llama-3.1-8b", "--modules-to-save", "lm_head"),
    "score-for-head": (SMALL, "--objective", "reward"),
    "generating-experts": ("granite-3.0-1b-a400m-instruct", "--objective", "dpo"),
    "adalomo-experts": ("granite-3.0-1b-a400m-instruct", "--method", "full", "--optim", "lomo"),
    "liger-beside-trl": (SMALL, "--loss", "liger", "--trainer", "transformers"),
    "default-eval-batch": (
        *(SMALL, "--trainer", "transformers", "--per-device-train-batch-size", "8"),
    ),
    "data-parallel-memory": (SMALL, *FSDP),
    "zero-whole-quantized-base": (SMALL, "--method", "qlora", *FSDP),
    "quant-storage": (SMALL, *FSDP),
    "tensor-parallel-pcie": ("llama-3.1-8b", *TP, "--gpu", "h100-sxm"),
    "every-process-loads": (SMALL, *FSDP),
    "fsdp-reentrant": (SMALL, *FSDP),
    "relora-sharded": (SMALL, "--method", "relora", "--num-gpus", "2"),
    "merged-in-16-bits": (SMALL, "--method", "relora", *PURE_FLOAT32),
    "lora-drop-bound": (SMALL, "--method", "plora"),
    "adalora-fused-loss": (SMALL, "--method", "adalora", "--loss", "stock"),
    "flash-attention-alibi": ("falcon-7b", *FLASH),
    "misnamed-decoder": (LLAMA_4,),
    "muon-no-matrix": (SMALL, "--method", "lora", "--optim", "muon"),
    "low-rank-no-linear": (SMALL, "--method", "full", "--optim", "galore_adamw"),
    "lomo-fp16": (SMALL, "--method", "full", "--optim", "lomo"),
    "poly-checkpointed": (SMALL, "--method", "poly"),
    "every-n-layers-reference": (
        *(SMALL, "--objective", "dpo", "--precompute-ref-log-probs", *EVERY_SECOND),
    ),
    "every-n-layers-generation": (SMALL, "--objective", "grpo"),
    "every-n-layers-remote": (SMALL, *EVERY_SECOND),
    "adalora-zero3": ("llama-3.1-8b", "--method", "adalora", *ZERO2),
    "fsdp-adalora": (SMALL, "--method", "adalora", *ZERO2),
    "fsdp-shared-adapters": (SMALL, "--method", "tinylora", *ZERO2),
    "fsdp-dora-quantized": (SMALL, "--method", "dora", "--quantization", "nf4", *ZERO2),
    "fsdp-copied-ties": (SMALL, "--modules-to-save", "lm_head", *ZERO2),
    "fsdp-liger-adapters": (SMALL, "--loss", "liger", *FSDP),
}


@dataclasses.dataclass
class Answer:
    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Messages, without the breaks of lines."""
        return " ".join(self.err.split())


Ftplan = Callable[..., Answer]


@pytest.fixture
def ftplan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ftplan:
    """`ftplan WORDS`, as a person calls it."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*words: str) -> Answer:
        status = cli.main(list(words))
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return run


@pytest.fixture
def on_a_processor(monkeypatch: pytest.MonkeyPatch, devices: dict[str, Device]) -> None:
    """This machine has no GPU, and its processor's speed is known."""
    host = Host(
        cpu_name="a processor",
        num_cores=2,
        ram_total_bytes=64 * GIB,
        ram_available_bytes=64 * GIB,
        disk_free_bytes=64 * GIB,
        disk_path="/",
    )
    machine = Machine(gpus=(), cpu=devices["CPU"], host=host)
    monkeypatch.setattr(planning, "probe_machine", lambda **_: machine)


def known(outcome: str) -> list[Any]:
    """The table's entries of one outcome, named."""
    return [pytest.param(c, id=c.name) for c in COMBINATIONS if c.outcome == outcome]


def test_every_combination_is_met_here() -> None:
    names = [combination.name for combination in COMBINATIONS]
    assert len(names) == len(set(names))
    assert set(MET) == set(NOT_MET) == set(names)


@pytest.mark.usefixtures("on_a_processor")
@pytest.mark.parametrize("combination", known("warned"))
def test_what_disappoints_is_warned_about(combination: Combination, ftplan: Ftplan) -> None:
    asked = ("estimate", *MET[combination.name])
    if combination.name == "quantized-on-processor":  # an estimate is of a GPU
        model, *settings = MET[combination.name]
        asked = ("plan", str(DATA), "--model", model, *settings)
    answer = ftplan(*asked)
    assert answer.status in (0, 1) and f"[{combination.name}]" in answer.said
    warnings = {w["name"]: w for w in json.loads(ftplan(*asked, "--json").out)["warnings"]}
    told = warnings[combination.name]
    assert set(told) == {"name", "text", "way_out"} and told["text"] and told["way_out"]
    assert f"warning: {told['text']}; {told['way_out']} [{combination.name}]" in answer.said


@pytest.mark.usefixtures("on_a_processor")
@pytest.mark.parametrize("combination", known("not run"))
def test_what_a_device_cannot_run_is_not_planned(combination: Combination, ftplan: Ftplan) -> None:
    model, *settings = MET[combination.name]
    answer = ftplan("plan", str(DATA), "--model", model, *settings)
    assert answer.status == 2 and "error: " in answer.err and "hint: " in answer.err
    if "--gpu" in settings:
        said = ftplan("estimate", model, *settings).said
        assert f"[{combination.name}]" in said
        text = answer.said.partition("error: ")[2].partition(" hint: ")[0]
        assert f"warning: {text}; " in said


@pytest.mark.parametrize("combination", known("refused"))
def test_what_cannot_be_is_refused(combination: Combination, ftplan: Ftplan) -> None:
    answer = ftplan("estimate", *MET[combination.name])
    assert answer.status == 2 and not answer.out
    assert "error: " in answer.err and "hint: " in answer.err


@pytest.mark.parametrize("name", NOT_MET)
def test_its_neighbour_is_not_meant(name: str, ftplan: Ftplan) -> None:
    answer = ftplan("estimate", *NOT_MET[name], "--json")
    assert answer.status in (0, 1)
    assert name not in [warning["name"] for warning in json.loads(answer.out)["warnings"]]


def test_a_usual_run_is_not_warned_about(ftplan: Ftplan) -> None:
    assert (
        json.loads(ftplan("estimate", "llama-3.1-8b", "--gpu", "l4", "--json").out)["warnings"]
        == []
    )


@pytest.mark.parametrize(
    ("changes", "native_dtype", "warned"),
    [
        ({"mixed_precision": "fp16", "dtype": "float16"}, "bfloat16", True),
        ({"mixed_precision": "fp16", "dtype": "float32"}, "bfloat16", True),
        ({"mixed_precision": "no", "dtype": "float16"}, "bfloat16", True),
        ({"mixed_precision": "fp16", "dtype": "float16"}, "float16", False),
        ({"mixed_precision": "no", "dtype": "float32"}, "bfloat16", False),
        ({}, "bfloat16", False),
    ],
)
def test_fp16_overflows_where_a_model_was_trained_in_bf16(
    changes: dict[str, Any], native_dtype: str, warned: bool, small_llama: ModelSpec
) -> None:
    model = structs.replace(small_llama, native_dtype=native_dtype)
    names = [caution.name for caution in cautions(model, TrainingPlan(**changes), None)]
    assert ("fp16-overflow" in names) == warned


def test_all_that_a_card_lacks_is_said(small_llama: ModelSpec, devices: dict[str, Device]) -> None:
    volta = structs.replace(devices["T4"], name="V100", compute_capability=(7, 0))
    plan = TrainingPlan(
        method="qlora", quantization="int8", attn_implementation="flash_attention_2"
    )
    assert [c.text for c in cautions(small_llama, plan, volta)] == [
        "V100 has no bf16: torch can only imitate it, slowly",
        "FlashAttention-2 does not run on V100",
        "V100 lacks compute capability 7.5, which int8 bases need",
    ]
    assert cautions(small_llama, plan, devices["A100"]) == []


def test_families_without_flash_attention_are_those_of_transformers() -> None:
    """The class that a config of the family makes says so."""
    pytest.importorskip("transformers", reason="the reference is transformers")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    remote = {"baichuan", "chatglm", "internlm2", "qwen"}
    text_part = {
        "gemma3": "Gemma3ForConditionalGeneration",
        "llama4": "Llama4ForConditionalGeneration",
        "mistral3": "Mistral3ForConditionalGeneration",
    }
    folders = {"gemma3_text": "gemma3", "llama4_text": "llama4"}
    for family in (WITHOUT_FLASH_ATTENTION | set(FAMILIES)) - remote:
        folder = folders.get(family, family)
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        name = text_part.get(family) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
        supports = getattr(module, name)._supports_flash_attn
        assert supports == (family not in WITHOUT_FLASH_ATTENTION), family


# --- in `plan`


def test_what_is_said_of_one_card_is_said_before_a_run(ftplan: Ftplan) -> None:
    planned = ftplan("plan", str(DATA), "--model", SMALL, "--gpu", "t4", "--json")
    assert planned.status == 0
    assert "fp16-overflow" in [warning["name"] for warning in json.loads(planned.out)["warnings"]]


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (("--model", "smollm2-135m"), True),
        (("--model", SMALL), False),
        (("--model", "smollm2-135m", "--modules-to-save", "embed_tokens,lm_head"), False),
        (("--model", "smollm2-135m", "--method", "full"), False),
        (("--model", "smollm2-135m", "--train-tokens", "template"), False),
    ],
)
def test_a_base_model_does_not_learn_a_chat_templates_tokens(
    words: tuple[str, ...], warned: bool, ftplan: Ftplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="templates are its tokenizers'")
    core = tiny_tokenizer(CHATML, eos_token="<|bos|>")
    trained = ("template",) if "template" in words else ()
    tokenizer = RowTokenizer(core, train_tokens=trained)
    monkeypatch.setattr(planning, "tokenizer_of", lambda ui, source, given: tokenizer)
    answer = ftplan("plan", str(DATA), "--gpu", "l4", *words, "--json")
    names = [warning["name"] for warning in json.loads(answer.out)["warnings"]]
    assert ("untrained-template" in names) == warned


def test_plans_that_are_left_out_are_told(ftplan: Ftplan) -> None:
    """A layerwise optimizer does not accumulate, and some micro-batches would."""
    words = ("--model", SMALL, "--gpu", "l4", "--method", "lora", "--max-length", "64")
    words += ("--optim", "galore_adamw_layerwise")
    answer = ftplan("plan", str(DATA), *words, "--json")
    (left,) = json.loads(answer.out)["left_out"]
    assert left["method"] == "lora" and left["count"] > 0 and "accumulate" in left["reason"]
    warnings = {w["name"]: w for w in json.loads(answer.out)["warnings"]}
    assert warnings["left-out"]["text"] == f"{left['count']} plans were left out: {left['reason']}"
    assert "64 tokens" in warnings["cut-rows"]["text"]


def test_where_no_plan_is_left_the_refusal_is_shown(ftplan: Ftplan) -> None:
    words = ("--method", "poly", "--gradient-checkpointing", "yes")
    answer = ftplan("plan", str(DATA), "--model", SMALL, "--gpu", "l4", *words)
    assert answer.status == 2
    assert "method `poly` knows the rows' tasks" in answer.said and "hint: " in answer.err


def test_other_methods_that_settings_are_not_for_are_left_out_of_the_table(ftplan: Ftplan) -> None:
    answer = ftplan("estimate", "llama-3.1-8b", "--modules-to-save", "lm_head")
    assert answer.status == 0 and "error" not in answer.err
    assert "qlora" in answer.out and "freeze" not in answer.out


@pytest.mark.usefixtures("on_a_processor")
def test_more_gpus_than_there_are_is_refused(ftplan: Ftplan) -> None:
    answer = ftplan("plan", str(DATA), "--model", SMALL, "--num-gpus", "2")
    assert answer.status == 2
    assert "asks for more GPUs than this machine has: 0" in answer.said
    assert "--gpu NAME" in answer.said


@pytest.mark.usefixtures("on_a_processor")
def test_a_4_bit_base_on_a_processor_is_taken_only_where_asked_for(ftplan: Ftplan) -> None:
    answer = ftplan("plan", str(DATA), "--model", SMALL, "--json")
    assert answer.status == 0
    planned = json.loads(answer.out)
    assert planned["plan"]["method"]["value"] == "lora"
    reasons = {item["method"]: item["reason"] for item in planned["rejected"]}
    assert "are for GPUs" in reasons["qlora"]
    asked = ftplan("plan", str(DATA), "--model", SMALL, "--method", "qlora", "--json")
    assert asked.status == 0
    assert json.loads(asked.out)["plan"]["quantization"]["value"] == "nf4"


def test_the_hint_names_what_the_card_can_do(
    small_llama: ModelSpec, devices: dict[str, Device]
) -> None:
    from ftplan.planner.combinations import check_runs

    volta = structs.replace(devices["T4"], compute_capability=(7, 0))
    with pytest.raises(InputError) as refused:
        check_runs(
            small_llama,
            TrainingPlan(
                method="qlora", quantization="int8", dtype="float16", mixed_precision="fp16"
            ),
            volta,
        )
    assert refused.value.hint == "use `--quantization nf4`, or `--method lora`"


def test_decoders_that_accelerate_finds_beside_adapters_are_those_of_transformers() -> None:
    """It looks for the one that `base_model_prefix` names, in PEFT's wrapper."""
    pytest.importorskip("transformers", reason="the reference is transformers")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for family in (*DECODERS_BY_OTHER_NAMES, *MISNAMED_DECODERS, "llama", "phi", "gpt_oss"):
        folder = family.removesuffix("_text")
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        prefix = getattr(module, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]).base_model_prefix
        assert (prefix == "model") == (family not in DECODERS_BY_OTHER_NAMES | MISNAMED_DECODERS), (
            family
        )


def test_what_checkpointing_breaks_is_not_checkpointed_unless_asked(small_llama: ModelSpec) -> None:
    for method, checkpointed in (("prefix-tuning", False), ("poly", False), ("lora", True)):
        plan = estimate_recipe(small_llama, None, {"method": method}).plan
        assert plan.gradient_checkpointing == checkpointed, method


def test_prequantized_bases_are_not_run_dry(ftplan: Ftplan) -> None:
    answer = ftplan("estimate", SMALL, "--method", "qlora", "--quantization", "gptq", "--exact")
    assert answer.status == 2
    assert "knows no gptq kernels" in answer.said and "leave out `--exact`" in answer.said


def test_a_prompt_leaves_the_final_norm_where_accelerate_finds_it(small_llama: ModelSpec) -> None:
    model = structs.replace(small_llama, tie_word_embeddings=False)
    sharded = {"loss": "liger", "sharding": "fsdp", "num_gpus": 2}
    check_together(model, TrainingPlan(method="prompt-tuning", **sharded))
    with pytest.raises(InputError, match="has not gathered it"):
        check_together(model, TrainingPlan(method="lora", **sharded))


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (("--method", "dora", *ZERO3), "`--method lora` or `--sharding zero2`"),
        (("--method", "ia3", "--quantization", "nf4", *FSDP), "`--method qlora`"),
        (
            ("--method", "randlora", "--quantization", "nf4", "--objective", "grpo"),
            "`--method qlora`",
        ),
    ],
)
def test_what_is_not_modelled_is_told_with_what_is(
    words: tuple[str, ...], instead: str, ftplan: Ftplan
) -> None:
    refused = ftplan("estimate", "7B", *words)
    assert refused.status == 2 and "does not model" in refused.said
    assert f"what is modelled: {instead}" in refused.said
    goes = instead.partition(" or ")[0].strip("`").split()
    assert ftplan("estimate", "7B", *words, *goes).status == 0
