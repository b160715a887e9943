"""Which GPUs train a model: what fits, how long, how much; and the command that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher.cli import main
from ftplan.planner import renting
from ftplan.planner.compiled_step import compiled_step
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import estimate_memory, with_margin
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.renting import Card, Choice, list_choices, marks
from ftplan.planner.stack import OWN_STACK
from ftplan.planner.step_time import estimate_step_time
from ftplan.profiles import find_gpu, prices

TOKENS = 1e6


def card(name: str, usd_per_hour: float | None = None) -> Card:
    return Card(device=find_gpu(name).device(), usd_per_hour=usd_per_hour)


def choices(model: ModelSpec, *cards: Card, **given: Any) -> list[Choice]:
    return list_choices(model, cards, ("full", "lora", "qlora"), TOKENS, given)


def test_every_number_and_method_is_tried(llama_2_7b: ModelSpec) -> None:
    found = choices(llama_2_7b, card("a100-80gb-sxm", 2.0))
    assert [(c.num_gpus, c.method) for c in found] == [
        (n, method) for n in (1, 2, 4, 8) for method in ("full", "lora", "qlora")
    ]


@pytest.mark.parametrize("name", ["t4", "rtx-4090", "a100-80gb-sxm", "h100-sxm", "mi300x"])
def test_what_fits_is_what_an_estimate_says(name: str, llama_2_7b: ModelSpec) -> None:
    """Though what cards of a kind share is worked out once."""
    device = find_gpu(name).device()
    for choice in choices(llama_2_7b, card("gtx-1080-ti"), card("l40s"), card(name, 1.0)):
        if choice.card.device.name != device.name or choice.plan is None:
            continue
        plan = choice.plan
        memory = estimate_memory(llama_2_7b, plan, device=device)
        assert choice.required_bytes == memory.required_bytes
        assert with_margin(memory.required_bytes) <= device.free_bytes
        rows = plan.per_device_train_batch_size
        step = estimate_step_time(
            llama_2_7b,
            plan,
            device,
            tokens_per_micro_batch=rows * plan.max_length,
            mean_length=plan.max_length,
        )
        assert choice.step == step
        speed = choice.num_gpus * step.tokens_per_second_per_gpu
        assert choice.seconds == pytest.approx(TOKENS / speed)
        assert choice.usd == pytest.approx(choice.num_gpus * choice.seconds / 3600)


def test_what_lacks_memory_says_how_much(llama_2_7b: ModelSpec) -> None:
    """Full training of 6.74 B parameters in fp32 takes 16 bytes each: no T4 alone holds that."""
    found = {(c.num_gpus, c.method): c for c in choices(llama_2_7b, card("t4", 0.35))}
    full = found[1, "full"]
    assert not full.fits and full.usd is None
    free = find_gpu("t4").device().free_bytes
    assert full.missing_bytes == with_margin(full.required_bytes) - free > 85e9
    assert found[1, "qlora"].fits
    lacks = [found[n, "full"].missing_bytes for n in (1, 2, 4, 8)]
    assert lacks == sorted(lacks, reverse=True)


def test_a_model_is_divided_only_where_it_has_to_be(llama_2_7b: ModelSpec) -> None:
    found = {(c.num_gpus, c.method): c for c in choices(llama_2_7b, card("rtx-4090", 0.4))}
    for (num_gpus, method), choice in found.items():
        if choice.plan is not None:
            alone = found[1, method].fits
            assert choice.plan.sharding == ("none" if alone or num_gpus == 1 else "fsdp")


def test_what_is_asked_for_is_kept(llama_2_7b: ModelSpec) -> None:
    given = {"num_gpus": 2, "per_device_train_batch_size": 2, "max_length": 512, "lora_rank": 64}
    for choice in choices(llama_2_7b, card("h100-sxm", 3.0), **given):
        assert choice.plan is not None
        for name, value in given.items():
            assert getattr(choice.plan, name) == value


def test_slow_links_bind_many_gpus(llama_2_7b: ModelSpec) -> None:
    """FSDP on cards that reach each other by PCIe alone."""
    device = find_gpu("rtx-4090").device()
    slow = Card(device=_with_link(device, 1e9), usd_per_hour=1.0)
    given = {"num_gpus": 8, "sharding": "fsdp"}
    (fast_choice,) = list_choices(llama_2_7b, [card("rtx-4090", 1.0)], ("full",), TOKENS, given)
    (slow_choice,) = list_choices(llama_2_7b, [slow], ("full",), TOKENS, given)
    assert slow_choice.step is not None and fast_choice.seconds is not None
    assert slow_choice.step.bound_by == "links between GPUs"
    assert slow_choice.seconds is not None and slow_choice.seconds > 2 * fast_choice.seconds


def _with_link(device: Device, bytes_per_second: float) -> Device:
    from msgspec import structs

    return structs.replace(device, link_bytes_per_second=bytes_per_second)


def test_marks(llama_2_7b: ModelSpec) -> None:
    cards = (card("rtx-4090", 0.4), card("h100-sxm", 2.5), card("t4", 0.35), card("b200"))
    found = choices(llama_2_7b, *cards)
    marked = marks(found)
    priced = [c for c in found if c.usd is not None]
    (cheapest,) = [found[n] for n, of in marked.items() if "cheapest" in of]
    (fastest,) = [found[n] for n, of in marked.items() if "fastest" in of]
    assert cheapest.usd == min(c.usd for c in priced if c.usd is not None)
    assert fastest.seconds == min(c.seconds for c in found if c.seconds is not None)
    for number, choice in enumerate(found):
        if choice.usd is None or choice.seconds is None:
            assert "Pareto" not in marked.get(number, [])
            continue
        better = [
            c
            for c in priced
            if c.usd is not None
            and c.seconds is not None
            and (c.usd, c.seconds) != (choice.usd, choice.seconds)
            and c.usd <= choice.usd
            and c.seconds <= choice.seconds
        ]
        if "Pareto" in marked.get(number, []):
            assert not better
        else:
            assert better or any(
                (found[n].usd, found[n].seconds) == (choice.usd, choice.seconds)
                for n, of in marked.items()
                if "Pareto" in of
            )


# --- the command


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["hardware", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_json_has_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "7B", "--gpu", "a100-80gb-sxm", "--tokens", "20M", "--json")
    found = json.loads(out)
    assert status == 0 and found["schema"] == 1 and found["tokens"]["value"] == 20e6
    assert len(found["choices"]) == 12 and all(c["fits"] for c in found["choices"][:4])
    listed = {p.usd_per_gpu_hour for p in prices() if p.gpu == "a100-80gb-sxm"}
    for choice in found["choices"]:
        assert choice["usd_per_gpu_hour"] in listed and choice["price_from"]


def test_the_table_shows_what_fits_and_marks_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = run(capsys, "7B", "--method", "qlora")
    assert status == 0
    assert "cheapest" in out and "fastest" in out and "Pareto" in out
    assert "qlora" in out and " full " not in out
    assert max(map(len, out.splitlines())) <= 100


def test_time_and_money_limit_it(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "7B", "--within", "2h", "--under", "$3", "--json")
    found = json.loads(out)["choices"]
    assert found
    for choice in found:
        assert choice["seconds"] <= 7200 and choice["usd"] <= 3
    status, _, err = run(capsys, "7B", "--within", "1s", "--under", "0.01usd")
    assert status == 1 and "nothing is within that time and money" in err


def test_data_says_how_many_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    row = {"instruction": "say something", "output": "word " * 300}
    data.write_text("\n".join(json.dumps(row) for _ in range(50)), encoding="utf-8")
    _, out, _ = run(capsys, "7B", "--gpu", "t4", "--data", str(data), "--json")
    found = json.loads(out)
    assert 50 * 300 < found["tokens"]["value"] < 50 * 800
    assert "rows.jsonl" in found["tokens"]["why"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["7B", "--within", "soon"], "`--within soon` is no time"),
        (["7B", "--under", "5pesos"], "`--under 5pesos` is no sum of money"),
        (["7B", "--tokens", "many"], "`--tokens many` is no number of tokens"),
        (["7B", "--tokens", "1M", "--data", "rows.json"], "both say how much is trained on"),
        (["7B", "--gpu", "rtx 9999"], "unknown GPU"),
        (["7B", "--method", "magic"], "magic"),
        (["7B", "--attn-implementation", "flash_attention_2", "--mixed-precision", "no",
          "--dtype", "float32"], "FlashAttention-2 takes fp16 and bf16 only"),
    ],
)  # fmt: skip
def test_bad_input_is_told(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *words)
    assert status == 2 and not out
    assert said in err and "Traceback" not in err


def test_no_work_is_worked_out_that_no_card_asks_for(
    small_llama: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """135 M parameters fit any card with the largest micro-batch: no smaller one, no FSDP."""
    seen = []

    def watched(*arguments: Any) -> renting.Work:
        seen.append(arguments[1])
        return work_of(*arguments)

    work_of = renting._work
    monkeypatch.setattr(renting, "_work", watched)
    found = choices(small_llama, card("a100-80gb-sxm", 1.0), card("l40s", 1.0))
    assert all(choice.fits for choice in found) and len(found) == 2 * len(seen)
    assert {(p.sharding, p.per_device_train_batch_size) for p in seen} == {("none", 16)}


# --- what traces share


def test_layers_that_do_not_ask_for_the_number_of_rows_share_a_trace(
    llama_2_7b: ModelSpec,
) -> None:
    """FlashAttention takes tokens as they lie; eager attention puts heads in order."""
    for attention, shared in (("flash_attention_2", True), ("eager", False)):
        plan = TrainingPlan(method="lora", attn_implementation=attention, loss="stock")
        one, several = (
            compiled_step(llama_2_7b, plan, rows, 512, None, OWN_STACK).trace for rows in (1, 4)
        )
        assert (one.segments[5] is several.segments[5]) == shared
        assert one.segments[5].of_any_rows == shared
        assert several.segments[0] is one.segments[0]


def test_evaluations_share_what_only_gathers(llama_2_7b: ModelSpec) -> None:
    """All layers but the first, behind the embeddings, have one trace; and one whatever the number
    of GPUs, unless a share is cast before it is sent."""
    for mixed_precision, shared in (("no", True), ("bf16", False)):
        two, eight = (
            compiled_step(
                llama_2_7b,
                TrainingPlan(
                    method="lora",
                    dtype="bfloat16",
                    mixed_precision=mixed_precision,
                    num_gpus=num_gpus,
                    sharding="fsdp",
                ),
                *(1, 512, None, OWN_STACK),
            ).trace
            for num_gpus in (2, 8)
        )
        layers = [{id(segment) for segment in of.evaluation[0][1:-1]} for of in (two, eight)]
        assert [len(of) for of in layers] == [2, 2]
        assert (layers[0] == layers[1]) == shared
        assert len({id(segment) for segment in two.segments[1:-1]}) == 3
