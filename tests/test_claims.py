"""What papers claim of their methods, as far as it can be checked in seconds: counts of trained
parameters by the planner, memory and losses by real steps. `docs/accuracy.md` has the table."""

from __future__ import annotations

import statistics
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from ftplan.launcher.model_source import find_source
from ftplan.planner.families import spec_from_config
from ftplan.planner.memory import estimate_memory
from ftplan.planner.methods import METHODS
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.trained import MethodSettings
from ftplan.planner.units import GIB

DOC = (Path(__file__).parent.parent / "docs" / "accuracy.md").read_text(encoding="utf-8")

# The width and depth of GPT-3 175B, by modules that stand alone.
GPT_3 = {
    **{"model_type": "llama", "hidden_size": 12288, "num_hidden_layers": 96},
    **{"intermediate_size": 49152, "num_attention_heads": 96, "vocab_size": 50257},
    "max_position_embeddings": 2048,
}
QV = ("q_proj", "v_proj")
QKVUD = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


class Claim(Struct, frozen=True, kw_only=True):
    """A count that a paper prints. `claimed`: as it does, of millions or per cent."""

    method: str
    what: str
    model: str
    settings: dict[str, Any]
    claimed: str
    source: str


_HU = "Hu et al. 2021, Table"
_LIU = "Liu et al. 2024, Table 1"
_GAO = "Gao et al. 2024, Table"
_LIAO = "Liao and Monz 2024, Table 3"
_KOPICZKO = "Kopiczko et al. 2024, Table"


def _claims() -> list[Claim]:
    found: list[Claim] = []

    def add(method: str, what: str, model: str, claimed: str, source: str, **settings: Any) -> None:
        found.append(
            Claim(
                method=method,
                what=what,
                model=model,
                settings=settings,
                claimed=claimed,
                source=source,
            )
        )

    qv, all_linear = "q and v", "all linear layers"
    add("lora", f"rank 1, {qv}", "gpt-3", "4.7 M", f"{_HU} 4", lora_rank=1, target_modules=QV)
    add("lora", f"rank 8, {qv}", "gpt-3", "37.7 M", f"{_HU} 4", lora_rank=8, target_modules=QV)
    add("freeze", "the last 2 layers", "gpt2-medium", "25.19 M", f"{_HU} 3", num_trainable_layers=2)
    add("bitfit", "12 layers of width 768", "gpt2", "0.1 M", f"{_HU} 2 (RoBERTa base)")
    for name, claimed in (("llama-7b", "159.9 M"), ("llama-13b", "250.3 M")):
        add("lora", f"rank 64, {all_linear}", name, claimed, f"{_KOPICZKO} 4", lora_rank=64)
    for name, claimed in (("llama-2-7b-hf", "8.39 M"), ("llama-2-13b-hf", "13.1 M")):
        add("lora", f"rank 16, {qv}", name, claimed, f"{_GAO} 1", lora_rank=16, target_modules=QV)
    for name, rank, claimed in (
        *(("llama-7b", 32, "0.83 %"), ("llama-13b", 32, "0.67 %")),
        ("meta-llama-3-8b", 32, "0.70 %"),
    ):
        add("lora", _of_qkvud(rank), name, claimed, _LIU, lora_rank=rank, target_modules=QKVUD)
    for name, rank, claimed in (
        *(("llama-7b", 32, "0.84 %"), ("llama-7b", 16, "0.43 %"), ("llama-13b", 32, "0.68 %")),
        *(("llama-13b", 16, "0.35 %"), ("meta-llama-3-8b", 32, "0.71 %")),
    ):
        add("dora", _of_qkvud(rank), name, claimed, _LIU, lora_rank=rank, target_modules=QKVUD)
    add(
        *("vera", f"rank 256, {all_linear}", "llama-2-7b-hf", "1.4 M"),
        "Kopiczko et al. 2023, abstract of the first version",
    )
    for name, claimed in (("llama-7b", "1.6 M"), ("llama-13b", "2.4 M")):
        add(
            *("vera", f"rank 1024, {all_linear}", name, claimed, f"{_KOPICZKO} 4"),
            peft_config=("r=1024",),
        )
    add(
        *("vera", "rank 1024, attention's c_attn", "gpt2-medium", "0.098 M", f"{_KOPICZKO} 3"),
        peft_config=("r=1024",),
        target_modules=("c_attn",),
    )
    for name, claimed in (("llama-7b", "0.064 M"), ("llama-13b", "0.08 M")):
        add(
            *("fourierft", f"1000 frequencies, {qv}", name, claimed, f"{_GAO} 4"),
            peft_config=("n_frequency=1000",),
            target_modules=QV,
        )
    add(
        *("ia3", f"results of {all_linear}", "llama-7b", "0.02 %", _LIAO),
        peft_config=(
            "target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
            "feedforward_modules=[]",
        ),
    )
    for name, variant, claimed in (
        *(("llama-7b", 1, "0.02 %"), ("llama-7b", 2, "0.04 %"), ("llama-7b", 4, "0.08 %")),
        *(("llama-13b", 1, "0.02 %"), ("llama-13b", 2, "0.03 %"), ("llama-13b", 4, "0.07 %")),
    ):
        add(
            *("road", f"RoAd{variant}, {all_linear}", name, claimed, _LIAO),
            peft_config=(f"variant=road_{variant}",),
        )
    add(
        *("adaption-prompt", "10 tokens, 30 layers", "llama-7b", "1.2 M"),
        "Zhang et al. 2023, abstract",
    )
    return found


