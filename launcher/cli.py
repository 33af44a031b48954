"""`sdtrain-launch`: start runs on one or many GPUs, and ask how they stand."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher import slurm_data, slurm_queue, torchrun_preflight
from launcher import status as run_status
from launcher.batch_commands import Overrides, Words, batch_app
from launcher.container import container_of, refuse_missing, spelled_out
from launcher.run_checks import check_resume, checked_run_dir
from launcher.site import load_site
from launcher.slurm import SITE_OPTIONS, Mode, job_of, refuse_impossible, refuse_node_local, render
from launcher.slurm_journal import Journal, Submission, refuse_second_job, resubmission
from launcher.slurm_watch import cancel_run, tails
from launcher.status import read_status
from launcher.torchrun import (
    Placement,
    Supervisor,
    added_environment,
    shell_line,
    torchrun_command,
)
from sdtrain.config.load import load_training
from sdtrain.errors import ConfigError, SdtrainError
from sdtrain.run_dir import RunDir

RunFolder = Annotated[Path, typer.Argument(help="Run folder, or an ingestion's output folder.")]
GpusPerNode = Annotated[int | None, typer.Option(min=1, help="GPUs of each node, one rank for each.")]
Partition = Annotated[str | None, typer.Option(help="Partition.")]
Account = Annotated[str | None, typer.Option(help="Account that is charged.")]
Qos = Annotated[str | None, typer.Option(help="Quality of service.")]
Constraint = Annotated[str | None, typer.Option(help="Node features, as in h100&ib.")]
TimeLimit = Annotated[str | None, typer.Option(metavar="HH:MM:SS", help="Time limit of one job; the next one goes on.")]
MaxRequeues = Annotated[int | None, typer.Option(min=0, help="How often the job may be requeued.")]
ModeOption = Annotated[Mode | None, typer.Option(help="One task per GPU (srun), or one agent per node (torchrun).")]
ContainerOption = Annotated[
    str | None,
    typer.Option("--container", metavar="IMAGE", help="Image to run in: a path, a registry's name, or none for none."),
]
PreflightOption = Annotated[
    bool | None,
    typer.Option("--preflight/--no-preflight", help="Check all nodes before training (sdtrain doctor)."),
]
ExcludeBadNodes = Annotated[
    bool | None,
    typer.Option("--exclude-bad-nodes/--keep-bad-nodes", help="Requeue without nodes that fail it or are slow."),
]
Exclude = Annotated[str | None, typer.Option(metavar="NODES", help="Nodes to do without, as in n[3-4],n7.")]
SiteFile = Annotated[Path | None, typer.Option(help="The site's defaults; else $SDTRAIN_SITE or slurm/site.yaml.")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Start runs on one or many GPUs, and ask how they stand.",
    epilog="Exit codes of what is started: sdtrain --help.",
)
app.add_typer(batch_app)


@app.command(epilog="Example: sdtrain-launch torchrun configs/sd15/train.yaml --nproc 8")
def torchrun(
    config: Annotated[Path, typer.Argument(help="Training page (YAML).")],
    overrides: Overrides = None,
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
    preflight: Annotated[
        bool | None,
        typer.Option("--preflight/--no-preflight", help="Check all nodes first; else where there are many."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the torchrun command and stop.")] = False,
) -> None:
    """Train on this node's GPUs, or as one of several nodes, and exit by what the ranks agreed on."""
    placement = Placement(nproc, nnodes, node_rank, rdzv_endpoint, shutdown_timeout)
    check_resume(resume)
    run_dir = checked_run_dir(config, overrides or [], placement.world_size, resume)

    def trainee(resume_from: str) -> list[str]:
        return ["-m", "sdtrain", "train", str(config), *(overrides or []), "--resume", resume_from]

    supervisor = Supervisor(run_dir, placement, trainee, max_restarts)
    if dry_run:
        command = torchrun_command(placement, trainee(resume), supervisor.log_dir)
        typer.echo(shell_line(command, added_environment(nproc, {})))
        return
    if preflight or (preflight is None and nnodes > 1):
        code = torchrun_preflight.examine(placement, [str(config), *(overrides or [])], supervisor.log_dir)
        if code:
            raise typer.Exit(int(code))
    raise typer.Exit(int(supervisor.run(resume)))


