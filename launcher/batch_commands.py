"""What the batch scripts of `slurm/` call, and nobody else; hidden from help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from launcher import slurm_data, slurm_data_job, slurm_job, slurm_preflight
from launcher.run_checks import check_resume, checked_run_dir
from launcher.slurm_job import Surroundings
from sdtrain.run_dir import RunDir

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the page.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[STAGE | KEY=VALUE]...", help="Stages to run (default: all), settings over the page."),
]

batch_app = typer.Typer()


@batch_app.command("slurm-begin", hidden=True)
def slurm_begin(
    config: Path,
    overrides: Overrides = None,
    resume: str = "auto",
    max_restarts: int = 0,
) -> None:
    """Begin slurm/train.sbatch: check the page, write the start down, print the folder for the ranks' logs."""
    here = Surroundings.of(os.environ)
    check_resume(resume)
    run_dir = checked_run_dir(config, overrides or [], here.world_size, resume)
    typer.echo(slurm_job.begin(run_dir, here, max_restarts).absolute())


@batch_app.command("slurm-preflight", hidden=True)
def slurm_preflight_(
    logs_folder: Path,
    max_restarts: int = 0,
    step_status: int = 0,
    exclude: Annotated[bool, typer.Option("--exclude-bad-nodes")] = False,
) -> None:
    """Go on with slurm/train.sbatch, or end it, by what `sdtrain doctor` found; 0 goes on."""
    run_dir, here = RunDir(logs_folder.parents[1]), Surroundings.of(os.environ)
    code = slurm_preflight.settle(run_dir, here, logs_folder, max_restarts, step_status, exclude=exclude)
    raise typer.Exit(code or 0)


@batch_app.command("slurm-end", hidden=True)
def slurm_end(logs_folder: Path, max_restarts: int = 0, step_status: int = 0) -> None:
    """End slurm/train.sbatch: decide by exit.json whether the job is requeued, and exit by it."""
    run_dir = RunDir(logs_folder.parents[1])
    raise typer.Exit(int(slurm_job.end(run_dir, Surroundings.of(os.environ), max_restarts, step_status)))


@batch_app.command("slurm-data-begin", hidden=True)
def slurm_data_begin(config: Path, words: Words = None, max_restarts: int = 0) -> None:
    """Begin slurm/data.sbatch: check the page, write the start down; print a folder for logs, an address, the nodes."""
    here = Surroundings.of(os.environ)
    page = slurm_data.checked_page(config, words or [])
    names = slurm_data_job.node_names(os.environ)
    address = slurm_data_job.head_address(names, here, os.environ.get("SDTRAIN_MASTER_ADDR"))
    logs_folder = slurm_data_job.begin_ingestion(page.output, here, max_restarts).absolute()
    typer.echo(f"{logs_folder}\n{address}\n{','.join(names)}")


@batch_app.command("slurm-data-node", hidden=True)
def slurm_data_node(address: str) -> None:
    """Run Ray on one node of slurm/data.sbatch until it is told to end."""
    raise typer.Exit(slurm_data_job.run_node(slurm_data_job.RayNode.of(address, os.environ), os.environ))


@batch_app.command("slurm-data-end", hidden=True)
def slurm_data_end(
    logs_folder: Path,
    max_restarts: int = 0,
    status: int = 0,
    told: Annotated[bool, typer.Option("--told")] = False,
    lost: Annotated[bool, typer.Option("--lost")] = False,
) -> None:
    """End slurm/data.sbatch: decide by how the ingestion ended whether the job is requeued, and exit by it."""
    here, output = Surroundings.of(os.environ), logs_folder.parents[1]
    code = slurm_data_job.end_ingestion(output, here, max_restarts, status, was_told=told, lost_ray=lost)
    raise typer.Exit(code)
