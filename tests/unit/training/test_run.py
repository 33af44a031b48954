"""Whole attempts of one rank: what they leave, how they stop, what they refuse. Many runs in one process."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.checkpoints.manifest import Checkpoint, list_checkpoints
from sdtrain.config.load import load_training
from sdtrain.records import Batch, LossOutput
from sdtrain.run_dir import RunDir, read_json_lines
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask
from sdtrain.training.lease import Lease
from sdtrain.training.lr_schedule import learning_rate_at
from sdtrain.training.metrics import MetricsLog, read_metrics
from sdtrain.training.run import Hooks, averaged
from tests.engines import one_rank, sdtrain
from tests.support import make_latent_manifest, tiny_page

pytestmark = pytest.mark.engine

STEPS = 4
HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("world")
    make_latent_manifest(folder, train=40, validation=8)
    with one_rank():
        yield folder


def make_page(folder: Path, world: Path, **sections: dict[str, Any]) -> Path:
    settings = {"max_steps": STEPS} | sections.pop("trainer", {})
    return tiny_page(folder, world / "manifest.json", trainer=settings, **sections)


@pytest.fixture
def page(world: Path, tmp_path: Path) -> Path:
    return make_page(tmp_path, world)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Do something once `step` steps are logged, before the loop asks whether to go on."""

    def install(step: int, act: Callable[[], object]) -> None:
        real = MetricsLog.log

        def log(self: MetricsLog, at: int, row: dict[str, Any]) -> None:
            real(self, at, row)
            if at == step and "train/loss" in row:
                act()

        monkeypatch.setattr(MetricsLog, "log", log)

    return install


def word(run: RunDir) -> tuple[int, str, int]:
    left = run.read_exit()
    assert left is not None
    return left.code, left.reason, left.step


def steps_of(run: RunDir) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)]


# What an attempt leaves -----------------------------------------------------------------------------------------------


