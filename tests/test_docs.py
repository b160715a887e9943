"""The documentation says what the code does: equations, tables, file names, links."""

from __future__ import annotations

import ast
import io
import json
import operator
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
from msgspec import structs

from benchmarks import pages
from ftplan.launcher import cli, emit
from ftplan.launcher.data.data_file import read_data
from ftplan.launcher.run_dir import RunDir
from ftplan.planner import explain, explain_host, policy
from ftplan.planner.achieved import (
    HOST_FACTOR,
    HOST_SECONDS,
    HOST_SECONDS_WITH_HOOKS,
    LAUNCH_SECONDS,
    MATMUL_SHARE_OF_PEAK,
    SHARE_OF_BANDWIDTH,
    SHARE_OF_MEASURED,
    SHARE_OF_POWER,
    TRAINING_SHARE_OF_MATMUL,
)
from ftplan.planner.combinations import COMBINATIONS
from ftplan.planner.compiled_step import compiled_step
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.default_reasons import WHY_DEFAULT
from ftplan.planner.disk import CHECKPOINTS_KEPT
from ftplan.planner.families import spec_from_size
from ftplan.planner.forgetting import PERPLEXITY_RISE
from ftplan.planner.hardware_spec import (
    ASSUMED_CUDA_CONTEXT_BYTES,
    CPU_HEAP_HOLES,
    CPU_PROCESS_BYTES,
    CPU_WORST_HEAP_HOLES,
    CUDA_HOST_BYTES,
    QUANTIZATION_CAPABILITY,
    Device,
)
from ftplan.planner.host_memory import SAVED_AT_ONCE_BYTES
from ftplan.planner.memory import MEMORY_MARGIN, RESERVED_OVER_ALLOCATED, estimate_memory
from ftplan.planner.method_rates import METHOD_RATES
from ftplan.planner.methods import COMPARED_METHODS, METHODS
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import OBJECTIVES
from ftplan.planner.plan import SETTING_NAMES, ReasonedPlan, TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.run_time import limit_to_time_budget
from ftplan.planner.search import choose_plan
from ftplan.planner.space import MICRO_BATCHES, Space
from ftplan.planner.stack import OWN_STACK
from ftplan.planner.step_time import PASSES_OVER_LOGITS, PASSES_OVER_LOGITS_WITHOUT_KERNEL
from ftplan.planner.teams import teams_of
from ftplan.planner.trained import MethodSettings
from ftplan.planner.units import GIB, MIB, format_bytes, format_count
from ftplan.profiles import require_model
from ftplan.profiles.text_facts import general_text
from tests.test_measured import ROWS
from tests.test_measured import error as error_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no heading `{heading}`"
    return found[1]


def table(name: str, heading: str) -> list[list[str]]:
    """The cells of the only table under a heading, without its head."""
    found = tables(name, heading)
    assert len(found) == 1, f"{len(found)} tables under `{heading}`"
    return found[0]


def tables(name: str, heading: str) -> list[list[list[str]]]:
    """The cells of each table under a heading, without their heads."""
    blocks = re.findall(r"(?:^\|.*\n)+", section(page(name), heading), re.MULTILINE)
    return [_cells(block, heading) for block in blocks]


def _cells(block: str, heading: str) -> list[list[str]]:
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in block.splitlines()]
    assert len(cells) > 2 and set("".join(cells[1])) <= set("-:"), f"no table under `{heading}`"
    assert len({len(row) for row in cells}) == 1, f"ragged table under `{heading}`"
    return cells[2:]


def codes(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


# --- equations


def numbered_equations() -> list[int]:
    pattern = r"^### Eq\. \((\d+)\): \S"
    return [int(n) for n in re.findall(pattern, page("memory-model.md"), re.MULTILINE)]


def cited_equations(text: str) -> set[int]:
    return {int(n) for n in re.findall(r"\b[Ee]q\. \((\d+)\)", text)}


def test_every_equation_that_the_code_cites_is_numbered_and_every_numbered_one_is_cited() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "planner").glob("*.py")]
    cited = set().union(*map(cited_equations, sources), explain.HELD_EQUATIONS.values())
    cited |= {
        *(explain.OPTIMIZER_STEP_EQUATION, explain.STEP_EQUATION, explain.GENERATION_EQUATION)
    }
    cited |= {
        *(explain_host.HOST_EQUATION, explain_host.OFFLOAD_EQUATION, explain_host.DISK_EQUATION)
    }
    numbered = numbered_equations()
    assert numbered == sorted(set(numbered)), "in order, each once"
    assert set(numbered) == cited


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_pages_cite_equations_that_exist(path: Path) -> None:
    assert cited_equations(path.read_text(encoding="utf-8")) <= set(numbered_equations())


