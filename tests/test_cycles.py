"""ReLoRA, PLoRA, LoRA-drop and AdaLoRA: real runs on very small models."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.launching import write_run
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training import loop
from ftplan.launcher.training.allocations import highest_rise
from ftplan.launcher.training.build import count_trainable
from ftplan.launcher.training.cycles import merging
from ftplan.launcher.training.cycles.lora_drop import important, share_adapters
from ftplan.launcher.training.cycles.merging import adapted_modules, begin_anew
from ftplan.launcher.training.cycles.pruning import prune_states
from ftplan.launcher.training.cycles.rates import JaggedRate, StagedRate
from ftplan.launcher.ui import Ui
from ftplan.planner.cycles import adalora_schedule, check_steps, num_restarts, restart_steps
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.units import GIB
from tests.launcher_fixtures import CHATML, tiny_tokenizer
from tests.sweeps import swept

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("kept_signals")]

CPU = Device(
    name="a processor",
    kind="cpu",
    total_bytes=8 * GIB,
    free_bytes=8 * GIB,
    memory_bandwidth_bytes_per_second=1e10,
    peak_flops_per_second={"float32": 1e11},
    context_bytes=0,
    rates_source="assumed",
)
_DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    # The usual 0.02 bounds a frozen head of this width to logits of about 1: nothing to learn.
    "initializer_range": 0.25,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 16},
    "mixtral": {**_DECODER, "num_local_experts": 4, "tie_word_embeddings": False},
    "gpt2": {
        **{"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256},
        "initializer_range": 0.25,
    },
}
MakeModel = Callable[[str], Path]


@pytest.fixture
def kept_signals() -> Iterator[None]:
    """The training loop takes over SIGINT and SIGTERM; give them back."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Folders of models with random weights, by architecture."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            tokenizer = tiny_tokenizer(CHATML, pad_token="<|bos|>")
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                family,
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **CONFIGS[family],
            )
            folders[family] = tmp_path_factory.mktemp("models") / family
            AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
            tokenizer.save_pretrained(folders[family])
        return folders[family]

    return make


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one pattern, which a few steps teach."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "instruction": f"Where is the {part} of the {subject}?",
            "output": f"The {part} of the {subject} is here.",
        }
        for subject in ("list", "tuple", "set", "dict", "range", "string")
        for part in ("question", "answer", "start", "end")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def planned(model: Path, data: Path, runs: Path, **given: Any) -> Planned:
    settings = {
        **{"max_steps": 16, "learning_rate": 0.01, "lora_rank": 4, "lora_alpha": 8},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        **given,
    }
    return make_plan(
        Ui(as_json=True),
        asked=DataAsked(paths=(str(data),)),
        model_name=str(model),
        named_device=CPU,
        given=settings,
        runs_dir=runs,
        for_launch=True,
    )


def trained(model: Path, data: Path, runs: Path, **given: Any) -> tuple[Planned, RunDir]:
    """A run carried through."""
    plan = planned(model, data, runs, **given)
    run = write_run(plan, None, runs)
    assert loop.train(run, resume=False) == 0
    return plan, run


def losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in run.metric_rows() if "step" in row]