@app.command(epilog="Example: sdtrain-launch slurm configs/sd15/train.yaml --nodes 8 --time 24:00:00 --dry-run")
def slurm(
    config: Annotated[Path, typer.Argument(help="Training page (YAML).")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    gpus_per_node: GpusPerNode = None,
    time: TimeLimit = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclude: Exclude = None,
    max_restarts: MaxRequeues = None,
    mode: ModeOption = None,
    preflight: PreflightOption = None,
    exclude_bad_nodes: ExcludeBadNodes = None,
    container: ContainerOption = None,
    site: SiteFile = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|PATH|never", help="Checkpoint that the first start begins from; may be a URL.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and stop.")] = False,
) -> None:
    """Train on a Slurm cluster: submit a job that requeues itself until the run is complete."""
    options = {"nodes": nodes, "gpus_per_node": gpus_per_node, "time": time, "partition": partition}
    options |= {"account": account, "qos": qos, "constraint": constraint, "max_restarts": max_restarts}
    options |= {"mode": mode, "site": None if site is None else str(site.absolute())}
    options |= {"container": spelled_out(container), "exclude": exclude}
    options |= {"preflight": preflight, "exclude_bad_nodes": exclude_bad_nodes}
    given = {name: value for name, value in options.items() if value is not None}
    check_resume(resume)
    submit_run(config, overrides or [], given, resume=resume, dry_run=dry_run)


def submit_run(
    config: Path, overrides: Sequence[str], options: dict[str, Any], *, resume: str = "auto", dry_run: bool = False
) -> None:
    """Check a job, submit it and say what comes next; or print its batch script.

    Args:
        config: The page.
        overrides: `key=value` settings over it.
        options: Those of `slurm` that were given, by name.
        resume: Checkpoint that the first start begins from.
        dry_run: Only print.

    Raises:
        ConfigError: The job cannot run, or the scheduler refuses it.
        StorageError: The run's folder cannot be written to.
    """
    site = load_site(Path(options["site"]) if "site" in options else None)
    site = site.model_copy(update={name: value for name, value in options.items() if name in SITE_OPTIONS})
    job = job_of(options, site, load_training(config, list(overrides)).name or "sdtrain", resume)
    run_dir = checked_run_dir(config, overrides, job.world_size, resume)
    script = render(job, site, run_dir, Path.cwd(), config, overrides)
    if dry_run:
        typer.echo(script, nl=False)
        return
    refuse_impossible(job.nodes, job.gpus_per_node, job.time, site)
    refuse_node_local(run_dir.path, site)
    refuse_missing(container_of(site.container, site.container_runtime, site.container_mounts))
    journal = Journal(run_dir)
    refuse_second_job(journal)
    journal.prepare()
    number = slurm_queue.submit(script)
    journal.add("submit", Submission(number, str(Path.cwd()), str(config), list(overrides), options))
    typer.echo(f"job {number}: {job.nodes} nodes with {job.gpus_per_node} ranks each, run folder {run_dir.path}")
    for command in ("status", "logs", "cancel", "resume"):
        typer.echo(f"  sdtrain-launch {command} {run_dir.path}")


@app.command(epilog="Example: sdtrain-launch resume runs/sd15-train --nodes 4")
def resume(
    run: RunFolder,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes, if it shall be another.")] = None,
    gpus_per_node: GpusPerNode = None,
    time: TimeLimit = None,
    partition: Partition = None,
    exclude: Exclude = None,
    max_restarts: MaxRequeues = None,
    mode: ModeOption = None,
    preflight: PreflightOption = None,
    exclude_bad_nodes: ExcludeBadNodes = None,
    container: ContainerOption = None,
    site: SiteFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and stop.")] = False,
) -> None:
    """Submit a run, or the ingestion of an output folder, again, with its page and options; it goes on where it is."""
    read_status(run)  # refuses what is no run folder
    journal = Journal(RunDir(run))
    if mode is not None and journal.is_ingestion():
        raise ConfigError(f"--mode {mode}: {run} is an ingestion's output, and this is for training")
    changed = {"nodes": nodes, "gpus_per_node": gpus_per_node, "time": time, "partition": partition}
    changed |= {"max_restarts": max_restarts, "mode": mode, "site": None if site is None else str(site.absolute())}
    changed |= {"container": spelled_out(container), "exclude": exclude}
    changed |= {"preflight": preflight, "exclude_bad_nodes": exclude_bad_nodes}
    again = resubmission(journal, {name: value for name, value in changed.items() if value is not None})
    with contextlib.chdir(again.folder):
        page, words = Path(again.config), [*again.overrides, *(overrides or [])]
        if again.kind == "ingestion":
            submit_data(page, words, again.options, dry_run=dry_run)
        else:
            submit_run(page, words, again.options, dry_run=dry_run)


@app.command(epilog="Example: sdtrain-launch cancel runs/sd15-train")
def cancel(
    run: RunFolder,
    now: Annotated[bool, typer.Option("--now", help="Do not let it save.")] = False,
) -> None:
    """Let a job save and end, or take it out of the queue; an ingestion's ends at once, as all it commits is saved."""
    typer.echo(cancel_run(Journal(RunDir(run)), now=now))


@app.command(epilog="Example: sdtrain-launch logs runs/sd15-train --rank 17")
def logs(
    run: RunFolder,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Rank (of an ingestion: node); else the one that ended the run, or 0.")
    ] = None,
    lines: Annotated[int, typer.Option(min=1, help="Lines of each file.")] = 20,
) -> None:
    """Print the ends of what the newest job and a rank of it have said."""
    for path, tail in tails(Journal(RunDir(run)), rank, lines):
        typer.echo(f"==> {path} <==\n{tail}\n")