# --- links


def links(text: str) -> Iterator[str]:
    """Targets of Markdown links, those in code left out."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """The anchors that headings get on GitHub."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(path: Path) -> list[str]:
    relative = (
        link for link in links(path.read_text(encoding="utf-8")) if not re.match(r"[a-z]+:", link)
    )
    return [link for link in relative if not leads_somewhere(path, link)]


def leads_somewhere(path: Path, link: str) -> bool:
    target, _, anchor = link.partition("#")
    file = path.parent / target if target else path
    if not anchor:
        return file.exists()
    return file.is_file() and anchor in anchors(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [*PAGES, *ROOT.glob("README.md")], ids=lambda path: path.name)
def test_relative_links_point_to_something(path: Path) -> None:
    assert broken_links(path) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "# A heading, here\n[a](#a-heading-here) [b](page.md) [c](https://example.org/x)\n"
        "[d](#no) [e](no.md) [f](page.md#no) `[g](no.md)`\n"
    )
    assert broken_links(path) == ["#no", "no.md", "page.md#no"]


def test_the_pages_are_there_and_linked_to_each_other() -> None:
    names = {path.name for path in PAGES}
    assert names >= {"memory-model.md", "policy.md", "run-directory.md", "data.md", "accuracy.md"}
    linked = {link.partition("#")[0] for path in PAGES for link in links(path.read_text())}
    assert names <= linked


# --- the worked example

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluated(cell: str, names: dict[str, int] | None = None) -> float:
    """The value of a cell such as `32 x 4,096 + W`."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Name):
            return (names or {})[node.id]
        assert isinstance(node, ast.Constant)
        return float(node.value) if isinstance(node.value, float) else int(node.value)

    return value(ast.parse(cell.replace(",", "").replace(" x ", " * "), mode="eval").body)


EXAMPLES = {
    "7B, full": ("7B", "full"),
    "7B, QLoRA": ("7B", "qlora"),
    "Llama-3.1-8B, LoRA": ("llama-3.1-8b", "lora"),
}


@cache
def example(title: str = "7B, full") -> tuple[ModelSpec, TrainingPlan]:
    """What the example's command is about."""
    name, method = EXAMPLES[title]
    model = spec_from_size(7 * 10**9, "7B") if name == "7B" else require_model(name).spec
    return model, estimate_recipe(model, None, {"method": method}).plan


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_terms_of_an_example_are_the_planners_and_what_their_arithmetic_gives(
    title: str,
) -> None:
    rows = table("memory-model.md", title)
    terms = explain.explain(*example(title))
    assert [(row[0], row[1], number(row[3])) for row in rows] == [
        (term.component, f"({term.equation})", term.num_bytes) for term in terms
    ]
    for component, _, arithmetic, size in rows:
        assert round(evaluated(arithmetic)) == number(size), component
    memory = estimate_memory(*example(title))
    assert sum(number(row[3]) for row in rows) == memory.allocated_peak_bytes


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_totals_of_an_example_are_the_printed_ones(title: str) -> None:
    text = " ".join(section(page("memory-model.md"), title).split())
    memory = replayed_memory(*example(title))
    assert f"allocated {memory.allocated_peak_bytes:,} bytes" in text
    command = re.search(r"```sh ftplan (.*?) ```", text)
    assert command
    printed = run_ftplan(*command[1].split())
    sizes = {
        "allocated": memory.allocated_peak_bytes,
        "reserved": memory.reserved_peak_bytes,
        "device": memory.device_peak_bytes,
    }
    for name, size in sizes.items():
        assert re.search(rf"\b{name}[^;]*\b{re.escape(format_bytes(size))}", text), name
        assert re.search(rf"^{name}\s+{re.escape(format_bytes(size))} ", printed, re.MULTILINE)


def run_ftplan(*words: str) -> str:
    output = io.StringIO()
    with redirect_stdout(output):
        assert cli.main(list(words)) == 0
    return output.getvalue()


# --- other tables of the memory model


