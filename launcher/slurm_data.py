"""Submit an ingestion to Slurm: `slurm/data.sbatch` filled in; and how such a job stands, seen from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import slurm_queue
from launcher.container import container_of, refuse_missing
from launcher.site import Site, load_site
from launcher.slurm import (
    SITE_OPTIONS,
    TEMPLATE,
    check_time,
    fill_in,
    job_name,
    refuse_impossible,
    refuse_node_local,
)
from launcher.slurm_journal import Journal, Submission, refuse_second_job
from launcher.status import job_text, queued_job
from sdtrain.config.ingestion import IngestionConfig
from sdtrain.config.load import load_ingestion
from sdtrain.errors import ConfigError
from sdtrain.run_dir import RunDir, nearest_existing

DATA_TEMPLATE = TEMPLATE.with_name("data.sbatch")


@dataclass(frozen=True, slots=True)
class DataJob:
    """What is asked of the scheduler.

    Attributes:
        nodes: Number of nodes, each with one Ray node.
        cpus_per_node: Cores of each; None takes whole nodes, with all of their memory.
        gpus_per_node: GPUs of each, for stages that encode or score; no more workers than GPUs run such a stage.
        time: Time limit, HH:MM:SS or D-HH:MM:SS.
        max_restarts: How often the job may be requeued.
        name: Name of the job.
    """

    nodes: int
    cpus_per_node: int | None
    gpus_per_node: int
    time: str
    max_restarts: int
    name: str

    def __post_init__(self) -> None:
        check_time(self.time)


def data_job_of(options: Mapping[str, Any], site: Site, name: str) -> DataJob:
    """The job that options of the command line and the site's defaults make; GPUs are taken where they are asked for.

    Raises:
        ConfigError: The time limit is not one.
    """
    return DataJob(
        nodes=options.get("nodes", 1),
        cpus_per_node=options.get("cpus_per_node"),
        gpus_per_node=options.get("gpus_per_node", 0),
        time=options.get("time", site.time),
        max_restarts=options.get("max_restarts", site.max_restarts),
        name=job_name(name),
    )


def render_data(job: DataJob, site: Site, output: Path, folder: Path, page: Path, words: Sequence[str]) -> str:
    """The batch script, complete.

    Args:
        job: What is asked for.
        site: What is the same for all jobs.
        output: The ingestion's output folder.
        folder: Where relative paths of the page start from.
        page: The page.
        words: Stages, and `key=value` settings over the page.

    Raises:
        ConfigError: The script to fill in is not installed.
    """
    takes_all = job.cpus_per_node is None
    wanted = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_node,
        "exclusive": takes_all or None,
        "mem": 0 if takes_all else None,
        "time": job.time,
        "signal": f"B:USR1@{site.save_seconds}",
    }
    settings = [f"max_restarts={job.max_restarts}"]
    return fill_in(DATA_TEMPLATE, wanted, settings, site, RunDir(output), folder, [str(page), *words])


def checked_page(config: Path, words: Sequence[str]) -> IngestionConfig:
    """The page of an ingestion, after everything that can be checked without its stages.

    Args:
        config: The page.
        words: Stages, which are not checked here, and `key=value` settings over the page.

    Raises:
        ConfigError: The page is wrong, names a Ray cluster, or its output is no folder.
    """
    page = load_ingestion(config, [word for word in words if "=" in word])
    if page.runner.address is not None:
        raise ConfigError(
            f"{config}: runner.address = {page.runner.address}: a Slurm job starts a Ray cluster of its own; leave "
            "the key out (runner.address=null)"
        )
    there = nearest_existing(page.output)
    if there is not None and not there.is_dir():
        raise ConfigError(f"output = {page.output}: {there} is a file; give a folder")
    return page


def hints(page: IngestionConfig, job: DataJob) -> Iterator[str]:
    """What a page asks for that will surprise on a cluster."""
    if page.runner.workers is not None and page.runner.workers < job.nodes * (job.cpus_per_node or 2):
        yield (
            f"runner.workers = {page.runner.workers}: no more tasks than that run at a time on all {job.nodes} nodes "
            "together; runner.workers=null takes all cores of the job"
        )
    if job.gpus_per_node and page.encode is None and page.scores is None:
        yield f"--gpus-per-node {job.gpus_per_node}: no stage of this page uses a GPU"


def submit_ingestion(
    config: Path, words: Sequence[str], options: dict[str, Any], *, dry_run: bool = False
) -> Iterator[str]:
    """Check a job, submit it and say what comes next; or give its batch script.

    Args:
        config: The page.
        words: Stages, and `key=value` settings over the page.
        options: Those of `slurm-data` that were given, by name.
        dry_run: Only give the script.

    Yields:
        Lines to print.

    Raises:
        ConfigError: The job cannot run, or the scheduler refuses it.
        StorageError: The output folder cannot be written to.
    """
    site = load_site(Path(options["site"]) if "site" in options else None)
    given = {name: value for name, value in options.items() if name in SITE_OPTIONS}
    site = site.model_copy(update={"container": site.data_container, **given})
    page = checked_page(config, words)
    job = data_job_of(options, site, page.name or "sdtrain-data")
    script = render_data(job, site, page.output, Path.cwd(), config, words)
    if dry_run:
        yield script.rstrip("\n")
        return
    refuse_impossible(job.nodes, job.gpus_per_node, job.time, site)
    refuse_node_local(page.output, site, key="output")
    refuse_missing(container_of(site.container, site.container_runtime, site.container_mounts))
    journal = Journal(RunDir(page.output), "ingestion")
    refuse_second_job(journal)
    journal.prepare()
    number = slurm_queue.submit(script)
    journal.add("submit", Submission(number, str(Path.cwd()), str(config), list(words), options, "ingestion"))
    yield from (f"warning: {line}" for line in hints(page, job))
    yield f"job {number}: {job.nodes} nodes, output folder {page.output}"
    yield f"  sdtrain-data status {page.output}"
    yield from (f"  sdtrain-launch {command} {page.output}" for command in ("status", "logs", "cancel", "resume"))


# Watched from outside -------------------------------------------------------------------------------------------------


def ingestion_facts(journal: Journal) -> dict[str, Any]:
    """How the newest job of an output folder stands, as JSON: output, job, queued, last_end, restarts."""
    job = journal.newest_job()
    queued = None if job is None else queued_job(job)
    return {
        "output": str(journal.run_dir.path),
        "job": job,
        "queued": None if queued is None else asdict(queued),
        "last_end": journal.newest_end(),
        "restarts": restarts_of(journal),
    }


def ingestion_lines(journal: Journal) -> Iterator[str]:
    """The same for a terminal; how far the stages are is for `sdtrain-data` to say."""
    path, job, last = journal.run_dir.path, journal.newest_job(), journal.newest_end()
    assert job is not None, "a journal without a job is not known to be an ingestion's"
    lines = {
        "output": str(path),
        "last end": "no start has ended yet" if last is None else last["reason"],
        "job": f"{job_text(job, queued_job(job))}, {restarts_of(journal)} restarts",
        "stages": f"sdtrain-data status {path}",
    }
    yield from (f"{name:<12}{text}" for name, text in lines.items())


def restarts_of(journal: Journal) -> int:
    """Starts of the newest job beyond its first one."""
    return max(0, sum(start.job == journal.newest_job() for start in journal.starts()) - 1)
