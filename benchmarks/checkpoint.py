"""How long training stands still for a checkpoint: saved beside it, and saved synchronously, on one rank.

    python -m benchmarks.checkpoint --pairs 7 --folder /scratch

The model of about 100 million parameters is trained by the engine that every run uses (ZeRO-2, AdamW, EMA) and saved
by the keeper that every run uses. Both ways alternate in one process on the same state, and their files are compared:
a faster save of other bytes is no save. Steps are short, so that the loop asks often; what they cost while the disk
is written beside them is told too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import torch
from torch import nn

from sdtrain import distributed
from sdtrain.checkpoints.manifest import Checkpoint
from sdtrain.checkpoints.retention import Retention
from sdtrain.checkpoints.saver import Saved
from sdtrain.run_dir import RunDir
from sdtrain.training.engine import Engine, EngineSettings
from sdtrain.training.keeper import CheckpointKeeper

WIDTH, LAYERS = 2048, 24
TARGET = 0.25


def build() -> Engine:
    """A plain network of WIDTH^2 * LAYERS parameters under the real engine."""
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.SiLU())]
    return Engine(nn.Sequential(*layers), EngineSettings(micro_batch_size=8, grad_accum_steps=1))


def train_step(engine: Engine) -> float:
    """Seconds of one optimiser step."""
    started = time.perf_counter()
    engine.begin()
    losses = engine.module(torch.randn(8, WIDTH)).square().mean(1)
    engine.backward(losses, torch.ones_like(losses))
    engine.step(1e-5)
    return time.perf_counter() - started


def keeper(engine: Engine, folder: Path, *, asynchronous: bool) -> tuple[CheckpointKeeper, list[Saved]]:
    """A run's keeper, and what it will tell of its saves."""
    told: list[Saved] = []
    return CheckpointKeeper(
        run=RunDir(folder / ("beside" if asynchronous else "still")),
        attempt="benchmark",
        engines={"denoiser": engine},
        batch_size=8,
        config_text="",
        identity={},
        environment={},
        retention=Retention(keep_last=2),
        asynchronous=asynchronous,
        on_saved=told.append,
    ), told


def digests(run: RunDir, step: int) -> list[str]:
    """What the tensors of a checkpoint are known by."""
    files = Checkpoint.open(run.checkpoints / f"step-{step:08d}").files
    return [entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")]


def measure(engine: Engine, folder: Path, pairs: int) -> dict[str, list[float]]:
    """Seconds of every pair: the stalls of both ways, the thread's writing, steps with and without a thread beside."""
    beside, told_beside = keeper(engine, folder, asynchronous=True)
    still, told_still = keeper(engine, folder, asynchronous=False)
    steps: dict[str, list[float]] = {"step": [], "step_beside": [], "write": []}
    beside.reserve()
    for step in range(1, pairs + 2):  # the first pair warms up and does not count
        steps["step"].append(train_step(engine))
        still.save(step)
        beside.save(step)
        started = time.perf_counter()
        while beside.is_writing:
            steps["step_beside"].append(train_step(engine))
        steps["write"].append(time.perf_counter() - started)
        beside.join()
        assert digests(beside.run, step) == digests(still.run, step), "both ways save the same bytes"
    return {
        "beside": [saved.stall_seconds for saved in told_beside[1:]],
        "still": [saved.stall_seconds for saved in told_still[1:]],
        "first_beside": [told_beside[0].stall_seconds],
        **steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs of saves")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    distributed.initialize(timeout_seconds=600)
    torch.manual_seed(0)
    engine = build()
    parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    train_step(engine)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        figures = measure(engine, Path(name), arguments.pairs)
    medians = {key: statistics.median(values) for key, values in figures.items()}
    ratio = medians["beside"] / medians["still"]
    print(f"{parameters / 1e6:.1f} M parameters, {16 * parameters / 1e9:.2f} GB a checkpoint, {platform.machine()}")
    print(f"{torch.get_num_threads()} threads; median of {arguments.pairs} saves (lowest to highest)\n")
    for key, label in (
        ("still", "loop stands still, synchronous save"),
        ("beside", "loop stands still, save beside training"),
        ("first_beside", "the same, first save"),
        ("step", "a training step"),
        ("step_beside", "a training step while a save is written"),
    ):
        values = figures[key]
        print(f"{label:<42} {medians[key]:7.3f} s   ({min(values):.3f} to {max(values):.3f})")
    verdict = "kept" if ratio <= TARGET else "missed"
    print(f"\nbeside / synchronous: {ratio:.1%} (target {TARGET:.0%}: {verdict})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"parameters": parameters, "ratio": ratio, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