LAYER_PLANS = {
    "LoRA": TrainingPlan(method="lora"),
    "QLoRA": TrainingPlan(method="qlora", quantization="nf4"),
    "full, bf16": TrainingPlan(method="full", mixed_precision="no"),
    "full, fp32": TrainingPlan(method="full", dtype="float32"),
}


def test_the_layers_table_is_what_the_step_keeps() -> None:
    """Its rows are by hand; the step's trace knows their sum."""
    heading = "Bytes a token that a Llama layer keeps"
    *operations, total = table("memory-model.md", heading)
    assert f"| operation | {' | '.join(LAYER_PLANS)} |" in section(page("memory-model.md"), heading)
    for column, plan in enumerate(LAYER_PLANS.values(), start=1):
        plain = plan.replace(gradient_checkpointing=False)
        step = compiled_step(example()[0], plain, 1, 2048, None, OWN_STACK)
        layer = step.trace.segments[2]
        _, _, _, per_token, _ = layer.kept["activations"]
        assert sum(number(row[column]) for row in operations) == number(total[column]) == per_token


def test_the_rules_table_is_what_the_command_line_gives() -> None:
    for command, allocated, device, per_parameter in table(
        "memory-model.md", "The rule beside the model"
    ):
        words = codes(command)[0].split()
        found = json.loads(run_ftplan("estimate", *words, "--json"))
        size = found["per_gpu"]["device_peak_bytes"]
        assert format_bytes(found["per_gpu"]["allocated_peak_bytes"]) == allocated, command
        assert format_bytes(size) == device, command
        assert f"{size / found['model']['num_parameters']:.2f}" == per_parameter, command