def _of_qkvud(rank: int) -> str:
    return f"rank {rank}, q, k, v, up and down"


CLAIMS = _claims()


LONG_ROWS = {
    **{"lora_rank": 8, "per_device_train_batch_size": 4, "max_length": 2048},
    "gradient_checkpointing": False,
}


@cache
def model_of(name: str) -> ModelSpec:
    return spec_from_config(GPT_3, name) if name == "gpt-3" else find_source(name).spec


def counted(claim: Claim) -> tuple[int, float]:
    """Trained parameters, and their share of all, those that are added included, as PEFT prints."""
    model = model_of(claim.model)
    trained = METHODS[claim.method].count(model, MethodSettings(**claim.settings))
    count = trained.num_trainable_parameters
    return count, count / (model.num_parameters + trained.added_parameters)


def as_printed(claim: Claim) -> str:
    """Our count with as many digits as the paper has."""
    count, share = counted(claim)
    number, unit = claim.claimed.split()
    digits = len(number.partition(".")[2])
    return f"{100 * share if unit == '%' else count / 1e6:.{digits}f} {unit}"


def told(claim: Claim) -> str:
    """The row of the document's table."""
    count, _ = counted(claim)
    return (
        f"| `{claim.method}`, {claim.what} | {claim.model} | {claim.claimed} | {count:,} "
        f"| {claim.source} |"
    )


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: f"{c.method}-{c.model}-{c.claimed}")
def test_a_count_is_the_papers(claim: Claim) -> None:
    assert as_printed(claim) == claim.claimed


def test_the_document_has_each_count() -> None:
    rows = [told(claim) for claim in CLAIMS]
    assert [line for line in DOC.splitlines() if line in rows] == rows


# --- memory and losses, by real steps of tiny models


@pytest.mark.train
@pytest.mark.usefixtures("on_the_processor")
def test_lora_fa_saves_the_activations_that_are_predicted(tmp_path: Path) -> None:
    """Zhang et al. 2023 (LoRA-FA, section 3): of an adapted module r numbers a token are kept in
    the place of its input."""
    pytest.importorskip("trl", reason="needs the `train` extra")
    from ftplan.launcher.dry_run.step import dry_run
    from ftplan.launcher.emit import method_settings
    from ftplan.launcher.training.adapters import settle_adapters
    from ftplan.planner.trained import target_names
    from tests.dry_runs import LLAMA, case, measured_peaks, real_trainer

    targets = target_names(spec_from_config(LLAMA, "tiny"), ("all-linear",))
    measured, predicted = {}, {}
    for method in ("lora", "lora-fa"):
        planned = case(LLAMA, method=method, max_length=256, lora_rank=8, target_modules=targets)
        trainer = real_trainer(planned, tmp_path / method)
        settle_adapters(trainer.model, method_settings(planned.plan))
        measured[method] = measured_peaks(trainer)["backward"]
        peaks = dry_run(planned).record.phase_peaks()
        predicted[method] = peaks["backward"].allocated_bytes
    saved, foreseen = (taken["lora"] - taken["lora-fa"] for taken in (measured, predicted))
    assert saved > 0.1 * measured["lora"]
    assert saved == pytest.approx(foreseen, rel=0.01)


def test_lora_fa_takes_memory_by_the_factor_of_its_abstract() -> None:
    """Up to 1.4 less than LoRA (the abstract): four rows of 2,048 tokens, nothing checkpointed."""
    model = model_of("llama-7b")
    peaks = [
        estimate_memory(model, estimate_recipe(model, None, {**LONG_ROWS, "method": method}).plan)
        for method in ("lora", "lora-fa")
    ]
    lora, lora_fa = (peak.allocated_peak_bytes for peak in peaks)
    assert f"{lora / lora_fa:.1f}" == "1.4"
    assert (
        f"| `lora-fa`, memory beside LoRA's, at best | llama-7b | 1.4 x | {lora / lora_fa:.2f} x: "
        f"{lora / GIB:.1f} and {lora_fa / GIB:.1f} GiB |"
    ) in DOC


@pytest.mark.train
def test_lora_plus_falls_faster_than_lora_at_the_same_rate(tmp_path: Path) -> None:
    """Hayou et al. 2024: B learns at a multiple of A's rate."""
    pytest.importorskip("trl", reason="needs the `train` extra")
    from tests.matrix import answered, carry_out, save_model, write_rows

    rows = write_rows(answered(), tmp_path / "rows.jsonl")
    model = save_model("llama", tmp_path / "model")
    last: dict[str, list[float]] = {"lora": [], "lora-plus": []}
    for method, found in last.items():
        for seed in (1, 2, 3):
            given = {
                **{"method": method, "seed": seed, "max_steps": 12, "learning_rate": 2e-3},
                **{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
                **{"lora_rank": 4, "lora_alpha": 8, "optim": "adamw_torch"},
            }
            run = carry_out(model, rows, tmp_path / f"{method}-{seed}", given)
            found.append(statistics.fmean(run.losses()[-3:]))

    assert max(last["lora-plus"]) < min(last["lora"])


if __name__ == "__main__":
    print("\n".join(map(told, CLAIMS)))
