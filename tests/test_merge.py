"""Adapters merged into tiny models: as PEFT would, from files and without the model in memory."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the `train` extra")

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ftplan.launcher.cli import main
from ftplan.launcher.merging import check, request
from ftplan.launcher.merging.gguf import find_tools
from ftplan.launcher.merging.merge import Merger
from ftplan.launcher.merging.modelfile import go_template, modelfile
from ftplan.launcher.merging.request import merge_request
from ftplan.launcher.run_dir import RunDir, write_json, write_yaml
from ftplan.launcher.training.adapters import peft_config_of
from ftplan.launcher.training.model_classes import MODEL_CLASSES
from ftplan.planner.errors import InputError
from ftplan.planner.methods import resolve_method
from tests.launcher_fixtures import CHATML, tiny_tokenizer

pytestmark = pytest.mark.train

TOKENS = torch.arange(20, 32)[None]

LLAMA_LIKE = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {**LLAMA_LIKE, "tie_word_embeddings": False}),
    "gpt2": (GPT2Config, GPT2),
    "mixtral": (MixtralConfig, {**LLAMA_LIKE, "num_local_experts": 4}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {**LLAMA_LIKE, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    ),
}

SETTINGS = {
    **{"objective": "sft", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0},
    **{"target_modules": ["all-linear"], "modules_to_save": [], "peft_config": []},
}

CHANGED = 0.05  # standard deviation of what is added to adapters, in the place of training


@cache
def tokenizer() -> Any:
    return tiny_tokenizer(CHATML, pad_token="<|bos|>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of models with random weights in float32, of several files each."""
    root = tmp_path_factory.mktemp("bases")

    @cache
    def made(name: str) -> Path:
        kind, shape = ARCHITECTURES[name]
        tokens = tokenizer()
        ends = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
        torch.manual_seed(0)
        config = kind(vocab_size=len(tokens), initializer_range=0.1, **ends, **shape)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name, max_shard_size="40KB")
        tokens.save_pretrained(root / name)
        return root / name

    return made


def loaded(folder: Path, objective: str = "sft") -> Any:
    kind = MODEL_CLASSES[objective]
    return kind.auto.from_pretrained(folder, dtype=torch.float32, **kind.settings).eval()


def made_run(
    root: Path, base: Path, method: str = "lora", resized: int = 0, **changed: Any
) -> RunDir:
    """A finished run of a method, its adapter moved from where it began."""
    settings = {**SETTINGS, **changed}
    model = loaded(base, settings["objective"])
    if resized:
        model.resize_token_embeddings(resized)
    torch.manual_seed(1)
    tuned = get_peft_model(model, peft_config_of(resolve_method(method), settings, model))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(CHANGED * torch.randn_like(parameter))
    run = RunDir(root)
    tuned.save_pretrained(run.adapter)
    tokenizer().save_pretrained(run.adapter)
    write_inputs(run, base, method, settings)
    return run


def write_inputs(run: RunDir, base: Path, method: str, settings: Mapping[str, Any]) -> None:
    plan = {name: {"value": value} for name, value in settings.items()}
    write_yaml(run.plan, {"plan": plan})
    write_yaml(run.accelerate, {"num_processes": 1})
    write_yaml(run.train, {"model": str(base), "method_settings": dict(settings)})
    model = {"name": "tiny", "hub_id": None, "num_parameters": 1000}
    counts = {"num_rows_left": 10, "num_tokens": 100}
    figures = {"allocated_bytes": 1, "device_bytes": 2, "step_seconds": 0.1, "train_seconds": 1.0}
    record = {
        **{"name": "made", "method": method, "output": "adapter", "model": model, "steps": 3},
        **{"num_trainable_parameters": 10, "device": "a processor", "overlong": {"train": counts}},
        **{"data_sha256": "0", "template_sha256": "0", "predicted": figures, "measured": figures},
        "evaluation": {"before": 2.0, "after": 1.0, "num_rows": 2},
    }
    write_json(run.record, record)


def merged(run: RunDir, dtype: torch.dtype | None = torch.float32) -> Path:
    asked = merge_request(run.root, None)
    asked.out.mkdir()
    Merger(asked, dtype).write(asked.out, iter)
    return asked.out


