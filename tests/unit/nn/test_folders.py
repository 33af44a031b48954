from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdtrain.errors import ConfigError
from sdtrain.nn import folders
from sdtrain.nn.folders import find_folder, load_strictly, read_folder, write_folder
from tests.data.hub import Hub

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3), "a": torch.randn(2, 2).to(torch.bfloat16).t()}
    write_folder(tmp_path / "net", {"_class_name": "X", "n": 3}, tensors)
    config, read = read_folder(tmp_path / "net")
    assert config == {"_class_name": "X", "n": 3}
    assert set(read) == {"a", "b"}
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["config.json", WEIGHTS]


def test_the_config_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that dies between the files leaves no config, so nobody takes the folder for complete."""

    def die(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "write_atomically", die)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, {}, {"a": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    with pytest.raises(ConfigError, match=r"neither config\.json nor vae/config\.json is there"):
        find_folder(str(tmp_path), part="vae")


def test_a_writer_that_dies_in_the_weights_keeps_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {}, {"a": torch.zeros(1)})

    def die(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, {}, {"a": torch.ones(1)})
    assert torch.equal(read_folder(tmp_path)[1]["a"], torch.zeros(1))


def test_a_pipeline_is_searched_for_its_part(tmp_path: Path) -> None:
    write_folder(tmp_path / "unet", {}, {"a": torch.zeros(1)})
    assert find_folder(str(tmp_path), part="unet") == tmp_path / "unet"
    assert find_folder(str(tmp_path / "unet"), part="unet") == tmp_path / "unet"


def test_a_hub_name_fetches_nothing_but_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {}, {"a": torch.zeros(1)})
    asked: list[Any] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_folder("owner/name", part="vae") == tmp_path
    assert asked == [("owner/name", ["config.json", "vae/config.json", WEIGHTS, f"vae/{WEIGHTS}"])]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no network\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(ConfigError) as error:
        find_folder("owner/name", part="vae")
    assert str(error.value) == (
        "owner/name: not a local folder, and the hub did not give it (no network); download it where there is a "
        "network and give the folder"
    )


ASK = """
import sys
from sdtrain.errors import ConfigError
from sdtrain.nn.folders import look_for
for source in sys.argv[1:]:
    try:
        print(look_for(source, part="vae"))
    except ConfigError as error:
        print(error)
"""


def test_a_hub_is_asked_without_fetching(tmp_path: Path) -> None:
    """In a process of its own, which knows no other hub from its first import on."""
    weights, vae = bytes(3 * 2**20), "vae/diffusion_pytorch_model.safetensors"
    repositories = {"me/network": {folders.WEIGHTS_FILE: weights}, "me/pipe": {vae: weights}, "me/none": {"a": b""}}
    with Hub(repositories, gated=set(), lying=set()) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", ASK, *repositories, "me/nowhere"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    network, pipe, none, nowhere = done.stdout.splitlines()
    assert network == pipe == "on the hub, 3.0 MiB to be fetched at the start"
    assert none.startswith("me/none: the hub's repository holds no diffusion_pytorch_model.safetensors or vae/")
    assert nowhere.startswith("me/nowhere: not a local folder, and the hub did not give it (")
    assert not any(path.stat().st_size > 2**20 for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("source", ["missing", "./missing/folder", "/a/b", "a/b/c"])
def test_a_path_that_is_no_hub_name_is_not_asked_for(source: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_folder(source, part="vae")
    assert str(error.value).startswith(f"{source}: no such folder; give a folder in diffusers' layout or a hub name")


def test_pickles_are_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError) as error:
        read_folder(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / WEIGHTS}: missing; pickled weights are not read (diffusion_pytorch_model.bin): "
        "convert them to safetensors"
    )


def test_damaged_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    (tmp_path / WEIGHTS).write_bytes(b"not a tensor in sight")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / WEIGHTS}: not a readable safetensors file")):
        read_folder(tmp_path)


def test_names_and_shapes_must_be_exact() -> None:
    network = nn.Linear(3, 2)
    with pytest.raises(ConfigError) as error:
        load_strictly(network, {"weight": torch.zeros(2, 4), "other": torch.zeros(1)}, where=Path("net"))
    assert str(error.value) == (
        "net: weights do not fit their config: missing bias; unexpected other; weight is (2, 4) instead of (2, 3)"
    )
    with pytest.raises(ConfigError, match=r" and 3 more$"):
        load_strictly(network, {f"t{i}": torch.zeros(1) for i in range(6)}, where=Path("net"))


def test_loading_sets_the_values() -> None:
    network, source = nn.Linear(3, 2), nn.Linear(3, 2)
    load_strictly(network, source.state_dict(), where=Path("net"))
    assert torch.equal(network.weight, source.weight)
