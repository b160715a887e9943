"""What a plan turns into: files that accelerate and TRL themselves accept, and one command."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from ftplan.launcher import emit
from ftplan.launcher.data.hashes import RowHashes
from ftplan.launcher.run_dir import RunDir, read_mapping, write_yaml
from ftplan.launcher.training.config import read_train_config
from ftplan.planner.cycles import CYCLE_SETTINGS
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.objective_checks import GENERATION_SETTINGS
from ftplan.planner.optimizers import OPTIMIZERS
from ftplan.planner.plan import SCHEDULES, TrainingPlan

CPU = Device(
    name="Some CPU",
    kind="cpu",
    total_bytes=2**35,
    free_bytes=2**34,
    memory_bandwidth_bytes_per_second=2e10,
    peak_flops_per_second={"float32": 2e11},
)
GPU = structs.replace(CPU, name="Some GPU", kind="cuda", uuid="GPU-1234-5678")

ON_CPU = TrainingPlan(
    dtype="float32",
    mixed_precision="no",
    per_device_train_batch_size=3,
    gradient_accumulation_steps=5,
    max_length=384,
    optim="adamw_torch",
    learning_rate=1e-5,
    warmup_ratio=0.07,
    num_train_epochs=2.5,
    seed=11,
)


def data(*files: str) -> dict[str, Any]:
    return {"files": list(files), "sha256": "0" * 64, "columns": {"output": "a"}}


FILES: dict[str, Any] = {
    "model": "/models/tiny",
    "data": data("data/rows.jsonl"),
    "eval_data": None,
    "hashes": dict.fromkeys(RowHashes.__struct_fields__, "1" * 64),
}


def written(run: RunDir, plan: TrainingPlan, device: Device, **changes: Any) -> RunDir:
    """The run's own files, as the launcher writes them."""
    write_yaml(run.train, emit.train_config(plan, device, **{**FILES, **changes}))
    write_yaml(run.accelerate, emit.accelerate_config(plan, device))
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Somewhere with a blank and a quote in its path."""
    return RunDir(tmp_path / "it's mine")


@pytest.fixture(scope="module")
def sft_arguments() -> Callable[..., Any]:
    """How the training process makes TRL's configuration; takes seconds to import."""
    pytest.importorskip("trl")
    from ftplan.launcher.training.loop import sft_arguments

    return sft_arguments


class TestAccelerate:
    @pytest.mark.parametrize("device", [CPU, GPU], ids=lambda device: device.kind)
    @pytest.mark.parametrize("num_gpus", [1, 4])
    @pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
    def test_its_own_loader_reads_the_file(
        self, run: RunDir, device: Device, num_gpus: int, mixed_precision: str
    ) -> None:
        config_args = pytest.importorskip("accelerate.commands.config.config_args")
        plan = ON_CPU.replace(num_gpus=num_gpus, mixed_precision=mixed_precision)
        written(run, plan, device)
        config = config_args.load_config_from_file(str(run.accelerate))
        assert type(config).__name__ == "ClusterConfig"
        assert config.distributed_type.value == ("NO" if num_gpus == 1 else "MULTI_GPU")
        assert config.num_processes == num_gpus
        assert (config.num_machines, config.machine_rank) == (1, 0)
        assert config.mixed_precision == mixed_precision
        assert config.use_cpu is (device.kind == "cpu" and num_gpus == 1)

    @pytest.mark.parametrize("offload", ["none", "parameters"])
    def test_its_own_plugin_divides_the_model_as_planned(self, run: RunDir, offload: str) -> None:
        launch = pytest.importorskip("accelerate.commands.launch")
        from accelerate.utils import FullyShardedDataParallelPlugin
        from accelerate.utils.launch import prepare_multi_gpu_env

        written(run, ON_CPU.replace(num_gpus=4, sharding="fsdp", offload=offload), GPU)
        parsed = launch.launch_command_parser().parse_args(emit.launch_command(run)[3:])
        parsed, _, _ = launch._validate_launch_command(parsed)
        assert parsed.use_fsdp and parsed.num_processes == 4
        with mock.patch.dict(os.environ, prepare_multi_gpu_env(parsed)):
            assert os.environ["ACCELERATE_USE_FSDP"] == "true"
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
        assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
        assert plugin.cpu_ram_efficient_loading
        offloads = type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"
        assert offloads is (offload == "parameters")

    @pytest.mark.parametrize("resume", [False, True])
    def test_its_own_parser_finds_module_run_and_settings_in_the_command(
        self, run: RunDir, resume: bool
    ) -> None:
        launch = pytest.importorskip("accelerate.commands.launch")
        written(run, ON_CPU, CPU)
        command = emit.launch_command(run, run.checkpoints / "checkpoint-5" if resume else None)
        parsed = launch.launch_command_parser().parse_args(command[3:])
        parsed, _, _ = launch._validate_launch_command(parsed)
        child, environment = launch.prepare_simple_launcher_cmd_env(parsed)
        expected = [sys.executable, "-m", "ftplan.launcher.train", str(run.root)]
        assert child == expected + ["--resume", "checkpoint-5"] * resume
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
        assert environment["ACCELERATE_USE_CPU"] == "True"

    def test_the_command_is_exactly_this(self) -> None:
        run = RunDir(Path("runs/mine"))
        expected = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            "runs/mine/accelerate.yaml",
            "-m",
            "ftplan.launcher.train",
            "runs/mine",
        ]
        assert emit.launch_command(run) == expected
        checkpoint = run.checkpoints / "checkpoint-5"
        assert emit.launch_command(run, checkpoint) == [*expected, "--resume", "checkpoint-5"]