def test_the_comparison_with_measured_runs_is_current() -> None:
    """A line for each method, base and sharding of tests/measured/rows.jsonl."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in ROWS:
        config = row["config"]
        cards = {"NVIDIA": "A100", "Tesla": "T4"}[row["gpu"].split()[0]]
        many = "FSDP" if config["sharding"] == "fsdp_full_shard" else "one"
        key = (f"{many}, {cards}", config["method"], config["quantization"])
        groups.setdefault(key, []).append(error_of(row["id"]))
    rows = table("memory-model.md", "Predicted and measured")
    assert [
        [
            *key,
            str(len(errors)),
            f"{100 * statistics.median(map(abs, errors)):.2f} %",
            f"{100 * statistics.mean(errors):+.2f} %",
            f"{100 * max(errors, key=abs):+.2f} %",
        ]
        for key, errors in sorted(groups.items())
    ] == rows


def test_the_comparison_on_a_processor_is_current(devices: dict[str, Device]) -> None:
    """The measured columns are what was measured; the others follow from them and the code."""
    model, longest = require_model("smollm2-135m-instruct").spec, 330
    for method, rows, checkpointing, predicted, measured, error, process, holes in table(
        "memory-model.md", "Measured on a processor"
    ):
        plan = TrainingPlan(
            method=method,
            dtype="float32",
            mixed_precision="no",
            per_device_train_batch_size=int(rows),
            gradient_accumulation_steps=8 // int(rows),
            gradient_checkpointing=checkpointing == "yes",
        )
        memory = estimate_memory(model, plan, device=devices["CPU"], longest_row=longest)
        mebibytes = round(memory.allocated_peak_bytes / MIB)
        sizes = [number(cell.removesuffix(" MiB")) for cell in (predicted, measured, process)]
        assert sizes[0] == mebibytes
        assert error == f"{100 * (sizes[0] / sizes[1] - 1):+.1f} %"
        assert holes == f"{(sizes[2] - 636) / sizes[1] - 1:.2f}"
        assert float(holes) <= CPU_WORST_HEAP_HOLES


# --- accuracy


@pytest.mark.parametrize("heading", pages.TABLES)
def test_the_tables_of_accuracy_are_current(heading: str) -> None:
    """`python -m benchmarks.pages` writes them anew."""
    expected = [rows() for rows in pages.TABLES[heading]]
    assert tables("accuracy.md", heading) == expected


def test_writing_the_tables_of_accuracy_leaves_the_rest_alone() -> None:
    emptied = re.sub(r"^\| full \|.*\n", "", page("accuracy.md"), flags=re.MULTILINE)
    assert emptied != page("accuracy.md") == pages.with_tables(emptied)


# --- policy


def derived_settings(data: DataProfile, devices: dict[str, Device], model: ModelSpec) -> set[str]:
    """Every setting that any method on any device gets by a rule."""
    found: set[str] = set()
    for device in devices.values():
        for method in COMPARED_METHODS:
            if METHODS[method].quantized_base and device.kind == "cpu":
                continue
            space = Space(model, data, {"method": method}, OWN_STACK)
            teams = teams_of([device, structs.replace(device, index=1)], None)
            for candidate in space.candidates(space.groups(METHODS[method], teams)):
                found |= _derived(candidate.reasoned)
    several = structs.replace(data, task_lengths={"a": data.lengths, "b": data.lengths})
    space = Space(model, several, {"gradient_checkpointing": False}, OWN_STACK)
    (group, *_) = space.groups(METHODS["poly"], teams_of([devices["CPU"]], None))
    found |= _derived(group.base)
    best = choose_plan(model, data, devices["CPU"], {}).best
    assert best is not None
    limited = limit_to_time_budget(best, data, {}, budget_seconds=1e-3).reasoned
    return found | _derived(limited)


def _derived(reasoned: ReasonedPlan) -> set[str]:
    return {n for n, reason in reasoned.reasons.items() if reason.origin == "derived"}


def test_the_policy_page_has_a_rule_for_every_derived_setting(
    few_short_rows: DataProfile, devices: dict[str, Device], small_llama: ModelSpec
) -> None:
    listed = [codes(row[0])[0] for row in table("policy.md", "Derived settings")]
    assert len(listed) == len(set(listed))
    assert set(listed) == derived_settings(few_short_rows, devices, small_llama)


def test_the_policy_page_has_every_other_default() -> None:
    derived = {codes(row[0])[0] for row in table("policy.md", "Derived settings")}
    defaults = {codes(row[0])[0]: codes(row[1])[0] for row in table("policy.md", "Defaults")}
    assert derived | set(defaults) == set(SETTING_NAMES) and not derived & set(defaults)
    for name, shown in defaults.items():
        assert shown == str(getattr(TrainingPlan(), name)), name


def test_the_policy_page_gives_the_reasons_that_are_shown() -> None:
    shown = {codes(row[0])[0]: row[2] for row in table("policy.md", "Defaults")}
    assert set(WHY_DEFAULT) >= set(shown)
    for name, reason in shown.items():
        assert reason.startswith(WHY_DEFAULT[name]), name


def row_counts(cell: str) -> list[int]:
    """The ends of `under 1,000`, `1,000 to 1,999` or `20,000 up`."""
    numbers = [number(text) for text in re.findall(r"[\d,]+", cell)]
    return [1, numbers[0] - 1] if cell.startswith("under") else numbers


def test_what_the_data_decides_is_the_policys() -> None:
    rows = table("policy.md", "What the size of the data decides")
    ends = [row_counts(row[0]) for row in rows]
    assert ends[0][0] == 1 and len(ends[-1]) == 1
    assert [end[1] + 1 for end in ends[:-1]] == [end[0] for end in ends[1:]]
    for row, counts in zip(rows, ends, strict=True):
        for count in counts:
            assert policy.effective_batch_size(count).value == int(row[1])
            assert policy.num_train_epochs(count).value == int(row[3])


def test_what_ranks_hold_is_the_policys() -> None:
    for row in table("policy.md", "The rank"):
        model = require_model(row[0]).spec
        for rank, held in zip((policy.LORA_RANKS[0], policy.LORA_RANKS[-1]), row[1:], strict=True):
            settings = MethodSettings(lora_rank=rank)
            trained = METHODS["lora"].count(model, settings).num_trainable_parameters
            tokens = trained * policy.BITS_PER_PARAMETER / policy.BITS_PER_TOKEN
            assert format_count(tokens) == held, row[0]


def test_the_learning_rates_are_the_policys() -> None:
    rates = [float(row[2]) for row in table("policy.md", "Learning rate")]
    sizes = ("29B", "34B", "29B", "34B", "0.9B", "1.1B")
    models = [spec_from_size(round(float(size[:-1]) * 1e9), size) for size in sizes]
    methods = [METHODS[name] for name in (*2 * ("lora",), *2 * ("lora-plus",), *2 * ("full",))]
    advised = [policy.learning_rate(m, s).value for m, s in zip(methods, models, strict=True)]
    assert rates == advised


def test_the_page_has_each_methods_own_rate() -> None:
    listed = {
        name: (float(row[1]), row[2])
        for row in table("policy.md", "Rates of single methods")
        for name in codes(row[0])
    }
    assert listed == {name: (own.rate, own.source) for name, own in METHOD_RATES.items()}
    model = spec_from_size(70_000_000_000, "70B")
    for name, (rate, source) in listed.items():
        advice = policy.learning_rate(METHODS[name], model)
        assert (advice.value, advice.why) == (rate, source), name


def test_the_page_has_each_objectives_rate_and_weight() -> None:
    listed = {codes(row[0])[0]: row for row in table("policy.md", "Preferences and rewards")}
    assert set(listed) == set(OBJECTIVES) - {"sft"}
    for name, row in listed.items():
        objective = OBJECTIVES[name]
        assert float(row[1]) == objective.learning_rate, name
        assert (float(row[2]) if row[2] else None) == objective.beta, name
    for word in (*OBJECTIVES["dpo"].loss_types, *OBJECTIVES["dpo"].other_loss_types):
        assert f"`{word}`" in section(page("policy.md"), "Preferences and rewards"), word


def capability(quantization: str) -> str:
    return ".".join(map(str, QUANTIZATION_CAPABILITY[quantization]))


def test_the_pages_state_the_constants() -> None:
    """Where a constant is changed its sentence is to be read again."""
    sizes = [f"{size:,}" for size in MICRO_BATCHES]
    for name, heading, said in (
        ("policy.md", "The time budget on a processor",
         f"{policy.CPU_TIME_BUDGET_SECONDS:g} seconds"),
        ("policy.md", "The model when none is named",
         f"within {policy.MODEL_CHOICE_SECONDS / 3600:g} hours"),
        ("policy.md", "The model when none is named", f"{policy.ROWS_FOR_A_BASE_MODEL:,} rows on"),
        ("policy.md", "The rank",
         f"the lowest of {', '.join(map(str, policy.LORA_RANKS[:-1]))} and "
         f"{policy.LORA_RANKS[-1]} for which"),
        ("policy.md", "The rank",
         f"trained parameters x {policy.BITS_PER_PARAMETER:g} bits >= trained tokens of one epoch "
         f"x {policy.BITS_PER_TOKEN:g} bit"),
        ("policy.md", "What fits", f"required x {1 + MEMORY_MARGIN:g} <= "),
        ("policy.md", "Micro-batch and checkpointing",
         f"{', '.join(sizes[:-1])} and {sizes[-1]} rows"),
        ("time-model.md", "Eq. (T4): traffic",
         f"moved {PASSES_OVER_LOGITS['stock']} times as fp32"),
        ("time-model.md", "Eq. (T4): traffic",
         f"{PASSES_OVER_LOGITS['trl-fused']} times by a fused one"),
        ("time-model.md", "Eq. (T4): traffic",
         f"{PASSES_OVER_LOGITS_WITHOUT_KERNEL} times by TRL's"),
        ("time-model.md", "Eq. (T3): the rate of products",
         f"R(dtype) = {TRAINING_SHARE_OF_MATMUL.middle:.0%}".replace("%", " %")),
        ("time-model.md", "Eq. (T3): the rate of products",
         f"{MATMUL_SHARE_OF_PEAK.middle:.0%} of the data".replace("%", " %")),
        ("time-model.md", "Eq. (T4): traffic",
         f"B = {SHARE_OF_BANDWIDTH['cuda'].middle:.0%}".replace("%", " %")),
        ("time-model.md", "Eq. (T6): launching kernels", f"{1e6 * HOST_SECONDS:g} µs"),
        ("time-model.md", "Eq. (T6): launching kernels", f"{1e6 * HOST_SECONDS_WITH_HOOKS:g} µs"),
        ("time-model.md", "Eq. (T6): launching kernels", f"{1e6 * LAUNCH_SECONDS:g} µs"),
        *(
            ("time-model.md", "Eq. (T7): bounds", f"| {of.least:g} | {of.middle:g} | {of.most:g} |")
            for of in (TRAINING_SHARE_OF_MATMUL, MATMUL_SHARE_OF_PEAK, SHARE_OF_MEASURED,
                       *SHARE_OF_BANDWIDTH.values(), HOST_FACTOR)
        ),
        ("time-model.md", "Eq. (T9): energy and cost", f"{SHARE_OF_POWER:g} x the rated power"),
        ("policy.md", "The method", f"compute capability {capability('nf4')}"),
        ("policy.md", "The method", f"in int8 of {capability('int8')}"),
        ("memory-model.md", "Four numbers", f"required x {1 + MEMORY_MARGIN:g} <= "),
        *(
            ("memory-model.md", "Four numbers", f"{factor} x allocated")
            for factor in RESERVED_OVER_ALLOCATED.values()
        ),
        ("memory-model.md", "Four numbers", f"{ASSUMED_CUDA_CONTEXT_BYTES / GIB:g} GiB is assumed"),
        ("memory-model.md", "Eq. (9): host RAM",
         f"P ({CPU_PROCESS_BYTES / GIB:g} GiB + {CUDA_HOST_BYTES / GIB:.2f} GiB)"),
        ("memory-model.md", "Eq. (9): host RAM", f"min(saved, {SAVED_AT_ONCE_BYTES / 1e9:g} GB)"),
        ("memory-model.md", "Eq. (11): disk", f"{CHECKPOINTS_KEPT + 1} (saved + states)"),
        ("memory-model.md", "On a processor", f"reserved + {CPU_PROCESS_BYTES / GIB:g} GiB"),
        ("memory-model.md", "On a processor", f"= {1 + CPU_HEAP_HOLES:g} x allocated"),
        ("memory-model.md", "On a processor", f"= {1 + CPU_WORST_HEAP_HOLES:g} x allocated + "),
        ("data.md", "Split", f"{100 * policy.EVAL_SHARE:g} % of the usable rows"),
        ("after-training.md", "Forgetting", f"more than **{100 * PERPLEXITY_RISE:g} %**"),
        ("after-training.md", "Forgetting", f"{len(general_text().texts)} passages"),
    ):  # fmt: skip
        assert said in section(page(name), heading), (name, said)


# --- run directory


def test_the_table_of_files_lists_what_a_run_directory_names() -> None:
    run = RunDir(Path("run"))
    values = [
        getattr(run, name) for name, item in vars(RunDir).items() if isinstance(item, property)
    ]
    owned = {str(value.relative_to("run")) for value in values if isinstance(value, Path)}
    listed = [codes(row[0])[0] for row in table("run-directory.md", "Files")]
    assert len(listed) == len(set(listed))
    assert set(listed) == owned


def test_the_keys_of_train_yaml_are_all_described(devices: dict[str, Device]) -> None:
    config = emit.train_config(
        TrainingPlan(),
        devices["A100"],
        model="m",
        data={},
        eval_data=None,
        hashes={},
    )
    listed = {key for row in table("run-directory.md", "train.yaml") for key in codes(row[0])}
    assert listed == set(config)


# --- data


def test_the_examples_of_the_data_page_are_read_as_their_format(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for name, _, line, _ in table("data.md", "Formats"):
        path.write_text(codes(line)[0] + "\n", encoding="utf-8")
        data = read_data([path])
        assert data.format == codes(name)[0] and len(list(data.rows())) == 1, line


def test_the_data_page_names_every_problem_of_a_row() -> None:
    source = (ROOT / "launcher" / "data" / "shapes.py").read_text(encoding="utf-8")
    raised = set(re.findall(r'Unusable\(\s*"([^"]+)"', source))
    listed = " ".join(row[0] for row in table("data.md", "Rows that cannot be used"))
    assert len(raised) > 15
    assert [kind for kind in raised if kind not in listed] == []


# --- combinations


def test_the_page_lists_every_combination() -> None:
    rows = table("combinations.md", "Of model, plan and device")
    listed = [(*codes(name), outcome) for name, outcome, _, _ in rows]
    assert listed == [(known.name, known.outcome) for known in COMBINATIONS]


@pytest.mark.parametrize(("command", "error"), table("combinations.md", "Within a plan"))
def test_what_a_plan_cannot_be_is_refused_as_the_page_says(
    command: str,
    error: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    (line,) = codes(command)
    program, *words = line.split()
    assert program == "ftplan" and cli.main(words) == 2
    said = capsys.readouterr()
    assert not said.out
    message, _, hint = said.err.partition("hint: ")
    assert message.startswith("error: ") and error in message and hint.strip()
