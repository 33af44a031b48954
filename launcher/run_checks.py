"""What a launcher refuses before anything is started: all that can be checked of a run without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.torchrun import checkpoint_names
from sdtrain.config.load import load_training, refuse_on_resume
from sdtrain.config.run import TrainingConfig, grad_accum_steps
from sdtrain.errors import ConfigError
from sdtrain.run_dir import RunDir


def checked_run_dir(config: Path, overrides: Sequence[str], world_size: int, resume: str = "auto") -> RunDir:
    """The folder of the run that `config` describes, after everything that can be checked without torch.

    Args:
        config: The page.
        overrides: `key=value` settings over it.
        world_size: Number of ranks.
        resume: `auto`, `never`, a checkpoint's folder or a URL.

    Raises:
        ConfigError: The page is wrong or not that of the run in its folder, its batch cannot be shared by this many
            ranks, or its folder is not a run's.
        StorageError: The folder cannot be written to.
    """
    training = load_training(config, list(overrides))
    grad_accum_steps(training, world_size)
    run_dir = RunDir(training.resolved_run_dir)
    run_dir.refuse_unusable()
    saved = saved_page(run_dir, resume)
    if saved is not None:
        refuse_on_resume(saved, training)
    return run_dir


def saved_page(run_dir: RunDir, resume: str) -> TrainingConfig | None:
    """The page that the checkpoint to start from was trained with; None where the ranks alone can tell."""
    names = sorted(checkpoint_names(run_dir), key=lambda name: int(name.removeprefix("step-")))
    folder = Path(resume)
    if resume == "auto" and names:
        folder = run_dir.checkpoints / names[-1]
    try:
        return load_training(folder / "config.yaml")
    except ConfigError:
        return None


def check_resume(resume: str) -> None:
    """Refuse a `--resume` that can only fail later, on every rank.

    Raises:
        ConfigError: Neither a keyword, nor a URL, nor an existing checkpoint folder.
    """
    if resume not in {"auto", "never"} and "://" not in resume and not Path(resume).is_dir():
        raise ConfigError(
            f"--resume {resume}: no such checkpoint folder; give auto, never, a folder such as RUN/checkpoints/step-N "
            "or a URL such as s3://BUCKET/RUN/step-N"
        )
