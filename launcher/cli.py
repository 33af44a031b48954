"""`sdtrain-launch`: start runs on one or many GPUs, and ask how they stand."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from launcher.status import read_status, render
from launcher.torchrun import (
    Placement,
    Supervisor,
    added_environment,
    checkpoint_names,
    shell_line,
    torchrun_command,
)
from sdtrain.config.load import load_training, refuse_on_resume
from sdtrain.config.run import TrainingConfig, grad_accum_steps
from sdtrain.errors import ConfigError, SdtrainError
from sdtrain.run_dir import RunDir

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _commands() -> None:
    """Start runs on one or many GPUs, and ask how they stand."""


def checked_run_dir(config: Path, overrides: Sequence[str], placement: Placement, resume: str = "auto") -> RunDir:
    """The folder of the run that `config` describes, after everything that can be checked without torch.

    Raises:
        ConfigError: The page is wrong or not that of the run in its folder, its batch cannot be shared by this many
            ranks, or its folder is not a run's.
        StorageError: The folder cannot be written to.
    """
    training = load_training(config, list(overrides))
    grad_accum_steps(training, placement.world_size)
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


@app.command()
def torchrun(
    config: Annotated[Path, typer.Argument(help="Training page (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the page.")
    ] = None,
    nproc: Annotated[int, typer.Option(help="Ranks on this node, one per GPU.")] = 1,
    nnodes: Annotated[int, typer.Option(help="Number of nodes.")] = 1,
    node_rank: Annotated[int, typer.Option(help="This node's number, 0 to nnodes - 1.")] = 0,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Node 0's address; beyond one node.")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|PATH|never",
            help="Checkpoint that the first start begins from. PATH may be a URL of an upload store.",
        ),
    ] = "auto",
    max_restarts: Annotated[int, typer.Option(min=0, help="Starts after a crash or a requeue request.")] = 0,
    shutdown_timeout: Annotated[int, typer.Option(min=1, help="Seconds to save in after a signal.")] = 120,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the torchrun command and stop.")] = False,
) -> None:
    """Train on this node's GPUs, or as one of several nodes, and exit by what the ranks agreed on."""
    placement = Placement(nproc, nnodes, node_rank, rdzv_endpoint, shutdown_timeout)
    check_resume(resume)
    run_dir = checked_run_dir(config, overrides or [], placement, resume)

    def trainee(resume_from: str) -> list[str]:
        return ["-m", "sdtrain", "train", str(config), *(overrides or []), "--resume", resume_from]

    supervisor = Supervisor(run_dir, placement, trainee, max_restarts)
    if dry_run:
        command = torchrun_command(placement, trainee(resume), supervisor.log_dir)
        typer.echo(shell_line(command, added_environment(nproc, {})))
        return
    raise typer.Exit(int(supervisor.run(resume)))


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print how a run last ended, its newest checkpoint and its last metrics."""
    found = read_status(run)
    typer.echo(json.dumps(found.as_json(), indent=2) if as_json else render(found))


def main() -> None:
    """Run the command line; an error of the user's becomes one message and its typed exit code."""
    try:
        app()
    except SdtrainError as error:
        print(f"sdtrain-launch: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