class TestTrainConfig:
    def test_the_training_process_reads_back_what_was_planned(self, run: RunDir) -> None:
        plan = ON_CPU.replace(target_modules=("q_proj", "v_proj"))
        config = read_train_config(written(run, plan, CPU))
        assert (config.model, config.method) == ("/models/tiny", "lora")
        assert config.data.files == (run.root / "data" / "rows.jsonl",)
        assert config.data.columns == {"output": "a"} and config.data.sha256 == "0" * 64
        assert (config.eval_data, config.test_share) == (None, 0.0)
        assert (config.overlong, config.max_length) == ("truncate", plan.max_length)
        assert config.hashes.to_dict() == FILES["hashes"]
        assert config.training_arguments == emit.training_arguments(plan, CPU.kind)
        assert config.method_settings["target_modules"] == ["q_proj", "v_proj"]
        assert not config.is_quantized

    def test_what_judges_completions_is_told_with_its_folders(self) -> None:
        plan = ON_CPU.replace(
            **{"objective": "rloo", "loss": "trl-fused", "per_device_train_batch_size": 8},
            **{"max_length": 1024, "reward_model": "runs/judge", "reward": ("exact-match",)},
        )
        folders = {"model": "/models/base", "adapter": "/runs/judge/adapter"}
        told = emit.train_config(plan, GPU, **FILES, reward_model=folders)
        assert told["rewards"] == {
            **{"reward_model": "runs/judge", "rules": ["exact-match"], **folders},
            **{"dtype": "float32", "attn_implementation": "sdpa", "rows": 8, "max_length": 1024},
        }
        assert emit.train_config(ON_CPU, GPU, **FILES)["rewards"] is None

    def test_a_file_outside_the_run_stays_where_it_is(self, run: RunDir) -> None:
        config = read_train_config(
            written(run, ON_CPU, CPU, data=data("/far/rows.jsonl"), eval_data=data("/far/held.csv"))
        )
        assert config.data.files == (Path("/far/rows.jsonl"),)
        assert config.eval_data is not None
        assert config.eval_data.files == (Path("/far/held.csv"),)

    def test_every_setting_of_a_plan_is_written_somewhere(self) -> None:
        """A new field of TrainingPlan must reach the files that the run is started from."""
        other = {
            "method": "freeze",
            "quantization": "nf4",
            "double_quant": False,
            "dtype": "float16",
            "mixed_precision": "bf16",
            "target_modules": ("q_proj",),
            "modules_to_save": ("lm_head",),
            "peft_config": ("bias=all",),
            "trainable_modules": ("q_proj",),
            "add_tokens": ("<tool>",),
            "train_tokens": ("<tool>",),
            "chat_template": "plain",
            "autocast_adapter_dtype": False,
            "optim": "sgd",
            "gradient_checkpointing": False,
            "attn_implementation": "eager",
            "loss": "stock",
            "trainer": "transformers",
            "objective": "dpo",
            "overlong": "drop",
            "num_tasks": 3,
            "report_to": ("wandb",),
            "task_weighting": "equal",
            "task_weights": ("a=1",),
            "precompute_ref_log_probs": True,
            "lr_scheduler_type": "linear",
            "max_steps": 7,
            "num_generations": 4,
            "steps_per_generation": 2,
            "beta": 0.2,
            "gamma_beta_ratio": 0.2,
            "loss_type": "ipo",
            "reward_model": "runs/first",
            "reward": ("exact-match",),
            "jagged_restart_steps": 9,
            "jagged_restart_warmup_steps": 3,
            "relora_prune_method": "random",
        }
        generates = ON_CPU.replace(
            objective="grpo", loss="trl-fused", per_device_train_batch_size=8, max_length=1024
        )

        pairs = ON_CPU.replace(objective="dpo")

        def files(plan: TrainingPlan) -> str:
            config = emit.train_config(plan, GPU, **FILES)
            return json.dumps([config, emit.accelerate_config(plan, GPU)])

        bases = {
            "precompute_ref_log_probs": pairs,
            "num_machines": ON_CPU.replace(num_gpus=2),
            "tp_size": ON_CPU.replace(num_gpus=2, method="full"),
            "dp_replicate_size": ON_CPU.replace(num_gpus=4, sharding="fsdp"),
            "beta": pairs,
            "loss_type": pairs,
            "gamma_beta_ratio": pairs.replace(objective="simpo"),
            "trainable_modules": ON_CPU.replace(method="freeze"),
            "task_weights": ON_CPU.replace(task_weighting="fixed", task_weights=("b=1",)),
            **dict.fromkeys(GENERATION_SETTINGS, generates),
            **{name: ON_CPU.replace(method=m[0]) for name, m in CYCLE_SETTINGS.items()},
        }
        # Such plans are not launched (test_sharding).
        refused = ("sharding", "offload", "packing", "cp_size")
        for item in dataclasses.fields(TrainingPlan):
            if item.name in refused:
                continue
            base = bases.get(item.name, ON_CPU)
            value = getattr(base, item.name)
            changed = other[item.name] if item.name in other else type(value)(value / 2 + 0.5)
            if changed == value:
                changed = value + 1
            assert files(base.replace(**{item.name: changed})) != files(base), item.name

    @pytest.mark.parametrize("key", sorted(emit.train_config(ON_CPU, CPU, **FILES)))
    def test_nothing_in_train_yaml_goes_unread(self, run: RunDir, key: str) -> None:
        """A setting that is planned for, written down and then ignored is a wrong forecast."""
        written(run, ON_CPU, CPU)
        config = read_mapping(run.train)
        del config[key]
        write_yaml(run.train, config)
        with pytest.raises(InputError, match=f"has no `{key}`"):
            read_train_config(run)


