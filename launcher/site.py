"""What is the same for all jobs of a site: its partition, account, modules, variables and folders, in one YAML."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from launcher.container import MOUNT, Runtime
from sdtrain.config.base import NonEmptyStr, PositiveInt, Section
from sdtrain.config.load import load_section
from sdtrain.config.problems import Problem

USUAL_SITE = Path("slurm/site.yaml")
SITE_VARIABLE = "SDTRAIN_SITE"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Site(Section):
    """Defaults of `sdtrain-launch slurm` and `slurm-data`; their options win over them.

    Attributes:
        partition: Partition of the jobs; null takes the cluster's default.
        account: Account that is charged.
        qos: Quality of service.
        constraint: Node features, as in `h100&ib`.
        gpus_per_node: GPUs of a node, one rank for each; an ingestion takes those that its command asks for.
        cpus_per_gpu: Cores of a rank and its data workers; null leaves it to the cluster.
        time: Time limit of one job, HH:MM:SS or D-HH:MM:SS; a run goes on in the next one.
        save_seconds: How long before the limit a job is told to save and leave.
        preflight: Whether a job begins with `sdtrain doctor` on all of its ranks.
        exclude_bad_nodes: Whether a job that finds failing or slow nodes so is requeued without them.
        max_restarts: How often a job is requeued before it needs a person.
        sbatch: Further options of sbatch, such as `--exclusive` or `--mem=0`.
        modules: Environment modules that a job loads first.
        environment: Variables of a job, such as those of NCCL; SDTRAIN_MASTER_ADDR replaces the first node's name.
        shared_folders: Folders that all nodes see, although they look like a disk of the login node.
        scratch: Folder on every node's own disk for temporary files and compile caches.
        container: Image that the ranks run in: a path, or a name in a registry; null runs them on the nodes themselves.
        data_container: The same for ingestions.
        container_runtime: `pyxis`, options of srun, or `apptainer`, a program.
        container_mounts: `SRC[:DST[:FLAGS]]` beside the folders of submission, page, run and scratch.
    """

    partition: NonEmptyStr | None = None
    account: NonEmptyStr | None = None
    qos: NonEmptyStr | None = None
    constraint: NonEmptyStr | None = None
    gpus_per_node: PositiveInt | None = None
    cpus_per_gpu: PositiveInt | None = None
    time: NonEmptyStr = "24:00:00"
    save_seconds: Annotated[int, Field(ge=1, le=65535)] = 120
    preflight: bool = True
    exclude_bad_nodes: bool = False
    max_restarts: Annotated[int, Field(ge=0)] = 50
    sbatch: tuple[NonEmptyStr, ...] = ()
    modules: tuple[NonEmptyStr, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    shared_folders: tuple[Path, ...] = ()
    scratch: Path | None = None
    container: NonEmptyStr | None = None
    data_container: NonEmptyStr | None = None
    container_runtime: Runtime = "pyxis"
    container_mounts: tuple[NonEmptyStr, ...] = ()


def variables_have_names(environment: dict[str, str]) -> Iterator[Problem]:
    """A shell must be able to export them."""
    for name in environment:
        if not _VARIABLE.fullmatch(name):
            yield Problem(f"environment.{name}", "a variable's name is made of letters, digits and underscores")


def options_are_options(sbatch: tuple[str, ...]) -> Iterator[Problem]:
    """One `#SBATCH` line each."""
    for index, option in enumerate(sbatch):
        if not option.startswith("-") or "\n" in option:
            yield Problem(f"sbatch.{index}", "must be one option of sbatch, such as --exclusive or --mem=0")


def modules_are_words(modules: tuple[str, ...]) -> Iterator[Problem]:
    """As `module load` takes them."""
    for index, module in enumerate(modules):
        if not re.fullmatch(r"[\w.+/@-]+", module):
            yield Problem(f"modules.{index}", "must be one module, such as cuda/12.8")


def mounts_are_mounts(container_mounts: tuple[str, ...]) -> Iterator[Problem]:
    """As both runtimes read them."""
    for index, mount in enumerate(container_mounts):
        if not MOUNT.fullmatch(mount):
            yield Problem(
                f"container_mounts.{index}",
                "must be SRC[:DST[:FLAGS]] with absolute paths, such as /data or /data:/data:ro",
            )


SITE_RULES = (variables_have_names, options_are_options, modules_are_words, mounts_are_mounts)


def load_site(path: Path | None) -> Site:
    """The site's defaults: of the given file, else `$SDTRAIN_SITE`, else `slurm/site.yaml` if there, else none.

    Raises:
        ConfigError: Everything that is wrong with the file.
    """
    if path is None and os.environ.get(SITE_VARIABLE):
        path = Path(os.environ[SITE_VARIABLE])
    if path is None:
        path = USUAL_SITE if USUAL_SITE.is_file() else None
    return (
        Site()
        if path is None
        else load_section(path, Site, SITE_RULES, footer="All keys, with an example: slurm/site.example.yaml")
    )