def test_a_complete_run_leaves_its_whole_story(page: Path, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert sdtrain("train", page) == 0
    assert word(run) == (0, "complete", STEPS)
    assert load_training(run.config) == load_training(page).model_copy(update={"name": load_training(run.config).name})
    facts = json.loads(run.environment.read_text())
    assert facts["world_size"] == 1
    rows = run.ledger_rows()
    assert [row["event"] for row in rows] == ["start", "commit", "commit", "end"]
    assert (rows[0]["resumed_from"], rows[0]["step"]) == (None, 0)
    assert {row["attempt"] for row in rows} == {run.read_exit().attempt}
    metrics = read_metrics(run.metrics)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    rates = [
        learning_rate_at(
            applied,
            lr_schedule="cosine",
            peak=1e-3,
            warmup_steps=2,
            warmup_start=1e-6,
            final_fraction=0.01,
            total_steps=STEPS,
        )
        for applied in range(STEPS)
    ]
    assert [row["train/learning_rate"] for row in metrics] == rates
    assert [row["train/samples_seen"] for row in metrics] == [8, 16, 24, 32]
    assert steps_of(run) == [4, 2]
    assert "starts afresh, step 0" in capsys.readouterr().out
    assert (run.weights / "step-00000004" / "model_index.json").is_file(), "the last act is the export"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == handlers
    assert sdtrain("train", page) == 0, "a complete run has nothing left to do"
    assert word(run) == (0, "complete", STEPS)
    assert [row["event"] for row in run.ledger_rows()[4:]] == ["start", "end"]


def test_a_skipped_step_moves_no_counter(page: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda step: step == 1)
    assert sdtrain("train", page) == 0
    metrics = read_metrics(run.metrics)
    assert [row["train/skipped_steps"] for row in metrics] == [0, 1, 0, 0]
    assert "train/learning_rate" not in metrics[1]
    rates = [row["train/learning_rate"] for row in metrics if "train/learning_rate" in row]
    assert rates == [pytest.approx(value) for value in (1e-6, (1e-6 + 1e-3) / 2, 1e-3)]
    decays = [row["train/ema_decay"] for row in metrics if "train/ema_decay" in row]
    assert decays == [pytest.approx((1 + n) / (10 + n)) for n in (1, 2, 3)]
    manifest = Checkpoint.open(run.checkpoints / "step-00000004").manifest
    assert (manifest["step"], manifest["applied_steps"], manifest["samples_seen"]) == (4, {"denoiser": 3}, 32)
    known = manifest["health"]["denoiser"]
    assert known["losses"] == pytest.approx([row["train/loss"] for row in metrics if row["step"] != 2])
    assert (known["skipped"], known["row"]) == ([[1, "loss not finite"]], [])


def spoil(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    """Let losses of some steps be NaN."""
    real = LatentDiffusionTask.loss

    def loss(self: LatentDiffusionTask, name: str, batch: Batch, step: int) -> LossOutput:
        output = real(self, name, batch, step)
        return replace(output, losses=output.losses * float("nan")) if when(step) else output

    monkeypatch.setattr(LatentDiffusionTask, "loss", loss)


def test_validation_and_grids_see_the_average_and_training_does_not_notice(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdtrain.evaluation import during_training

    seen: list[tuple[str, int, torch.Tensor]] = []

    def weights(task: Any) -> torch.Tensor:
        module = task.trainables["denoiser"].module
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    def validate(config: Any, task: Any, manifest: Any, pause: Callable[[], None]) -> dict[str, float]:
        seen.append(("validate", -1, weights(task)))
        return {"validation/loss": 0.25}

    def sample(config: Any, task: Any, step: int, pause: Callable[[], None]) -> Sequence[Path]:
        seen.append(("sample", step, weights(task)))
        return []

    monkeypatch.setattr(during_training, "validate", validate)
    monkeypatch.setattr(during_training, "sample", sample)
    sections = {
        "validation": {"every_steps": 3, "num_samples": 4, "batch_size": 4},
        "samples": {"every_steps": 2, "prompts": ["a"]},
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert sdtrain("train", make_page(tmp_path / "a", world, **sections)) == 0
    assert [(name, step) for name, step, _ in seen] == [
        ("sample", 2),
        ("validate", -1),
        ("validate", -1),
        ("sample", 4),
    ]
    watched, plain = RunDir(tmp_path / "a" / "run"), RunDir(tmp_path / "b" / "run")
    figures = {row["step"]: row.get("validation/loss") for row in read_metrics(watched.metrics)}
    assert figures == {1: None, 2: None, 3: 0.25, 4: 0.25}
    assert sdtrain("train", make_page(tmp_path / "b", world)) == 0
    for one, other in zip(rank_tensors(watched), rank_tensors(plain), strict=True):
        assert torch.equal(one, other)
    ema = dict(zip(names(plain), rank_tensors(plain), strict=True))["group0/ema"]
    assert torch.equal(seen[-1][2], ema), "the last grid was drawn with what the checkpoint calls ema"


def state_file(run: RunDir, step: int = STEPS) -> Path:
    return run.checkpoints / f"step-{step:08d}" / "denoiser.rank00000.safetensors"


def rank_tensors(run: RunDir, step: int = STEPS) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [tensor for _, tensor in sorted(load_file(state_file(run, step)).items())]


def names(run: RunDir) -> list[str]:
    from safetensors import safe_open

    with safe_open(state_file(run), framework="pt") as file:
        return sorted(file.keys())


def test_a_dit_is_trained_by_changing_one_line(page: Path, run: RunDir) -> None:
    """With dropout, recomputed blocks and bf16: what goes on at step 2 is the same run, and its export opens."""
    from sdtrain.checkpoints.pipelines import from_checkpoint, load_pipeline
    from sdtrain.denoisers.dit import DiT

    arch = "{in_channels: 4, out_channels: 4, width: 32, num_layers: 2, num_heads: 2, sample_size: 8, context_dim: 32}"
    settings = (
        f"denoiser={{type: dit, arch: {arch}}}",
        "denoiser.arch.dropout=0.2",
        "trainer.precision=bf16",
        "trainer.gradient_checkpointing=blocks",
        "optimizer={learning_rate: 1e-2, lr_schedule: constant}",
    )
    assert sdtrain("train", page, *settings) == 0
    trained, exported = from_checkpoint(run.path), load_pipeline(run.weights / f"step-{STEPS:08d}")
    assert isinstance(exported.denoiser, DiT) and exported.denoiser.arch["dropout"] == 0.2
    assert trained.denoiser.get_parameter("proj_out_2.weight").any(), "it began with zeros"
    assert exported.weights_sha256() == trained.weights_sha256()
    before = rank_tensors(run)
    shutil.rmtree(state_file(run).parent)
    shutil.rmtree(run.weights)
    assert sdtrain("train", page, *settings) == 0
    assert all(torch.equal(one, other) for one, other in zip(rank_tensors(run), before, strict=True))


def test_averaged_nests_over_all_engines() -> None:
    from contextlib import contextmanager

    entered: list[str] = []

    class Engine:
        def __init__(self, name: str) -> None:
            self.name = name

        @contextmanager
        def ema_weights(self) -> Iterator[None]:
            entered.append(f"+{self.name}")
            yield
            entered.append(f"-{self.name}")

    with averaged({"a": Engine("a"), "b": Engine("b")}):
        entered.append("inside")
    assert entered == ["+a", "+b", "inside", "-b", "-a"]
    assert Hooks() == Hooks(validate=None, sample=None, finish=None)


# How it stops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [
        (signal.SIGINT, 0, "SIGINT: saved and stopped at step 3"),
        (signal.SIGUSR1, 85, "SIGUSR1: saved at step 3, start again to go on"),
        (signal.SIGTERM, 85, "SIGTERM: saved at step 3, start again to go on"),
    ],
)
def test_a_signal_saves_and_leaves_at_the_step_boundary(
    number: signal.Signals,
    code: int,
    reason: str,
    page: Path,
    run: RunDir,
    after_step: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after_step(3, lambda: signal.raise_signal(number))
    assert sdtrain("train", page) == code
    assert word(run) == (code, reason, 3)
    assert steps_of(run) == [3, 2]
    assert not run.weights.exists(), "half a run is not exported"
    monkeypatch.undo()
    assert sdtrain("train", page) == 0
    assert word(run) == (0, "complete", STEPS)
    starts = [row for row in run.ledger_rows() if row["event"] == "start"]
    assert [(row["resumed_from"], row["step"]) for row in starts] == [(None, 0), ("step-00000003", 3)]


def test_files_ask_for_a_save_and_for_a_stop(page: Path, run: RunDir) -> None:
    run.path.mkdir()
    (run.path / "STOP").touch()
    assert sdtrain("train", page, "trainer.log_every_steps=100") == 0
    assert word(run) == (0, "STOP file: saved and stopped at step 1", 1)
    assert steps_of(run) == [1]
    assert not (run.path / "STOP").exists(), "else the next start would stop at once"
    (run.path / "SAVE").touch()
    assert sdtrain("train", page, "checkpoint.every_steps=100", "trainer.log_every_steps=100") == 0
    assert word(run) == (0, "complete", STEPS)
    assert not (run.path / "SAVE").exists()
    commits = [row["checkpoint"] for row in run.ledger_rows() if row["event"] == "commit"]
    assert commits == ["step-00000001", "step-00000002", "step-00000004"]
    rows = [(row["step"], row["train/steps_covered"]) for row in read_metrics(run.metrics)]
    assert rows == [(1, 1), (2, 1), (4, 2)], "every step in one row, which ends where a checkpoint or the run does"
    manifest = Checkpoint.open(run.checkpoints / "step-00000004").manifest
    assert len(manifest["health"]["denoiser"]["losses"]) == 4, "that of the step before the stop too"


# How it breaks --------------------------------------------------------------------------------------------------------


def test_a_permanent_nan_ends_as_diverged(
    world: Path, tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda step: step >= 2)
    page = make_page(tmp_path, world, trainer={"max_steps": 60}, health={"max_skipped_in_a_row": 5, "max_rollbacks": 0})
    assert sdtrain("train", page) == 5
    code, reason, step = word(run)
    assert (code, step) == (5, 7)
    assert reason.startswith(
        "DivergedError: denoiser: 5 updates in a row were thrown away (5 x loss not finite), the last one in step 6, "
        "and 0 rollbacks did not help. What went into it: "
    )
    for checkpoint in list_checkpoints(run.checkpoints):
        assert checkpoint.manifest["applied_steps"] == {"denoiser": 2}, "what was saved meanwhile is healthy"
    assert all(torch.isfinite(tensor).all() for tensor in rank_tensors(run, steps_of(run)[0]))


def test_a_lost_shard_ends_as_a_data_error(world: Path, tmp_path: Path, run: RunDir) -> None:
    data = tmp_path / "data"
    shutil.copytree(world, data)
    (data / "train-00001.tar").unlink()
    page = make_page(tmp_path, data, data={"read_retries": 1})
    assert sdtrain("train", page) == 3
    code, reason, _ = word(run)
    assert code == 3
    assert "samples of one rank could not be read; data.max_bad_fraction = 0.01 allows 1." in reason
    assert "train-00001.tar" in reason
    other = RunDir(tmp_path / "other")
    assert sdtrain("train", page, "data.max_bad_fraction=0.9", f"run_dir={other.path}") == 0
    for listed in (list(read_json_lines(run.tombstones)), list(read_json_lines(other.tombstones))):
        assert listed
        assert len({row["key"] for row in listed}) == len(listed)
        assert all("train-00001.tar" in row["reason"] for row in listed)


def test_a_disk_that_stays_full_ends_as_a_storage_error(
    page: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    at_start = iter([(math.inf, math.inf)] * 2)
    monkeypatch.setattr("sdtrain.checkpoints.protocol.free_space", lambda folder: next(at_start, (1024.0, 1024.0)))
    assert sdtrain("train", page, "checkpoint.every_steps=1") == 8
    code, reason, step = word(run)
    assert (code, step) == (8, 3)
    assert reason.startswith(f"StorageError: {run.checkpoints}: 3 saves in a row failed")
    assert "0.0 MiB free" in caplog.text


def test_a_bug_is_a_bug(
    page: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def loss(self: Any, name: str, batch: Batch, step: int) -> LossOutput:
        raise ZeroDivisionError("mine")

    monkeypatch.setattr(LatentDiffusionTask, "loss", loss)
    assert sdtrain("train", page) == 1
    assert word(run) == (1, "ZeroDivisionError: mine", 0)
    assert "Traceback" in capfd.readouterr().err


# What it refuses ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first step; tests copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    page = make_page(folder, world)
    (folder / "run").mkdir()
    (folder / "run" / "STOP").touch()
    assert sdtrain("train", page) == 0
    return folder


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped / "run", tmp_path / "run")
    return tmp_path


def untouched(run: RunDir) -> list[tuple[str, int]]:
    return sorted((str(path.relative_to(run.path)), path.stat().st_mtime_ns) for path in run.path.rglob("*"))


def test_changed_settings_are_refused_by_name(
    copied: Path, run: RunDir, world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page, before = make_page(copied, world), untouched(run)
    changes = ["optimizer.learning_rate=2e-3", "seed=8", "task.condition_dropout=0.2", "data.num_workers=0"]
    assert sdtrain("train", page, *changes) == 2
    reason = capfd.readouterr().err
    assert reason.startswith("sdtrain: this page cannot resume the run that stands in its folder")
    for line in (
        "  seed: 7 -> 8\n",
        "  task.condition_dropout: 0.1 -> 0.2\n",
        "  optimizer.learning_rate: 0.001 -> 0.002\n",
    ):
        assert line in reason
    assert "num_workers:" not in reason
    assert untouched(run) == before


def test_what_may_change_may_change(copied: Path, run: RunDir, world: Path) -> None:
    page = make_page(copied, world)
    assert sdtrain("train", page, "data.micro_batch_size=4", "checkpoint.every_steps=1", "data.prefetch=2") == 0
    assert word(run) == (0, "complete", STEPS)


def test_other_data_under_the_same_name_is_refused(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world, tmp_path / "data")
    page = tiny_page(tmp_path, tmp_path / "data" / "manifest.json", trainer={"max_steps": STEPS})
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (run.path / "STOP").touch()
    assert sdtrain("train", page) == 0
    shutil.rmtree(tmp_path / "data")
    make_latent_manifest(tmp_path / "data", train=48, validation=8)
    before = untouched(run)
    capfd.readouterr()
    assert sdtrain("train", page) == 4
    reason = capfd.readouterr().err
    assert reason.startswith(f"sdtrain: {run.checkpoints / 'step-00000001'}: belongs to another run:\n")
    assert "  data_manifest_sha256: " in reason
    assert untouched(run) == before


def test_a_fresh_start_over_checkpoints_is_refused(
    copied: Path, run: RunDir, world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page, before = make_page(copied, world), untouched(run)
    assert sdtrain("train", page, "--resume", "never") == 2
    assert "nothing is overwritten" in capfd.readouterr().err
    assert untouched(run) == before


def test_a_second_start_beside_a_live_attempt_is_refused(
    copied: Path, run: RunDir, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    page, before = make_page(copied, world), untouched(run)
    monkeypatch.setattr("sdtrain.training.run.Lease", partial(Lease, patience_seconds=0.2))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run.lease], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert sdtrain("train", page, "trainer.max_steps=6") == 9
        said = capfd.readouterr().err
        assert f"sdtrain: run_dir = {run.path}: attempt " in said and " is alive here, as process " in said
        assert f"stop it (`touch {run.path / 'STOP'}`)" in said
        assert untouched(run) == before
        monkeypatch.setenv("SLURM_JOB_ID", "12")  # the holder's: this is the job's next start, a node was cut off
        run.lease.write_text(json.dumps({**json.loads(run.lease.read_text()), "job": "12"}))
        before = untouched(run)
        assert sdtrain("train", page, "trainer.max_steps=6") == 85
        said = capfd.readouterr().err
        assert (
            ": an earlier start of this job, which the scheduler took for ended. Start this job again later; " in said
        )
        assert untouched(run) == before
        monkeypatch.delenv("SLURM_JOB_ID")
    finally:
        holder.kill()
        holder.communicate()
    assert sdtrain("train", page) == 0


def test_a_batch_that_does_not_split_is_refused_before_anything_is_built(
    page: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert sdtrain("train", page) == 2
    assert "the number of ranks may be 1, 2, 4" in capfd.readouterr().err
    assert not run.path.exists()