class TestTrl:
    @pytest.mark.parametrize(
        "plan",
        [
            ON_CPU,
            ON_CPU.replace(warmup_ratio=0.0, max_steps=7, gradient_checkpointing=False),
            ON_CPU.replace(mixed_precision="bf16", lr_scheduler_type="linear", weight_decay=0.01),
            ON_CPU.replace(method="full", dtype="bfloat16", learning_rate=2e-5),
            ON_CPU.replace(optim="paged_adamw_8bit", save_steps=1, seed=0),
        ],
        ids=["plain", "steps", "bf16", "full", "8 bit"],
    )
    def test_its_configuration_takes_every_argument_and_keeps_its_value(
        self, run: RunDir, sft_arguments: Callable[..., Any], plan: TrainingPlan
    ) -> None:
        arguments = sft_arguments(
            read_train_config(written(run, plan, CPU)).training_arguments, str(run.checkpoints)
        )
        for name, value in emit.training_arguments(plan, CPU.kind).items():
            if name != "warmup_ratio":
                assert getattr(arguments, name) == value, name
        assert arguments.get_warmup_steps(1000) == round(1000 * plan.warmup_ratio)
        assert arguments.output_dir == str(run.checkpoints)
        assert arguments.device.type == "cpu"

    @pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_it_knows_every_optimizer_and_schedule(
        self,
        run: RunDir,
        sft_arguments: Callable[..., Any],
        optim: str,
        schedule: str,
    ) -> None:
        plan = ON_CPU.replace(
            optim=optim, lr_scheduler_type=schedule, gradient_accumulation_steps=1
        )
        arguments = sft_arguments(
            read_train_config(written(run, plan, CPU)).training_arguments, str(run.checkpoints)
        )
        stands_for = {"muon": "adamw_torch_fused"}.get(optim, optim)
        assert (arguments.optim, arguments.lr_scheduler_type) == (stands_for, schedule)
        low_rank = optim.startswith(("galore", "apollo"))
        assert arguments.optim_target_modules == ("all-linear" if low_rank else None)

    def test_every_argument_for_a_gpu_is_one_of_its_fields(self) -> None:
        """Its constructor refuses bf16 on a machine without one."""
        trl = pytest.importorskip("trl")
        known = {item.name for item in dataclasses.fields(trl.SFTConfig)}
        plan = TrainingPlan(method="qlora", quantization="nf4")
        arguments = emit.training_arguments(plan, GPU.kind)
        assert set(arguments) - {"warmup_ratio"} <= known
        assert (arguments["bf16"], arguments["fp16"], arguments["use_cpu"]) == (True, False, False)

    @pytest.mark.parametrize(
        ("configuration", "changes"),
        [
            ("DPOConfig", {"objective": "dpo"}),
            ("KTOConfig", {"objective": "kto", "per_device_train_batch_size": 2}),
            ("RewardConfig", {"objective": "reward", "loss": "stock"}),
        ],
    )
    def test_every_argument_of_an_objective_is_one_of_its_fields(
        self, configuration: str, changes: dict[str, Any]
    ) -> None:
        trl = pytest.importorskip("trl")
        known = {item.name for item in dataclasses.fields(getattr(trl, configuration))}
        arguments = emit.training_arguments(TrainingPlan(**changes), GPU.kind)
        assert set(arguments) - {"warmup_ratio"} <= known


