"""Each check of one machine, with something that is really wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain import build
from sdtrain.config.load import load_training
from sdtrain.config.run import TrainingConfig
from sdtrain.data.manifest import Manifest
from sdtrain.run_dir import RunDir
from sdtrain.training import environment
from sdtrain.training.preflight import node_checks, node_speed
from sdtrain.training.preflight.findings import Finding
from tests.support import make_latent_manifest, tiny_page, write_tiny_autoencoder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_latent_manifest(tmp_path_factory.mktemp("data"), train=32, validation=8)


def page(folder: Path, manifest: Path, **sections: Any) -> TrainingConfig:
    return load_training(tiny_page(folder, manifest, **sections))


def checked_manifest(config: TrainingConfig) -> Finding:
    return node_checks.guarded("manifest", lambda: node_checks.check_manifest(config, []), of_node=False)


def test_a_sound_machine(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    findings = node_checks.examine(page(tmp_path, manifest, data={"num_workers": 2}), ranks_here=2)
    assert [one.check for one in findings if one.status == "failed"] == []
    by_name = {one.check: one.found for one in findings}
    assert list(by_name) == [
        *("versions", "gpus", "driver", "scratch", "precision", "weights", "manifest", "run folder", "shared memory"),
    ]
    assert "torch " in by_name["versions"] and "source " in by_name["versions"]
    assert by_name["manifest"] == f"{manifest}: 32 samples in 2 shards"
    assert not (tmp_path / "run").exists(), "nothing is touched"


def test_what_cannot_be_looked_at_has_failed() -> None:
    def check() -> Finding:
        raise PermissionError(13, "Permission denied")

    found = node_checks.guarded("scratch", check, of_node=True)
    assert found == Finding("scratch", "failed", "[Errno 13] Permission denied", of_node=True)


# Software -------------------------------------------------------------------------------------------------------------


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "deepspeeed"))
    found = node_checks.check_versions()
    assert (found.status, found.advice) == ("failed", "pip install 'sdtrain[train]'")
    assert found.found.startswith("deepspeed is not installed (sdtrain 0.1.0, python 3.")


def test_the_digest_tells_sources_apart(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = node_checks.source_digest(tmp_path)
    assert len(before) == 12 and node_checks.source_digest(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2\n")
    assert node_checks.source_digest(tmp_path) != before


# GPUs -----------------------------------------------------------------------------------------------------------------


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int, *, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=0: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0: capability)


@pytest.mark.parametrize(
    ("count", "ranks", "status", "text"),
    [
        (8, 8, "ok", "8 visible: Tesla V100"),
        (8, None, "ok", "8 visible: Tesla V100"),
        (7, 8, "failed", "7 visible: Tesla V100; this node has 8 ranks"),
        (8, 4, "warning", "8 visible: Tesla V100; 4 of them have no rank"),
    ],
)
def test_a_gpu_for_every_rank(
    monkeypatch: pytest.MonkeyPatch, count: int, ranks: int | None, status: str, text: str
) -> None:
    pretend_gpus(monkeypatch, count)
    found = node_checks.check_gpus(ranks)
    assert (found.status, found.found) == (status, text)
    assert found.of_node == (status == "failed")


def test_no_gpu_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_gpus(monkeypatch, 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert node_checks.check_gpus(2).status == "ok"
    monkeypatch.delenv("DS_ACCELERATOR")
    found = node_checks.check_gpus(2)
    assert (found.status, found.found) == ("warning", "none: training runs on the CPU")
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(node_checks, "DEVICES", tmp_path)
    found = node_checks.check_gpus(2)
    assert (found.status, found.found, found.of_node) == ("failed", "torch sees none, and the node has nvidia0", True)


def test_old_gpus_are_told_to_use_fp16(monkeypatch: pytest.MonkeyPatch, manifest: Path, tmp_path: Path) -> None:
    config = page(tmp_path, manifest, trainer={"precision": "bf16"})
    assert node_checks.check_precision(config).status == "ok", "a CPU has it"
    pretend_gpus(monkeypatch, 2, capability=(7, 0))
    found = node_checks.check_precision(config)
    assert (found.status, found.advice) == ("failed", "give trainer.precision=fp16")
    assert found.found == "trainer.precision = bf16, and Tesla V100 cannot compute in it"
    pretend_gpus(monkeypatch, 2)
    assert node_checks.check_precision(config).status == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_known_to_the_last_bit(dtype: torch.dtype) -> None:
    left, right = node_speed.factors(384, torch.device("cpu"), dtype)
    product = left @ right
    assert node_speed.has_known_result(product)
    product[3, 7] += 1
    assert not node_speed.has_known_result(product)


def test_a_device_that_computes_wrong_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    found, speed = node_checks.examine_device(cpu)
    assert found.status == "ok" and speed is not None and speed.is_right
    multiply = torch.matmul

    def flips_a_bit(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        multiply(left, right, out=out)[5, 5] += 1
        return out

    monkeypatch.setattr(torch, "matmul", flips_a_bit)
    found, _ = node_checks.examine_device(cpu)
    assert (found.status, found.of_node) == ("failed", True)
    assert found.found == "cpu: a product of two 384 x 384 matrices of small integers is wrong"

    def falls_off_the_bus(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch, "matmul", falls_off_the_bus)
    found, speed = node_checks.examine_device(cpu)
    assert (found.status, found.found, speed) == ("failed", "CUDA error: unspecified launch failure", None)


# Weights and data -----------------------------------------------------------------------------------------------------


def test_weights_that_are_there_missing_or_cut_short(manifest: Path, tmp_path: Path) -> None:
    folder = write_tiny_autoencoder(tmp_path / "vae")
    config = page(tmp_path, manifest, autoencoder={"preset": None, "weights": str(folder)})
    found = node_checks.check_weights(config)
    assert (found.status, found.found.startswith(f"autoencoder.weights = {folder} ({folder}, ")) == ("ok", True)
    weights = folder / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    found = node_checks.check_weights(config)
    assert found.status == "failed" and "not a readable safetensors file" in found.found
    weights.unlink()
    found = node_checks.check_weights(config)
    assert f"{weights}: missing; give a folder with safetensors weights" in found.found


def test_every_missing_weight_is_named(manifest: Path, tmp_path: Path) -> None:
    """Tests are offline: the hub gives nothing."""
    text = {"type": "clip_text", "weights": "openai/no-such-model", "arch": None, "trainable": False}
    config = page(tmp_path, manifest, autoencoder={"preset": None, "weights": "no/such-vae"}, conditioner=text)
    assert [one.key for one in build.pretrained(config)] == ["autoencoder.weights", "conditioner.weights"]
    found = node_checks.check_weights(config)
    assert found.status == "failed"
    assert "autoencoder.weights: no/such-vae: not a local folder, and the hub did not give" in found.found
    assert "conditioner.weights: openai/no-such-model: " in found.found
    config = page(tmp_path, manifest, autoencoder={"preset": None, "weights": "./nowhere"})
    assert "./nowhere: no such folder; give a folder in diffusers' layout" in node_checks.check_weights(config).found


def test_manifests_that_cannot_be_trained_on(manifest: Path, tmp_path: Path) -> None:
    missing = checked_manifest(page(tmp_path, tmp_path / "nowhere.json"))
    assert missing.status == "failed" and "cannot read the manifest: No such file" in missing.found
    other = checked_manifest(page(tmp_path, manifest, conditioner={"max_length": 64}))
    assert other.status == "failed" and "max_length" in other.found
    moved = tmp_path / "moved"
    shutil.copytree(manifest.parent, moved)
    first = moved / "train-00000.tar"
    size = first.stat().st_size
    first.write_bytes(first.read_bytes()[:512])
    short = checked_manifest(page(tmp_path, moved / "manifest.json"))
    assert (short.status, short.found) == ("failed", f"{first}: has 512 bytes, its manifest says {size}")
    assert short.advice.endswith(f"see what is damaged: sdtrain-data verify {moved / 'manifest.json'}")
    first.unlink()
    gone = checked_manifest(page(tmp_path, moved / "manifest.json"))
    assert gone.status == "failed" and str(first) in gone.found


# Room -----------------------------------------------------------------------------------------------------------------


def test_scratch_that_is_not_mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    found = node_checks.check_scratch()
    assert (found.status, found.of_node) == ("failed", True)
    assert found.found == f"TMPDIR = {tmp_path / 'scratch'}: cannot be written to: No such file or directory"
    (tmp_path / "scratch").mkdir()
    assert node_checks.check_scratch().status in ("ok", "warning")
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("free", "scratch", "run"),
    [
        ((node_checks.GIB, 1e6), "warning", "warning"),
        ((100.0 * node_checks.GIB, 5e3), "ok", "warning"),
        ((100.0 * node_checks.GIB, 500.0), "failed", "warning"),
        ((100.0 * node_checks.GIB, float("inf")), "ok", "ok"),
        ((1000.0, 1e6), "failed", "failed"),
        ((100.0 * node_checks.GIB, 4.0), "failed", "failed"),
    ],
)
def test_limits_of_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: tuple[float, float], scratch: str, run: str
) -> None:
    """A full disk itself is in test_doctor.py."""
    monkeypatch.setattr(node_checks, "free_space", lambda folder: free)
    assert node_checks.check_scratch().status == scratch
    assert node_checks.check_run_folder(RunDir(tmp_path / "run")).status == run


def test_a_run_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").touch()
    found = node_checks.guarded("run folder", lambda: node_checks.check_run_folder(RunDir(tmp_path)), of_node=False)
    assert found.status == "failed" and "not a run's folder: it holds thesis.docx" in found.found


def test_shared_memory_for_data_workers(monkeypatch: pytest.MonkeyPatch, manifest: Path, tmp_path: Path) -> None:
    known = [Manifest.load(manifest)]
    config = page(tmp_path, manifest, data={"num_workers": 3, "prefetch": 4})
    numbers = 8 * 8 * 8 + 77  # moments and tokens of a sample
    needed = 2 * 3 * 5 * 2 * 4 * numbers * 2
    monkeypatch.setattr(node_checks, "free_space", lambda folder: (float(needed), 0.0))
    assert node_checks.check_shared_memory(config, known, 2).status == "ok"
    monkeypatch.setattr(node_checks, "free_space", lambda folder: (needed - 1.0, 0.0))
    found = node_checks.check_shared_memory(config, known, 2)
    assert (found.status, found.of_node) == ("failed", True)
    assert "may be needed by 2 ranks x 3 workers x 5 micro-batches" in found.found and "--shm-size" in found.advice
    alone = page(tmp_path, manifest, data={"num_workers": 0})
    assert node_checks.check_shared_memory(alone, known, 2).status == "ok"