def unmerged(run: RunDir, base: Path, objective: str = "sft") -> Any:
    return PeftModel.from_pretrained(loaded(base, objective), run.adapter).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


METHODS = (
    *("lora", "rslora", "dora", "pissa", "qlora", "lora-fa", "adalora", "loha", "lokr", "ia3"),
    *("vera", "oft", "boft", "hra", "miss", "randlora", "delora", "ln-tuning", "psoft"),
    *("trainable-tokens", "glora", "hira", "unilora"),
)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_from_files_is_pefts_merge_to_the_bit(
    method: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    """And it computes what base and adapter compute."""
    folder = base("llama")
    run = made_run(tmp_path / "run", folder, method)
    model = unmerged(run, folder)
    wanted = logits(model)
    found = loaded(merged(run))
    assert torch.allclose(logits(found), wanted, atol=1e-4)
    assert not torch.allclose(logits(loaded(folder)), wanted, atol=1e-2), "nothing was tuned"
    by_peft = model.merge_and_unload().state_dict()
    assert all(torch.equal(by_peft[name], tensor) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["lora", "vera", "adalora"])
def test_every_architecture_is_merged_as_peft_does(
    method: str, architecture: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    """GPT-2's weights are transposed and its files leave a prefix out; experts are stacked in the
    model and apart in the files."""
    folder = base(architecture)
    run = made_run(tmp_path / "run", folder, method)
    model = unmerged(run, folder)
    wanted = logits(model)
    out = merged(run)
    found = loaded(out)
    assert torch.allclose(logits(found), wanted, atol=1e-4)
    by_peft = model.merge_and_unload().state_dict()
    assert all(torch.equal(by_peft[name], tensor) for name, tensor in found.state_dict().items())
    names = [set(json.loads((f / INDEX).read_text())["weight_map"]) for f in (folder, out)]
    assert names[0] == names[1], "the files have the names that the base's have"


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe"])
def test_adapters_of_stacked_experts_are_merged(
    architecture: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = base(architecture)
    experts = "target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"
    run = made_run(
        tmp_path / "run", folder, target_modules=["q_proj", "v_proj"], peft_config=[experts]
    )
    wrapped = PeftConfig.from_pretrained(run.adapter)
    assert wrapped.target_parameters
    model = unmerged(run, folder)
    wanted = logits(model)
    out = merged(run)
    assert torch.allclose(logits(loaded(out)), wanted, atol=1e-4)
    before, after = tensors(folder), tensors(out)
    changed = [name for name in before if "experts" in name and differ(before, after, name)]
    assert len(changed) == len([name for name in before if ".experts." in name])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def differ(before: Mapping[str, torch.Tensor], after: Mapping[str, Any], name: str) -> bool:
    return not torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    "changed",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"peft_config": ["trainable_token_indices=[3,5]"]},
        {"resized": 300},
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_tuned_embeddings_and_heads_are_merged_tied_or_not(
    architecture: str, changed: dict[str, Any], base: Callable[[str], Path], tmp_path: Path
) -> None:
    """Where only one of two tied weights was tuned, the merged model has both apart."""
    folder = base(architecture)
    run = made_run(tmp_path / "run", folder, **changed)
    model = loaded(folder)
    if "resized" in changed:
        model.resize_token_embeddings(changed["resized"])
    wanted = logits(PeftModel.from_pretrained(model, run.adapter).eval())
    assert torch.allclose(logits(loaded(merged(run))), wanted, atol=1e-4)


def test_a_reward_models_head_is_merged(base: Callable[[str], Path], tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", base("llama"), objective="reward")
    torch.manual_seed(2)  # the base has no such head: each load makes another one
    wanted = logits(unmerged(run, base("llama"), "reward"))
    found = AutoModelForSequenceClassification.from_pretrained(merged(run)).eval()
    assert torch.allclose(logits(found), wanted, atol=1e-4)


def test_a_base_of_32_bits_becomes_one_of_16_rounded_once(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = base("qwen3")
    run = made_run(tmp_path / "run", folder)
    by_peft = unmerged(run, folder).merge_and_unload().to(torch.bfloat16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(merged(run, None))
    assert found.dtype is torch.bfloat16
    assert all(torch.equal(by_peft[name], tensor) for name, tensor in found.state_dict().items())


def test_what_a_base_keeps_in_another_type_keeps_it(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base("qwen3"), folder)
    for file in folder.glob("*.safetensors"):
        kept = {k: t if "norm" in k else t.bfloat16() for k, t in load_file(file).items()}
        save_file(kept, file, metadata={"format": "pt"})
    out = merged(made_run(tmp_path / "run", folder), torch.float16)
    found = {name: tensor.dtype for name, tensor in tensors(out).items()}
    assert {d for name, d in found.items() if "norm" in name} == {torch.float32}
    assert {d for name, d in found.items() if "norm" not in name} == {torch.float16}


def ftplan(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, " ".join(captured.err.split())


def test_the_merged_folder_is_whole(
    base: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run", base("llama"))
    status, out, _ = ftplan("merge", run.root, "--dtype", "float32", "--json", capsys=capsys)
    assert status == 0
    said = json.loads(out)
    assert said["folder"] == str(run.merged) and said["dtype"] == "float32"
    assert said["num_merged_modules"] == 14
    assert said["check"]["difference"] < 1e-5 < said["check"]["adapter_share"]
    names = {path.name for path in run.merged.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "README.md", INDEX}
    assert AutoTokenizer.from_pretrained(run.merged).chat_template == CHATML
    card = (run.merged / "README.md").read_text()
    assert "library_name: transformers" in card and str(tmp_path) not in card
    assert [path.name for path in run.root.iterdir() if path.name.startswith(".")] == []
    status, _, err = ftplan("merge", run.root, capsys=capsys)
    assert status == 2 and "is there already" in err


def test_a_wrong_merge_is_noticed_and_leaves_nothing(
    base: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = made_run(tmp_path / "run", base("llama"))
    monkeypatch.setattr(
        "ftplan.launcher.merging.merge.EmptyTuned.merged",
        lambda self, tuned, read: {name: read(name) for name in tuned.parameters},
    )
    status, _, err = ftplan("merge", run.root, capsys=capsys)
    assert status == 1 and "does not compute what base and adapter do" in err
    assert not run.merged.exists() and not list(run.root.glob(".*"))


def test_a_model_too_large_to_compare_is_merged_and_said_so(
    base: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = made_run(tmp_path / "run", base("llama"))
    monkeypatch.setattr(check, "ram_bytes", lambda: (1000, 1000))
    status, out, err = ftplan("merge", run.root, "--json", capsys=capsys)
    assert status == 0 and json.loads(out)["check"] is None
    assert "not compared" in err


def test_rounding_that_drowns_the_adapter_is_said() -> None:
    some = {"num_tokens": 4, "same_top1": 1.0, "tolerance": 0.1}
    assert check.Check(difference=0.02, adapter_share=0.01, **some).drowned
    assert not check.Check(difference=0.02, adapter_share=0.5, **some).drowned
    assert not check.Check(difference=0.02, adapter_share=None, **some).drowned


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning", "p-tuning", "lily"])
def test_what_has_no_part_in_the_weights_is_refused(
    method: str, base: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run", base("llama"), method)
    status, _, err = ftplan("merge", run.root, capsys=capsys)
    assert status == 2 and "merge" in err and "`--method lora`" in err
    assert not run.merged.exists() and not list(run.root.glob(".*"))


def test_bad_input_is_said(
    base: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def err_of(*words: object) -> str:
        status, _, err = ftplan("merge", *words, capsys=capsys)
        assert status == 2
        return err

    assert "no run directory" in err_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is not a run directory" in err_of(tmp_path / "empty")
    run = made_run(tmp_path / "run", base("llama"))
    record = run.read_record()
    write_json(run.record, {**record, "output": "model", "method": "full"})
    assert "nothing is left to merge" in err_of(run.root)
    run.record.unlink()
    assert "has not finished" in err_of(run.root)
    write_json(run.record, record)
    assert "not on PATH" in err_of(run.root, "--gguf")
    assert "no GGUF type `q9`" in err_of(run.root, "--gguf", "q9")
    monkeypatch.setattr(
        request.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0)
    )
    assert "is free there" in err_of(run.root)
    monkeypatch.undo()
    damaged = tmp_path / "damaged"
    shutil.copytree(base("llama"), damaged)
    next(damaged.glob("*.safetensors")).write_bytes(b"not tensors")
    write_yaml(run.train, {"model": str(damaged), "method_settings": SETTINGS})
    assert "cannot read" in err_of(run.root)
    shutil.rmtree(damaged)
    assert "no longer at" in err_of(run.root)


def test_merging_takes_the_memory_of_a_shard_not_of_the_model(tmp_path: Path) -> None:
    """Fourteen shards; a small merge before it has loaded the libraries."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["model_bytes"] > 10 * said["shard_bytes"]
    # Pages of mapped files count for as long as the system has no other use for them.
    assert said["rise_bytes"] < 6 * said["shard_bytes"]


def measured_rise(root: Path) -> dict[str, int]:
    """Of the resident memory's peak, by a merge in this process."""
    rise = 0
    for name, num_layers in (("small", 1), ("large", 16)):
        torch.manual_seed(0)
        config = LlamaConfig(
            **{"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 2048},
            **{"num_hidden_layers": num_layers, "num_attention_heads": 8},
        )
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(root / name, max_shard_size="20MB")
        settings = {**SETTINGS, "lora_rank": 2}
        run = RunDir(root / f"{name}-run")
        tuned = get_peft_model(model, peft_config_of(resolve_method("lora"), settings, model))
        tuned.save_pretrained(run.adapter)
        del model, tuned
        tokenizer().save_pretrained(run.adapter)
        write_inputs(run, root / name, "lora", settings)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        before = status_bytes("VmRSS")
        merged(run)
        rise = status_bytes("VmHWM") - before
    sizes = [file.stat().st_size for file in (root / "large").glob("*.safetensors")]
    return {"rise_bytes": rise, "model_bytes": sum(sizes), "shard_bytes": max(sizes)}


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


CONVERTER = """#!/usr/bin/env python
import sys
folder, _, target, _, kind = sys.argv[1:]
open(target, "w").write(kind)
"""

QUANTIZER = '#!/bin/sh\necho "$3" > "$2"\n'


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for llama.cpp's programs, on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("convert_hf_to_gguf.py", CONVERTER), ("llama-quantize", QUANTIZER)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize(("kind", "written"), [("q8_0", "q8_0"), ("q4_k_m", "Q4_K_M\n")])
def test_a_gguf_file_comes_with_a_modelfile(
    kind: str,
    written: str,
    base: Callable[[str], Path],
    tmp_path: Path,
    tools: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = made_run(tmp_path / "run", base("llama"))
    status, out, _ = ftplan("merge", run.root, "--gguf", kind, capsys=capsys)
    assert status == 0
    assert (run.merged / f"model-{kind}.gguf").read_text() == written
    assert f"FROM ./model-{kind}.gguf" in (run.merged / "Modelfile").read_text()
    assert "ollama create" in out
    assert not list(run.merged.glob(".*"))


def test_what_llama_cpp_says_is_passed_on(
    base: Callable[[str], Path], tmp_path: Path, tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tools / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such architecture')\n")
    run = made_run(tmp_path / "run", base("llama"))
    status, _, err = ftplan("merge", run.root, "--gguf", capsys=capsys)
    assert status == 1 and "no such architecture" in err
    (tools / "llama-quantize").unlink()
    with pytest.raises(InputError, match="llama-quantize"):
        find_tools("q4_k_m", {"PATH": str(tools)})


def test_a_modelfile_has_the_template_and_the_stop_tokens() -> None:
    from ftplan.launcher.data.tokens import RowTokenizer

    text = modelfile("model-f16.gguf", RowTokenizer(tokenizer()))
    assert text == (
        "FROM ./model-f16.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n'
        "<|im_start|>user\n{{ else }}<|im_start|>user\n{{ end }}{{ .Prompt }}<|im_end|>\n"
        '<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )
    twice = CHATML.replace("{{ message.content }}", "{{ message.content }}{{ message.content }}")
    assert go_template(RowTokenizer(tiny_tokenizer(twice))) is None
    plain = go_template(RowTokenizer(tiny_tokenizer()))
    assert plain is not None and "### Instruction:\n{{ end }}{{ .Prompt }}" in plain


if __name__ == "__main__":
    print(json.dumps(measured_rise(Path(sys.argv[1]))))
