"""Python code that comes in a model's repository: run when the command line allows it, and only
then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher import remote_code
from tests.launcher_fixtures import CHATML, tiny_tokenizer

pytestmark = pytest.mark.train

# A Llama with one matrix for queries, keys and values, as Baichuan's own code has it.
CODE = '''
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

open({trace!r}, "a").close()


class BaichuanConfig(LlamaConfig):
    model_type = "baichuan"


class Part(nn.Module):
    """A third of what W_pack gives."""

    def __init__(self, packed, number):
        super().__init__()
        self.packed, self.number = [packed], number  # in a list it is no module of this one's

    def forward(self, states):
        return self.packed[0](states).chunk(3, dim=-1)[self.number]


class Attention(modeling_llama.LlamaAttention):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_proj, self.k_proj, self.v_proj = (Part(self.W_pack, n) for n in range(3))


class BaichuanForCausalLM(LlamaForCausalLM):
    config_class = BaichuanConfig

    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = Attention(config, number)
        self.post_init()
'''


def save_model_with_code(folder: Path, trace: Path) -> None:
    """A Baichuan of 100,000 parameters, which transformers has no classes for. Its code leaves a
    trace whenever it is run."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tokenizer = tiny_tokenizer(CHATML, pad_token="<|bos|>")
    tokenizer.save_pretrained(folder)
    (folder / "own_code.py").write_text(CODE.format(trace=str(trace)))
    width, inner, vocab = 64, 160, len(tokenizer)
    config = {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "own_code.BaichuanConfig",
            "AutoModelForCausalLM": "own_code.BaichuanForCausalLM",
        },
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.W_pack": (3 * width, width),
                "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
            }.items()
        }
    tensors = {name: torch.randn(shape) / 8 for name, shape in shapes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.{n}.{norm}.weight" for n in range(2) for norm in norms]
    tensors |= {name: torch.ones(width) for name in (*names, "model.norm.weight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def ftplan(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line in a folder, whatever a terminal or the environment would answer."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "FTPLAN_TRUST_REMOTE_CODE": "1",
        "TRUST_REMOTE_CODE": "1",
        "XDG_DATA_HOME": str(folder / "user"),
    }
    return subprocess.run(
        [sys.executable, "-m", "ftplan", *words],
        cwd=folder,
        env=environment,
        input="y\ny\ny\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_model_of_its_own_code_is_trained_and_merged_where_the_command_line_allows_it(
    tmp_path: Path,
) -> None:
    trace = tmp_path / "ran"
    save_model_with_code(tmp_path / "own", trace)
    rows = [{"instruction": f"Say {n}.", "output": f"{n} it is."} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    auto = ("auto", "rows.jsonl", "--model", "own", "--yes", "--name", "run", "--method", "lora")

    refused = ftplan(tmp_path, *auto)
    assert refused.returncode == 2, refused.stderr
    assert "`own` brings Python code of its own, and needs it" in refused.stderr
    assert "--trust-remote-code" in refused.stderr
    assert not trace.exists()
    assert not (tmp_path / "runs").exists()

    done = ftplan(tmp_path, *auto, "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: running the Python code that `own` brings") == 1
    record = json.loads((tmp_path / "runs" / "run" / "record.json").read_text())
    assert record["num_trainable_parameters"] > 0
    for path in (tmp_path / "runs" / "run").rglob("*.yaml"):
        assert "trust" not in path.read_text(), "the permission stands in no file"

    trace.unlink()
    for verb in ("launch", "merge"):
        command = ftplan(tmp_path, verb, "runs/run")
        assert command.returncode == 2, command.stderr
        assert "brings Python code of its own" in command.stderr
        assert "Traceback" not in command.stderr
    assert not trace.exists()
    assert (tmp_path / "runs" / "run" / "record.json").exists()


def test_code_in_another_repository_is_named(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "org/elsewhere--code.Config", "AutoModel": ["code.Model", None]}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    said: list[str] = []
    assert not remote_code.trusted(tmp_path)
    with remote_code.allowed(said.append):
        assert remote_code.trusted(tmp_path)
        assert remote_code.trusted(tmp_path), "named once"
        assert not remote_code.trusted(tmp_path, remote_code.TOKENIZER)
        assert remote_code.lacks_code(tmp_path)
        (tmp_path / "code.py").touch()
        assert not remote_code.lacks_code(tmp_path)
    assert not remote_code.is_allowed()
    here, elsewhere = said
    assert f"`{tmp_path}`" in here
    assert "`org/elsewhere`" in elsewhere


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"auto_map": null}', '{"auto_map": 3}'])
def test_settings_that_name_no_code_bring_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with remote_code.allowed(lambda _: pytest.fail("nothing is to be said")):
        assert not remote_code.trusted(tmp_path)
        assert not remote_code.lacks_code(tmp_path)
