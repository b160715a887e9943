"""Where metrics go besides metrics.jsonl: packages, keys, folders, and TensorBoard for real."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftplan.launcher import trackers
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.trackers import TRACKERS, goes_offline, require_trackers, tracker_settings
from ftplan.planner import plan
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.plan import TrainingPlan, parse_setting


def test_the_settings_names_are_the_launchers_and_transformers() -> None:
    assert tuple(TRACKERS) == plan.TRACKERS
    integrations = pytest.importorskip(
        "transformers.integrations.integration_utils", reason="needs the `train` extra"
    )
    assert set(TRACKERS) <= set(integrations.INTEGRATION_TO_CALLBACK)


def test_the_variables_are_those_that_the_callbacks_read() -> None:
    integrations = pytest.importorskip(
        "transformers.integrations.integration_utils", reason="needs the `train` extra"
    )
    text = Path(integrations.__file__).read_text(encoding="utf-8")
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT"):
        assert name in text


def test_none_is_nothing_and_others_are_named() -> None:
    assert parse_setting("report_to", "none") == ()
    assert parse_setting("report_to", "tensorboard, wandb") == ("tensorboard", "wandb")
    with pytest.raises(UnknownNameError, match="tensorbord"):
        TrainingPlan(report_to=("tensorbord",))


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda package: package == "tensorboardX")
    assert require_trackers(["tensorboard"]) == []
    with pytest.raises(InputError, match="Weights & Biases and trackio") as error:
        require_trackers(["wandb", "tensorboard", "trackio"])
    assert "`pip install wandb trackio`" in (error.value.hint or "")


class TestOffline:
    def test_without_a_key(self, tmp_path: Path) -> None:
        assert goes_offline(TRACKERS["wandb"], {}, tmp_path)
        assert not goes_offline(TRACKERS["tensorboard"], {}, tmp_path)
        assert not goes_offline(TRACKERS["trackio"], {}, tmp_path)

    def test_a_key_or_a_choice_is_heeded(self, tmp_path: Path) -> None:
        assert not goes_offline(TRACKERS["wandb"], {"WANDB_API_KEY": "x"}, tmp_path)
        assert not goes_offline(TRACKERS["wandb"], {"WANDB_MODE": "online"}, tmp_path)

    def test_a_login_is_found(self, tmp_path: Path) -> None:
        (tmp_path / ".netrc").write_text("machine example.org login me password x\n")
        assert goes_offline(TRACKERS["wandb"], {}, tmp_path)
        (tmp_path / ".netrc").write_text("machine api.wandb.ai login me password x\n")
        assert not goes_offline(TRACKERS["wandb"], {}, tmp_path)

    def test_it_is_said_with_what_uploads_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trackers, "_is_installed", lambda package: True)
        (said,) = require_trackers(["wandb", "trackio"], {"HOME": str(tmp_path)}, RunDir(Path("r")))
        assert said == (
            "Weights & Biases has no key here and is run offline; "
            "later: `wandb sync r/trackers/wandb/offline-run-*`"
        )


def test_files_go_into_the_run_directory_and_what_is_set_stays(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    set_already = {"WANDB_PROJECT": "mine", "HOME": str(tmp_path)}
    settings = tracker_settings(["tensorboard", "wandb"], run, set_already)
    assert settings == {
        "TENSORBOARD_LOGGING_DIR": str(run.trackers / "tensorboard"),
        "WANDB_DIR": str(run.trackers),
        "WANDB_MODE": "offline",
    }


@pytest.mark.train
def test_tensorboard_gets_the_losses_of_metrics_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="needs the `train` extra")
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the `dev` extra"
    )
    from transformers.integrations import TensorBoardCallback

    from ftplan.launcher.training.reporting import settle_reporting

    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "not-to-be-written")
    arguments: Any = SimpleNamespace(to_json_string=lambda: "{}", output_dir=str(run.checkpoints))
    settle_reporting(arguments, ["tensorboard"], run)
    assert (arguments.report_to, arguments.run_name) == (["tensorboard"], "run")
    callback = TensorBoardCallback()
    state: Any = SimpleNamespace(
        is_world_process_zero=True, is_hyper_param_search=False, global_step=0
    )
    control: Any = None
    callback.on_train_begin(arguments, state, control)
    for step in (1, 2):
        state.global_step = step
        callback.on_log(arguments, state, control, logs={"loss": 2.0 / step})
    callback.on_train_end(arguments, state, control)
    os.environ.pop("TENSORBOARD_LOGGING_DIR")
    found = events.EventAccumulator(str(run.trackers / "tensorboard")).Reload()
    scalars = [(one.step, one.value) for one in found.Scalars("train/loss")]
    assert scalars == [(1, 2.0), (2, 1.0)]
    written = b"".join(p.read_bytes() for p in run.root.rglob("*") if p.is_file())
    assert b"not-to-be-written" not in written