def logits(model: Any) -> torch.Tensor:
    """Of some tokens, without dropout."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(5, 35).unsqueeze(0)).logits.float()
    model.train(training)
    return found


class Ended(NamedTuple):
    """A run, and the logits of its model as it was when it was saved."""

    plan: Planned
    run: RunDir
    logits: torch.Tensor


@pytest.fixture(scope="module")
def trained_once(
    make_model: MakeModel, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Ended]:
    """Runs by method and family, each carried through when it is first asked for."""
    save = loop.save

    @functools.cache
    def once(method: str, family: str) -> Ended:
        found: list[torch.Tensor] = []

        def noting(session: Any, trainer: Any) -> str:
            found.append(logits(trainer.model))
            return save(session, trainer)

        given = {"lora_drop_threshold": 0.5} if method == "lora-drop" else {}
        runs = tmp_path_factory.mktemp("runs")
        with mock.patch.object(loop, "save", noting):
            plan, run = trained(make_model(family), data_file, runs, method=method, **given)
        return Ended(plan, run, found[0])

    return once


@pytest.mark.parametrize(
    ("method", "family"),
    swept(
        [
            *(("relora", family) for family in sorted(CONFIGS)),
            *(("plora", "llama"), ("lora-drop", "llama"), ("lora-drop", "gpt2")),
            *(("adalora", "qwen3"), ("adalora", "gpt2")),
        ],
        [
            *(("relora", "llama"), ("relora", "gpt2"), ("plora", "llama")),
            *(("lora-drop", "llama"), ("adalora", "qwen3")),
        ],
    ),
)
def test_it_learns_and_what_it_saves_is_what_it_was(
    method: str, family: str, trained_once: Callable[[str, str], Ended]
) -> None:
    plan, run, at_the_end = trained_once(method, family)
    record, chosen = run.read_record(), plan.chosen.plan
    assert record["evaluation"]["after"] < record["evaluation"]["before"] - 0.2
    planned_count = chosen.resolved_method.count(plan.source.spec, chosen.method_settings)
    count, bound = record["num_trainable_parameters"], planned_count.num_trainable_parameters
    assert count < bound if method == "lora-drop" else count == bound
    whole = method in ("relora", "plora")
    assert record["output"] == ("model" if whole else "adapter")
    read = AutoModelForCausalLM if whole else AutoPeftModelForCausalLM
    reloaded = read.from_pretrained(run.root / record["output"])
    torch.testing.assert_close(logits(reloaded), at_the_end, atol=2e-4, rtol=1e-4)
    if whole:
        files = (run.model / name for name in ("model.safetensors", "config.json"))
        written = sum(file.stat().st_size for file in files)
        assert plan.chosen.memory.disk.final_model == pytest.approx(written, abs=30_000)


def test_restarts_reach_a_higher_rank_than_the_adapters_have(
    make_model: MakeModel, data_file: Path, tmp_path: Path
) -> None:
    """ReLoRA's claim: of three cycles of rank 4 the update of a weight has rank 12 (a random A and
    trained B of each), where LoRA's has 4."""
    model = make_model("llama")
    _, plain = trained(model, data_file, tmp_path, method="lora")
    merged = AutoPeftModelForCausalLM.from_pretrained(plain.adapter).merge_and_unload()
    begun = AutoModelForCausalLM.from_pretrained(model)
    first, last = (one.model.layers[0].mlp.down_proj.weight.detach() for one in (begun, merged))
    assert update_rank(first, last) == 4
    plan, run = trained(model, data_file, tmp_path, method="relora", jagged_restart_steps=6)
    restarts = [row for row in run.metric_rows() if row.get("event") == "restart"]
    assert [row["after_step"] for row in restarts] == [6, 12]
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (model, run.model))
    for layers in zip(before.model.layers, after.model.layers, strict=True):
        first, last = (layer.mlp.down_proj.weight.detach() for layer in layers)
        assert update_rank(first, last) == 3 * plan.chosen.plan.lora_rank
        first, last = (layer.input_layernorm.weight.detach() for layer in layers)
        assert torch.equal(first, last)


def update_rank(before: torch.Tensor, after: torch.Tensor) -> int:
    """Singular values of what has become of a weight that are above the noise of its dtype."""
    values = torch.linalg.svdvals((after - before).double())
    noise = torch.finfo(before.dtype).eps * float(before.abs().max()) * sum(before.shape) ** 0.5
    return int((values > noise).sum())