@app.command(
    "slurm-data",
    epilog="Example: sdtrain-launch slurm-data configs/sd15/data.yaml --nodes 8 --time 24:00:00 runner.workers=null",
)
def slurm_ingestion(
    config: Annotated[Path, typer.Argument(help="A page of kind ingestion (YAML).")],
    words: Words = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes, each with one Ray node.")] = 1,
    cpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Cores of each node; else whole nodes with all of their memory.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="GPUs of each node, for stages that encode or score; else none.")
    ] = None,
    time: TimeLimit = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    max_restarts: MaxRequeues = None,
    container: ContainerOption = None,
    site: SiteFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and stop.")] = False,
) -> None:
    """Run `sdtrain-data` on a Slurm cluster: Ray on the nodes of one job, which requeues itself until all is done."""
    options = {"nodes": nodes, "cpus_per_node": cpus_per_node, "gpus_per_node": gpus_per_node, "time": time}
    options |= {"partition": partition, "account": account, "qos": qos, "constraint": constraint}
    options |= {"max_restarts": max_restarts, "site": None if site is None else str(site.absolute())}
    options |= {"container": spelled_out(container)}
    given = {name: value for name, value in options.items() if value is not None}
    submit_data(config, words or [], given, dry_run=dry_run)


def submit_data(config: Path, words: Sequence[str], options: dict[str, Any], *, dry_run: bool) -> None:
    """Submit an ingestion and print what comes next; or its batch script."""
    for line in slurm_data.submit_ingestion(config, words, options, dry_run=dry_run):
        typer.echo(line)


@app.command(epilog="Example: sdtrain-launch status runs/sd15-train")
def status(
    run: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print how a run last ended, its newest checkpoint and its last metrics; or how an ingestion's job stands."""
    found = read_status(run)
    journal = Journal(RunDir(run))
    if journal.is_ingestion():
        facts = json.dumps(slurm_data.ingestion_facts(journal), indent=2)
        typer.echo(facts if as_json else "\n".join(slurm_data.ingestion_lines(journal)))
        return
    typer.echo(json.dumps(found.as_json(), indent=2) if as_json else run_status.render(found))


def main() -> None:
    """Run the command line; an error of the user's becomes one message and its typed exit code."""
    try:
        app()
    except SdtrainError as error:
        print(f"sdtrain-launch: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
