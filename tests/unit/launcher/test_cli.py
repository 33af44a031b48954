"""`sdtrain-launch` as a user types it."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.torchrun import Supervisor
from sdtrain.errors import ExitCode
from sdtrain.run_dir import Exit, RunDir
from tests.unit.launcher.commands import launch

PAGE = """\
# sdtrain-launch torchrun train.yaml --nproc 2
schema_version: 1
kind: training
run_dir: {run}
task:        {{type: latent_diffusion}}
data:        {{manifest: data/manifest.json, batch_size: 8, micro_batch_size: 2}}
autoencoder: {{type: kl, preset: tiny}}
denoiser:    {{type: unet, preset: sd15}}
conditioner: {{type: none}}
process:     {{beta_schedule: scaled_linear, beta_start: 0.00085, beta_end: 0.012, prediction_type: epsilon}}
optimizer:   {{learning_rate: 1.0e-4, lr_schedule: constant}}
trainer:     {{max_steps: 10, precision: fp32}}
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(PAGE.format(run=tmp_path / "run"))
    return path


@pytest.fixture
def started(monkeypatch):
    """What would have been started, in place of starting it."""
    calls = []

    def run(self: Supervisor, resume: str) -> ExitCode:
        calls.append((self, resume))
        return ExitCode.DIVERGED

    monkeypatch.setattr(Supervisor, "run", run)
    return calls


def test_the_settings_reach_the_supervisor_and_its_code_is_ours(monkeypatch, page, started):
    code = launch(monkeypatch, "torchrun", page, "trainer.max_steps=3", "--nproc", 4, "--max-restarts", 2)
    assert code == ExitCode.DIVERGED
    ((job, resume),) = started
    assert (job.placement.world_size, job.max_restarts, resume) == (4, 2, "auto")
    assert job.run_dir.path == page.parent / "run"
    assert job.trainee("never") == ["-m", "sdtrain", "train", str(page), "trainer.max_steps=3", "--resume", "never"]


def test_an_override_of_the_run_folder_is_followed(monkeypatch, page, started, tmp_path):
    launch(monkeypatch, "torchrun", page, f"run_dir={tmp_path / 'elsewhere'}")
    assert started[0][0].run_dir.path == tmp_path / "elsewhere"


def test_a_dry_run_prints_the_command_and_starts_nothing(monkeypatch, page, started, capsys):
    assert launch(monkeypatch, "torchrun", page, "--nproc", 2, "--dry-run") == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0].startswith("OMP_NUM_THREADS=")
    assert words[2:5] == [sys.executable, "-m", "torch.distributed.run"]
    assert words[-6:] == ["-m", "sdtrain", "train", str(page), "--resume", "auto"]
    assert not started and not (page.parent / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.max_stepz=3"], "trainer.max_stepz"),
        (["--nproc", "3"], "batch_size"),
        (["--resume", "no/such"], "--resume no/such: no such checkpoint folder; give auto, never, a folder"),
        (["--nnodes", "2"], "--nnodes 2 needs --rdzv-endpoint"),
    ],
)
def test_a_bad_start_ends_with_code_2_before_anything_runs(monkeypatch, page, started, capsys, arguments, message):
    assert launch(monkeypatch, "torchrun", page, *arguments) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert error.startswith("sdtrain-launch: ") and message in error
    assert not started


def test_a_page_of_another_run_is_refused_before_anything_runs(monkeypatch, page, started, capsys):
    saved = page.parent / "run" / "checkpoints" / "step-00000004" / "config.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text(page.read_text())
    assert launch(monkeypatch, "torchrun", page) == ExitCode.DIVERGED, "the same page goes on"
    changed = ("torchrun", page, "data.batch_size=4")
    assert launch(monkeypatch, *changed) == ExitCode.CONFIG
    assert "sdtrain-launch: this page cannot resume the run" in (error := capsys.readouterr().err)
    assert "  data.batch_size: 8 -> 4\n" in error
    assert launch(monkeypatch, *changed, f"run_dir={page.parent / 'new'}", "--resume", saved.parent) == ExitCode.CONFIG
    assert len(started) == 1
    saved.write_text("torn: [")
    assert launch(monkeypatch, *changed) == ExitCode.DIVERGED, "what is wrong with a checkpoint, the ranks say"


def test_a_folder_of_something_else_is_refused_before_anything_runs(monkeypatch, page, started, capsys):
    thesis = page.parent / "run" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.touch()
    assert launch(monkeypatch, "torchrun", page) == ExitCode.CONFIG
    assert "run: not a run's folder: it holds thesis.tex, and no ledger.jsonl of a run." in capsys.readouterr().err
    assert not started
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis.tex"]


def test_a_missing_page_is_a_config_error(monkeypatch, tmp_path, capsys):
    assert launch(monkeypatch, "torchrun", tmp_path / "none.yaml") == ExitCode.CONFIG
    assert "none.yaml" in capsys.readouterr().err


def test_status(monkeypatch, tmp_path, capsys):
    RunDir(tmp_path).write_exit(Exit(5, "loss is not finite", 12, 0, "a"))
    assert launch(monkeypatch, "status", tmp_path) == 0
    assert "code 5 (diverged) at step 12" in capsys.readouterr().out
    assert launch(monkeypatch, "status", tmp_path, "--json") == 0
    assert '"code": 5' in capsys.readouterr().out
    assert launch(monkeypatch, "status", tmp_path / "none") == ExitCode.CONFIG


def test_the_launcher_imports_no_torch():
    code = "import launcher.cli, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("command", ["torchrun", "slurm", "resume", "cancel", "logs", "slurm-data", "status"])
def test_help_of_every_command_has_an_example(monkeypatch, capsys, command):
    assert launch(monkeypatch, command, "--help") == 0
    assert f"Example: sdtrain-launch {command} " in capsys.readouterr().out


def test_the_list_of_commands_hides_those_of_the_batch_scripts(monkeypatch, capsys):
    assert launch(monkeypatch, "--help") == 0
    listed = capsys.readouterr().out
    assert "  slurm-data " in listed and "slurm-begin" not in listed and "slurm-data-node" not in listed