@pytest.mark.parametrize("method", ["relora", "plora", "lora-drop", "adalora"])
def test_a_run_broken_off_goes_on_to_the_same_losses(
    method: str,
    trained_once: Callable[[str, str], Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the first restart, in the midst of the second cycle; to the last digit."""
    whole, run, _ = trained_once(method, "llama")
    cut = write_run(whole, None, tmp_path)
    begin = loop.StepReporter.on_step_begin

    def interrupted(self: Any, args: Any, state: Any, *rest: Any, **parts: Any) -> None:
        if state.global_step == 8:
            signal.raise_signal(signal.SIGINT)
        begin(self, args, state, *rest, **parts)

    with monkeypatch.context() as patched:
        patched.setattr(loop.StepReporter, "on_step_begin", interrupted)
        assert loop.train(cut, resume=False) == 128 + signal.SIGINT
    assert losses(cut) == losses(run)[:9]
    assert loop.train(cut, resume=True) == 0
    assert losses(cut) == losses(run)
    ended = [r.read_record()["evaluation"]["after"] for r in (run, cut)]
    assert ended[0] == ended[1]


def test_adalora_leaves_ranks_where_they_matter(
    trained_once: Callable[[str, str], Ended],
) -> None:
    """As many as asked for on average, unevenly over the modules."""
    plan, run, _ = trained_once("adalora", "llama")
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    ranks = [sum(kept) for kept in config["rank_pattern"].values()]
    assert config["init_r"] == 6 and config["total_step"] == 16 and len(ranks) == 28
    assert sum(ranks) == plan.chosen.plan.lora_rank * len(ranks)
    assert min(ranks) < plan.chosen.plan.lora_rank < max(ranks)


def test_lora_drop_saves_parameters(
    trained_once: Callable[[str, str], Ended],
    make_model: MakeModel,
    data_file: Path,
    tmp_path: Path,
) -> None:
    """At half of the importance about half of the adapters are left, one of them shared; at all of
    it, each layer has its own."""
    counts = {}
    half = trained_once("lora-drop", "llama")
    whole = {"method": "lora-drop", "lora_drop_threshold": 1.0}
    plan, all_kept = trained(make_model("llama"), data_file, tmp_path, **whole)
    for threshold, run in ((0.5, half.run), (1.0, all_kept)):
        counts[threshold] = run.read_record()["num_trainable_parameters"]
        (scored,) = [row for row in run.metric_rows() if row.get("event") == "layers scored"]
        assert all(value > 0 for value in scored["importance"].values())
        kept = sum(name.endswith("down_proj") for name in scored["kept"])
        assert kept == 4 if threshold == 1 else kept < 4
    method, settings = plan.chosen.plan.resolved_method, plan.chosen.plan.method_settings
    assert counts[1.0] == method.count(plan.source.spec, settings).num_trainable_parameters
    assert counts[0.5] <= 0.75 * counts[1.0]


# --- the parts


class Layer(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(width, 2 * width, bias=False)


def adapted(width: int = 32, layers: int = 4, rank: int = 2) -> Any:
    """Linear modules with adapters whose B is not 0."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Layer(width) for _ in range(layers)))
    peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=4, target_modules=["proj"]))
    for module in adapted_modules(peft):
        torch.nn.init.normal_(module.parameters[1])
    return peft


def test_a_merge_changes_nothing_of_the_function_and_takes_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted(width=256, layers=1)
    (module,) = adapted_modules(model)
    inputs = torch.randn(3, 256)
    before = module.layer(inputs)
    monkeypatch.setattr(merging, "MERGE_BYTES", 16_384)
    values = merging.matrices([module])
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profiler:
        merging.merge([module], values, 1.0)
    assert highest_rise(profiler) < 4 * 16_384 < 4 * module.weight.numel()
    begin_anew(model, [module], seed=1)
    assert not module.parameters[1].any()
    torch.testing.assert_close(module.layer(inputs), before)


def test_momentum_merges_a_share_of_the_update() -> None:
    model = adapted()
    (module, *_) = adapted_modules(model)
    before, (first, second) = module.weight.clone(), module.parameters
    merging.merge([module], merging.matrices([module]), 0.75)
    torch.testing.assert_close(module.weight - before, 0.75 * 2.0 * second @ first)


def test_adapters_begin_anew_alike_on_every_rank() -> None:
    model = adapted()
    modules = adapted_modules(model)
    firsts = []
    for state in (1, 2):
        torch.manual_seed(state)
        begin_anew(model, modules, seed=7)
        firsts.append(modules[0].parameters[0].detach().clone())
        drawn = torch.rand(1)
        torch.manual_seed(state)
        assert torch.equal(drawn, torch.rand(1)), "the run's own numbers go on as they would"
    assert torch.equal(*firsts)


