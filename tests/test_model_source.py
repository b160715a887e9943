"""Which model a name means, and where its files are: folders, the catalog, caches, a fake hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher.model_source import (
    cached_folder,
    find_source,
    has_weights,
    hub_offline,
    source_from_folder,
)
from ftplan.planner.errors import InputError, UnknownNameError
from tests.launcher_fixtures import Answer, FakeHub, cache_snapshot, fake_hub

Config = Callable[..., dict[str, Any]]

OFFLINE = {"HF_HUB_OFFLINE": "1"}
CONFIG = {"config.json": "{}"}

# Environment -> where the cache is.
CACHE_PLACES: list[tuple[dict[str, str], str]] = [
    ({}, "{home}/.cache/huggingface/hub"),
    ({"XDG_CACHE_HOME": "{tmp}/xdg"}, "{tmp}/xdg/huggingface/hub"),
    ({"HF_HOME": "{tmp}/hf"}, "{tmp}/hf/hub"),
    ({"HF_HOME": "{tmp}/hf", "XDG_CACHE_HOME": "{tmp}/xdg"}, "{tmp}/hf/hub"),
    ({"HF_HUB_CACHE": "{tmp}/cache", "HF_HOME": "{tmp}/hf"}, "{tmp}/cache"),
    ({"HF_HOME": "~/hf"}, "{home}/hf/hub"),
    ({"HF_HUB_CACHE": "$HOME/cache"}, "{home}/cache"),
    ({"HUGGINGFACE_HUB_CACHE": "{tmp}/legacy"}, "{tmp}/legacy"),
]


@pytest.fixture(autouse=True)
def _away_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache, folder or proxy of this machine is seen."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def folder_with(config: Any, path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


class TestOrder:
    def test_a_folder_comes_before_everything_else(self, tiny_config: Config) -> None:
        for name in ("7B", "llama-3.1-8b", "Qwen/Qwen3-0.6B"):
            folder_with(tiny_config("llama"), Path(name))
            source = find_source(name, OFFLINE)
            assert (source.origin, source.folder) == ("folder", Path(name))
            assert source.hub_id is None
            assert source.spec.hidden_size == 64

    def test_a_size_has_no_weights_anywhere(self) -> None:
        source = find_source("7B", OFFLINE)
        assert (source.hub_id, source.folder) == (None, None)
        assert 6.5e9 < source.spec.num_parameters < 7.5e9
        assert source.origin == source.spec.approximate

    @pytest.mark.parametrize("name", ["llama-3.1-8b", "LLAMA-3.1-8B", "meta-llama/Llama-3.1-8B"])
    def test_a_catalog_name_needs_no_hub_and_no_cache(self, tmp_path: Path, name: str) -> None:
        cache_snapshot(tmp_path / "hub", "meta-llama/Llama-3.1-8B", "a", {"config.json": "{"})
        source = find_source(name, {**OFFLINE, "HF_HUB_CACHE": str(tmp_path / "hub")})
        assert (source.origin, source.hub_id) == ("catalog", "meta-llama/Llama-3.1-8B")
        assert source.folder is None

    def test_the_local_cache_comes_before_the_hub(
        self, tmp_path: Path, tiny_config: Config
    ) -> None:
        files = {"config.json": json.dumps(tiny_config("qwen2"))}
        folder = cache_snapshot(tmp_path / "hub", "org/mine", "a", files)
        with fake_hub(lambda path: Answer(status=500)) as hub:
            environ = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": hub.endpoint}
            source = find_source("org/mine", environ)
        assert hub.requests == []
        assert (source.origin, source.hub_id) == ("local Hub cache", "org/mine")
        assert source.folder == folder
        assert source.spec.name == "org/mine"


class TestUnknownNames:
    def test_the_nearest_of_the_catalog_is_told(self) -> None:
        with pytest.raises(UnknownNameError) as caught:
            find_source("llama-3.1-8", OFFLINE)
        assert caught.value.message == "unknown model `llama-3.1-8`"
        assert "`llama-3.1-8b`" in (caught.value.hint or "")
        assert "A size (`7B`)" in (caught.value.hint or "")

    @pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/models/mine", "a/b/c", "~x"])
    def test_a_path_is_no_hub_id(self, name: str) -> None:
        """Nothing is asked over the network about it."""
        environ = {"HF_ENDPOINT": "http://127.0.0.1:1"}
        with pytest.raises(InputError, match="no folder") as caught:
            find_source(name, environ)
        assert caught.value.message == f"no folder `{name}`"

    @pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300])
    def test_a_name_too_long_for_a_file_is_bad_input(self, name: str) -> None:
        with pytest.raises(InputError):
            find_source(name, OFFLINE)

    def test_offline_an_unknown_hub_id_says_so_and_names_the_nearest(self) -> None:
        with pytest.raises(InputError) as caught:
            find_source("Qwen/Qwen3-0.6", OFFLINE)
        assert caught.value.message == (
            "`Qwen/Qwen3-0.6` is not in the catalog or the local cache, and HF_HUB_OFFLINE is set"
        )
        assert "`Qwen/Qwen3-0.6B`" in (caught.value.hint or "")
        assert (caught.value.hint or "").endswith("Or give a folder with its config.json.")


class TestFolders:
    def test_the_name_is_the_folder_s_own(
        self, tmp_path: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = folder_with(tiny_config("llama"), tmp_path / "my-model")
        assert source_from_folder(folder).spec.name == "my-model"
        monkeypatch.chdir(folder)
        assert find_source(".", OFFLINE).spec.name == "my-model"

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model_type": 5}', b"{}", b"7"]
    )
    def test_a_damaged_config_is_named(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(InputError, match=r"config\.json"):
            source_from_folder(tmp_path)

    def test_a_folder_without_one_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"has no config\.json"):
            source_from_folder(tmp_path)
        (tmp_path / "config.json").mkdir()
        with pytest.raises(InputError, match="cannot read"):
            source_from_folder(tmp_path)


class TestWeights:
    def index(self, folder: Path, *shards: str) -> None:
        weights = {f"layer.{number}": shard for number, shard in enumerate(shards)}
        text = json.dumps({"metadata": {}, "weight_map": weights})
        (folder / "model.safetensors.index.json").write_text(text)

    def test_one_file(self, tmp_path: Path) -> None:
        assert not has_weights(tmp_path)
        (tmp_path / "model.safetensors").touch()
        assert has_weights(tmp_path)

    def test_a_folder_that_is_not_there_has_none(self, tmp_path: Path) -> None:
        assert not has_weights(tmp_path / "none")

    def test_every_shard_must_be_there(self, tmp_path: Path) -> None:
        shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
        self.index(tmp_path, *shards, shards[0])
        for shard in shards:
            assert not has_weights(tmp_path)
            (tmp_path / shard).touch()
        assert has_weights(tmp_path)

    def test_a_shard_that_is_a_dead_link_is_missing(self, tmp_path: Path) -> None:
        """As in a cache whose blobs were deleted, or whose download was broken off."""
        self.index(tmp_path, "a.safetensors")
        (tmp_path / "a.safetensors").symlink_to(tmp_path / "blobs" / "gone")
        assert not has_weights(tmp_path)

    def test_pickled_weights_do_not_count(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").touch()
        assert not has_weights(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            '{"weight_map": ',
            "{}",
            "[]",
            "null",
            '{"weight_map": []}',
            '{"weight_map": {}}',
            '{"weight_map": {"a": null}}',
            '{"weight_map": {"a": ["b"]}}',
        ],
    )
    def test_a_damaged_index_means_no_weights(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(content)
        assert not has_weights(tmp_path)


class TestCache:
    @pytest.mark.parametrize(
        ("environ", "place"),
        CACHE_PLACES,
        ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
    )
    def test_it_is_where_huggingface_hub_keeps_it(
        self, tmp_path: Path, environ: dict[str, str], place: str
    ) -> None:
        places = {"tmp": str(tmp_path), "home": str(tmp_path / "home")}
        environ = {name: value.format(**places) for name, value in environ.items()}
        folder = cache_snapshot(Path(place.format(**places)), "org/mine", "a", CONFIG)
        assert cached_folder("org/mine", environ) == folder

    def test_these_places_are_huggingface_hub_s(self, tmp_path: Path) -> None:
        """The table above, asked of the library itself."""
        pytest.importorskip("huggingface_hub")
        places = {"tmp": str(tmp_path), "home": str(tmp_path / "home")}
        cases = [
            ({name: value.format(**places) for name, value in environ.items()}, place)
            for environ, place in CACHE_PLACES
        ]
        script = (
            "import importlib, json, os, sys\n"
            "from huggingface_hub import constants\n"
            "base = dict(os.environ)\n"
            "for environ in json.load(sys.stdin):\n"
            "    os.environ.clear(); os.environ.update(base | environ)\n"
            "    print(importlib.reload(constants).HF_HUB_CACHE)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps([environ for environ, _ in cases]),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines() == [place.format(**places) for _, place in cases]

    def test_the_newest_snapshot_with_a_config_is_taken(self, tmp_path: Path) -> None:
        made = {
            revision: cache_snapshot(tmp_path, "org/mine", revision, files)
            for revision, files in (
                ("old", CONFIG),
                ("new", CONFIG),
                ("without", {"tokenizer.json": "{}"}),
            )
        }
        for age, revision in enumerate(("without", "new", "old")):
            os.utime(made[revision], (1e9 - age, 1e9 - age))
        assert cached_folder("org/mine", {"HF_HUB_CACHE": str(tmp_path)}) == made["new"]

    def test_a_model_that_is_not_there_is_none(self, tmp_path: Path) -> None:
        environ = {"HF_HUB_CACHE": str(tmp_path)}
        assert cached_folder("org/mine", environ) is None
        cache_snapshot(tmp_path, "org/mine", "a", {"tokenizer.json": "{}"})
        assert cached_folder("org/mine", environ) is None
        assert cached_folder("org/min", environ) is None

    def test_a_deleted_blob_makes_no_snapshot(self, tmp_path: Path) -> None:
        folder = cache_snapshot(tmp_path, "org/mine", "a", CONFIG)
        (folder / "config.json").resolve().unlink()
        assert cached_folder("org/mine", {"HF_HUB_CACHE": str(tmp_path)}) is None

    @pytest.mark.parametrize("content", ["", '{"model_type": "lla', "[]", '{"model_type": 1}'])
    def test_a_damaged_config_in_the_cache_is_bad_input(self, tmp_path: Path, content: str) -> None:
        cache_snapshot(tmp_path, "org/mine", "a", {"config.json": content})
        with pytest.raises(InputError, match=r"config\.json"):
            find_source("org/mine", {**OFFLINE, "HF_HUB_CACHE": str(tmp_path)})


class TestOffline:
    @pytest.mark.parametrize("value", ["1", "ON", "yes", "true", "True"])
    @pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
    def test_words_that_huggingface_hub_takes_for_yes(self, name: str, value: str) -> None:
        """Its second variable is transformers' older one."""
        assert hub_offline({name: value})

    def test_the_newer_variable_decides(self) -> None:
        assert not hub_offline({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"})
        assert hub_offline({"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "1"})

    @pytest.mark.parametrize("value", ["0", "", "no", "off", "false"])
    def test_words_that_it_takes_for_no(self, value: str) -> None:
        assert not hub_offline({"HF_HUB_OFFLINE": value})
        assert not hub_offline({})


class TestHub:
    @pytest.fixture
    def served(self, tiny_config: Config) -> Iterator[FakeHub]:
        body = json.dumps(tiny_config("llama")).encode()
        with fake_hub(lambda path: Answer(body=body)) as hub:
            yield hub

    def refusal(self, answer: Answer, **environ: str) -> InputError:
        with fake_hub(lambda path: answer) as hub, pytest.raises(InputError) as caught:
            find_source("org/mine", {"HF_ENDPOINT": hub.endpoint, **environ})
        return caught.value

    @pytest.mark.parametrize("end", ["", "/"])
    def test_the_config_is_asked_of_the_endpoint(self, served: FakeHub, end: str) -> None:
        source = find_source("org/mine", {"HF_ENDPOINT": served.endpoint + end})
        assert (source.origin, source.hub_id, source.folder) == ("Hub", "org/mine", None)
        assert source.spec.hidden_size == 64
        (request,) = served.requests
        assert request[:2] == ("GET", "/org/mine/resolve/main/config.json")
        assert "Authorization" not in request[2]

    def test_the_token_is_sent_where_there_is_one(self, served: FakeHub) -> None:
        find_source("org/mine", {"HF_ENDPOINT": served.endpoint, "HF_TOKEN": "hf_secret"})
        assert served.requests[0][2]["Authorization"] == "Bearer hf_secret"

    def test_the_token_is_not_sent_to_another_host_that_the_hub_points_to(
        self, served: FakeHub
    ) -> None:
        elsewhere = f"http://localhost:{served.port}/cdn/config.json"
        with fake_hub(lambda path: Answer(status=302, headers={"Location": elsewhere})) as hub:
            find_source("org/mine", {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_secret"})
        assert hub.requests[0][2]["Authorization"] == "Bearer hf_secret"
        assert served.paths == ["/cdn/config.json"]
        assert "hf_secret" not in str(served.requests)

    @pytest.mark.parametrize("status", [401, 403])
    def test_a_gated_model_asks_for_licence_and_token(self, status: int) -> None:
        error = self.refusal(Answer(status=status), HF_TOKEN="hf_secret")
        assert error.message == f"the Hub does not show `org/mine` to you ({status})"
        assert "accept its licence and set HF_TOKEN" in (error.hint or "")
        assert "hf_secret" not in f"{error.message} {error.hint}"

    def test_a_model_that_is_not_there_is_told(self) -> None:
        error = self.refusal(Answer(status=404))
        assert error.message == "the Hub has no model `org/mine` (404)"
        assert "folder" in (error.hint or "")

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_hub_in_trouble_is_not_said_to_lack_the_model(self, status: int) -> None:
        error = self.refusal(Answer(status=status))
        assert error.message.startswith(f"the Hub does not answer for `org/mine` now ({status}")
        assert "try again later" in (error.hint or "")

    @pytest.mark.parametrize("body", [b"", b"<html>sign in to the hotel's network</html>", b"\xff"])
    def test_what_is_no_json_counts_as_out_of_reach(self, body: bytes) -> None:
        assert "out of reach" in self.refusal(Answer(body=body)).message

    @pytest.mark.parametrize("body", [b"[]", b"null", b'{"model_type": "no-such"}'])
    def test_what_is_no_config_is_bad_input(self, body: bytes) -> None:
        assert self.refusal(Answer(body=body))

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"SSH-2.0-OpenSSH_9.6\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
        ],
        ids=["closed", "no HTTP", "cut off", "cut off in a chunk"],
    )
    def test_a_broken_connection_counts_as_out_of_reach(self, raw: bytes) -> None:
        """Some of these are http.client.HTTPException, which is no OSError."""
        assert "out of reach" in self.refusal(Answer(raw=raw)).message

    @pytest.mark.parametrize(
        "endpoint", ["http://127.0.0.1:1", "hf-mirror.com", "http://", "file:///etc"]
    )
    def test_an_endpoint_that_does_not_answer_is_out_of_reach(self, endpoint: str) -> None:
        with pytest.raises(InputError, match="out of reach"):
            find_source("org/mine", {"HF_ENDPOINT": endpoint})

    @pytest.mark.parametrize(
        "name", ["org/my model", "org/a\tb", "org/ünïcode", "/x", "org/..", "org/a?b", "org/a\n"]
    )
    def test_a_name_that_no_model_of_the_hub_can_have_is_not_asked_for(
        self, served: FakeHub, name: str
    ) -> None:
        with pytest.raises(InputError, match="no folder"):
            find_source(name, {"HF_ENDPOINT": served.endpoint})
        assert served.requests == []