class TestEnvironment:
    names = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ_", min_size=1, max_size=12)

    @settings(max_examples=30)
    @given(st.dictionaries(names, st.text(max_size=9)), st.sampled_from([CPU, GPU]))
    def test_the_parent_s_own_is_kept_and_little_is_added(
        self, environ: dict[str, str], device: Device
    ) -> None:
        environ = {"PATH": "/bin:/usr/bin", "HF_TOKEN": "hf_secret", **environ}
        child = emit.launch_environment(environ, [device], ON_CPU, 8)
        changes = emit.environment_changes([device], ON_CPU, 8)
        assert set(child) == set(environ) | set(changes)
        for name in set(environ) - set(changes):
            assert child[name] == environ[name]
        assert child["PYTHONSAFEPATH"] == "1"

    @pytest.mark.parametrize("device", [CPU, GPU], ids=lambda device: device.kind)
    def test_what_is_added_holds_no_secret_and_no_path(
        self, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is written to command.txt: it must follow from the plan alone."""
        before = emit.environment_changes([device], ON_CPU, 8)
        for name in before:
            monkeypatch.setenv(name, "hf_secret")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert emit.environment_changes([device], ON_CPU, 8) == before
        assert not {"PATH", "HOME", "HF_TOKEN", "PYTHONPATH"} & set(before)

    def test_gpus_are_named_by_their_ids(self) -> None:
        one = emit.launch_environment({}, [GPU], ON_CPU, 8)
        assert one["CUDA_VISIBLE_DEVICES"] == "GPU-1234-5678"
        assert one["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
        several = emit.launch_environment(
            {"CUDA_VISIBLE_DEVICES": "1,2,3"},
            [GPU, structs.replace(GPU, index=1, uuid="GPU-9")],
            ON_CPU.replace(num_gpus=2),
            8,
        )
        assert several["CUDA_VISIBLE_DEVICES"] == "GPU-1234-5678,GPU-9"
        unnamed = emit.launch_environment(
            {"CUDA_VISIBLE_DEVICES": "1"}, [structs.replace(GPU, uuid=None)], ON_CPU, 8
        )
        assert unnamed["CUDA_VISIBLE_DEVICES"] == "1"

    def test_one_of_amds_gpus_is_chosen_as_rocm_numbers_them(self) -> None:
        card = structs.replace(GPU, vendor="amd", uuid="GPU-00ff", index=3)
        environ = {"HIP_VISIBLE_DEVICES": "2,3"}
        named = emit.launch_environment(environ, [card], ON_CPU, 8)
        assert named["ROCR_VISIBLE_DEVICES"] == "GPU-00ff"
        assert named["HIP_VISIBLE_DEVICES"] == named["CUDA_VISIBLE_DEVICES"] == "0"
        unnamed = emit.launch_environment(environ, [structs.replace(card, uuid=None)], ON_CPU, 8)
        assert unnamed["ROCR_VISIBLE_DEVICES"] == "3"
        other = structs.replace(card, uuid=None, index=1)
        several = emit.launch_environment(environ, [other, card], ON_CPU.replace(num_gpus=2), 8)
        assert several["HIP_VISIBLE_DEVICES"] == several["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert several["ROCR_VISIBLE_DEVICES"] == "1,GPU-00ff"

    def test_on_the_processor_no_gpu_is_seen(self) -> None:
        child = emit.launch_environment({"CUDA_VISIBLE_DEVICES": "0"}, [CPU], ON_CPU, 8)
        assert child["CUDA_VISIBLE_DEVICES"] == ""
        assert "PYTORCH_CUDA_ALLOC_CONF" not in child

    @pytest.mark.parametrize(
        ("num_cores", "num_gpus", "threads"), [(8, 1, "8"), (8, 3, "2"), (2, 4, "1"), (1, 1, "1")]
    )
    def test_the_cores_are_shared_between_the_processes(
        self, num_cores: int, num_gpus: int, threads: str
    ) -> None:
        plan = ON_CPU.replace(num_gpus=num_gpus)
        assert emit.launch_environment({}, [GPU], plan, num_cores)["OMP_NUM_THREADS"] == threads
        given_by_hand = {"OMP_NUM_THREADS": "5"}
        child = emit.launch_environment(given_by_hand, [GPU], plan, num_cores)
        assert child["OMP_NUM_THREADS"] == "5"

    def test_a_module_in_the_user_s_folder_replaces_no_real_one(self, tmp_path: Path) -> None:
        (tmp_path / "argparse.py").write_text("raise SystemExit('replaced')")
        command = [sys.executable, "-m", "json.tool", "--help"]

        def status(environment: dict[str, str]) -> int:
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
            return done.returncode

        plain = {name: v for name, v in os.environ.items() if name != "PYTHONSAFEPATH"}
        assert status(plain) == 1, "the premise"
        assert status(emit.launch_environment(plain, [CPU], ON_CPU, 1)) == 0


class TestShellLine:
    def test_it_is_exactly_this(self) -> None:
        line = emit.shell_line(["python", "-m", "x", "runs/it's mine"], {"A": "1", "B": ""})
        assert line == "A=1 B='' python -m x 'runs/it'\"'\"'s mine'"
        assert emit.shell_line(["python"], {}) == "python"

    def test_a_shell_hands_over_every_sign(self) -> None:
        words = ["a b", "$HOME", "it's", '"', "", "*", "`id`", "a\nb", "é", "--x=~", "!!", "#"]
        script = "import json,os,sys; print(json.dumps([sys.argv[1:], os.environ['X']]))"
        line = emit.shell_line([sys.executable, "-c", script, *words], {"X": "; $(id) \\ '"})
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == [words, "; $(id) \\ '"]