def stepped(optimizer_class: Any, parameter: torch.nn.Parameter, **settings: Any) -> Any:
    optimizer = optimizer_class([parameter], lr=0.1, **settings)
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_pruning_leaves_the_same_entries_of_all_moments(method: str) -> None:
    """A first moment without its second would be a step of m / eps."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(40, 50))
    optimizer = stepped(torch.optim.AdamW, parameter, amsgrad=True)
    largest = optimizer.state[parameter]["exp_avg"].abs().flatten().topk(20).indices
    prune_states(optimizer, [parameter], 0.99, method, seed=3)
    state = optimizer.state[parameter]
    kept = [state[name].flatten().nonzero().flatten() for name in ("exp_avg", "exp_avg_sq")]
    assert torch.equal(*kept) and 5 <= len(kept[0]) <= 40
    assert (set(kept[0].tolist()) == set(largest.tolist())) == (method == "magnitude")
    assert state["step"] == 0


@pytest.mark.parametrize(
    ("optimizer_class", "method"), [(torch.optim.AdamW, "reset"), (torch.optim.Adafactor, "random")]
)
def test_states_that_are_no_moments_are_forgotten(optimizer_class: Any, method: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(40, 50))
    optimizer = stepped(optimizer_class, parameter)
    prune_states(optimizer, [parameter], 0.99, method, seed=3)
    assert not optimizer.state[parameter]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 1


def test_rates_begin_anew() -> None:
    """ReLoRA's warms up to the run's curve, PLoRA's goes through the whole curve in each stage."""
    jagged = JaggedRate(warmup_steps=3)
    assert [jagged.on(lambda step: 1 - step / 10, step) for step in (0, 5)] == [1, 0.5]
    jagged.restarted_at = 4
    assert [jagged.on(lambda _: 1.0, step) for step in range(4, 9)] == [0.25, 0.5, 0.75, 1, 1]
    staged = StagedRate(total_steps=20, stage_steps=5)
    first = [staged.on(lambda step: step, step) for step in range(5)]
    assert first == [2, 6, 10, 14, 18]
    staged.restarted_at = 5
    assert [staged.on(lambda step: step, step) for step in range(5, 10)] == first


def test_important_layers_keep_their_own_adapter() -> None:
    model = adapted(layers=4)
    modules = adapted_modules(model)
    importance = dict(zip((m.name for m in modules), (1.0, 60.0, 35.0, 4.0), strict=True))
    kept = important(modules, importance, 0.9)
    assert kept == [modules[1].name, modules[2].name]
    assert important(modules, importance, 0.0) == [modules[1].name]
    assert important(modules, importance, 1.0) == [module.name for module in modules]
    of_one = sum(parameter.numel() for parameter in modules[0].parameters)
    share_adapters(modules, frozenset(kept))
    assert count_trainable(model) == 3 * of_one
    assert modules[0].parameters[0] is modules[3].parameters[0]
    assert modules[0].parameters[0] is not modules[1].parameters[0]


# --- what is refused, before anything is loaded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "relora", "quantization": "nf4"}, "round away most of what"),
        ({"method": "plora", "objective": "dpo"}, "compares with the model without its adapters"),
        ({"method": "relora", "peft_config": ("use_dora=true",)}, "does not go with"),
        ({"method": "lora", "jagged_restart_steps": 5}, "is for method `relora`"),
        ({"method": "relora", "plora_momentum": 0.5}, "is for method `plora`"),
        ({"method": "adalora", "peft_config": ("init_r=12",)}, "nothing to take away"),
        ({"method": "relora", "relora_prune_ratio": 1.5}, "from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        TrainingPlan(**settings)
    assert refused.value.hint or "from 0" in message


def test_a_reference_asked_before_training_goes_with_merges() -> None:
    TrainingPlan(method="relora", objective="dpo", precompute_ref_log_probs=True)


def test_a_run_has_room_for_its_cycles() -> None:
    plan = TrainingPlan(method="relora")
    assert [restart_steps(plan, steps) for steps in (10, 16, 20, 21, 400)] == [5, 6, 5, 6, 100]
    assert num_restarts(400, 100) == 3 and num_restarts(401, 100) == 4
    for short, steps in ((plan, 9), (plan.replace(jagged_restart_steps=50), 50)):
        with pytest.raises(InputError, match="needs two cycles") as refused:
            check_steps(short, steps)
        assert "--max-steps" in (refused.value.hint or "")
    with pytest.raises(InputError, match="leave none of the run's 20 steps"):
        check_steps(TrainingPlan(method="adalora", peft_config=("tinit=15",)), 20)
    for steps in (1, 2, 3, 10, 1000):
        schedule = adalora_schedule(steps, {})
        assert 0 <= schedule.tinit < steps - schedule.tfinal <= steps


def test_a_plan_for_a_short_run_is_refused_before_the_model_is_loaded(
    make_model: MakeModel, data_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="needs two cycles"):
        planned(make_model("llama"), data_file, tmp_path, method="plora", max_steps=6)
