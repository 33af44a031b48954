"""Submit a job to Slurm: a script of `slurm/` with its settings filled in, after all that can be checked before."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.container import container_of, shell_lines
from launcher.site import Site
from launcher.slurm_queue import groups_of, seconds_of
from sdtrain.errors import ConfigError
from sdtrain.run_dir import RunDir, nearest_existing

TEMPLATE = Path(__file__).parents[1] / "slurm" / "train.sbatch"
_SETTINGS = re.compile(r"(?<=# >>> settings\n).*?(?=# <<< settings\n)", re.DOTALL)
_TIME = re.compile(r"(\d+-)?\d{1,3}:\d\d:\d\d")
# File systems that one node alone sees; any other (nfs, lustre, gpfs, beegfs, ceph, fuse, ...) is taken as shared.
NODE_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay", "vfat"})

SITE_OPTIONS = ("partition", "account", "qos", "constraint", "container")

Mode = Literal["srun", "torchrun"]
Preflight = Literal["on", "exclude", "off"]
"""Check all nodes first; and come back without bad ones; or train at once."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of the scheduler.

    Attributes:
        nodes: Number of nodes.
        gpus_per_node: GPUs of each, and ranks.
        time: Time limit, HH:MM:SS or D-HH:MM:SS.
        mode: `srun` starts one task per GPU, `torchrun` one agent per node.
        max_restarts: How often the job may be requeued.
        resume: Checkpoint that the first start begins from: `auto`, `never`, a folder or a URL.
        name: Name of the job.
        preflight: What is checked first, and what follows from it.
        exclude: Nodes that it must not run on, as Slurm writes lists.
    """

    nodes: int
    gpus_per_node: int
    time: str
    mode: Mode
    max_restarts: int
    resume: str
    name: str
    preflight: Preflight = "on"
    exclude: str | None = None

    def __post_init__(self) -> None:
        check_time(self.time)

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.gpus_per_node


def check_time(time: str) -> None:
    """Refuse a time limit that is not written in full.

    Raises:
        ConfigError: It is not.
    """
    if not _TIME.fullmatch(time):
        raise ConfigError(f"--time {time}: give HH:MM:SS or D-HH:MM:SS, such as 24:00:00 or 2-00:00:00")


def job_of(options: Mapping[str, Any], site: Site, name: str, resume: str) -> Job:
    """The job that options of the command line and the site's defaults make.

    Raises:
        ConfigError: A number is missing, or does not fit.
    """
    gpus_per_node = options.get("gpus_per_node") or site.gpus_per_node
    if gpus_per_node is None:
        raise ConfigError("--gpus-per-node is missing: give it, or gpus_per_node in the site's file")
    return Job(
        nodes=options.get("nodes", 1),
        gpus_per_node=gpus_per_node,
        time=options.get("time", site.time),
        mode=options.get("mode", "srun"),
        max_restarts=options.get("max_restarts", site.max_restarts),
        resume=resume,
        name=job_name(name),
        preflight=preflight_of(options, site),
        exclude=options.get("exclude"),
    )


def preflight_of(options: Mapping[str, Any], site: Site) -> Preflight:
    """What is checked before training, by the options of the command line and the site's defaults.

    Raises:
        ConfigError: The options contradict each other.
    """
    if options.get("preflight") is False and options.get("exclude_bad_nodes"):
        raise ConfigError("--exclude-bad-nodes needs the preflight that finds them; leave --no-preflight out")
    if not options.get("preflight", site.preflight):
        return "off"
    return "exclude" if options.get("exclude_bad_nodes", site.exclude_bad_nodes) else "on"


def job_name(name: str) -> str:
    """A run's name with what Slurm and file names bear."""
    return re.sub(r"[^\w.-]+", "-", name) or "sdtrain"


def render(job: Job, site: Site, run_dir: RunDir, folder: Path, page: Path, overrides: Sequence[str]) -> str:
    """The batch script, complete.

    Args:
        job: What is asked for.
        site: What is the same for all jobs.
        run_dir: The run.
        folder: Where relative paths of the page start from.
        page: The page.
        overrides: `key=value` settings over it.

    Raises:
        ConfigError: The script to fill in is not installed.
    """
    wanted = {
        "job-name": job.name,
        "nodes": job.nodes,
        "gpus-per-node": job.gpus_per_node,
        "ntasks-per-node": job.gpus_per_node,
        "cpus-per-task": site.cpus_per_gpu,
        "time": job.time,
        "signal": f"USR1@{site.save_seconds}",
        "exclude": job.exclude,
    }
    settings = [f"mode={job.mode}", f"preflight={job.preflight}"]
    settings += [f"max_restarts={job.max_restarts}", f"resume={shlex.quote(job.resume)}"]
    return fill_in(TEMPLATE, wanted, settings, site, run_dir, folder, [str(page), *overrides])


def fill_in(
    template: Path,
    wanted: Mapping[str, object],
    settings: Sequence[str],
    site: Site,
    run_dir: RunDir,
    folder: Path,
    words: Sequence[str],
) -> str:
    """A script of `slurm/` with everything that stands between its two arrows.

    Args:
        template: The script.
        wanted: Options of sbatch by name; None leaves one out, True gives it without a value.
        settings: Lines that set the script's own variables.
        site: What is the same for all jobs.
        run_dir: Where the job writes what it says, in `logs/`.
        folder: Where relative paths start from.
        words: The script's arguments, the page first.

    Raises:
        ConfigError: The script is not installed.
    """
    lines = [f"#SBATCH {option}" for option in _options(wanted, site, run_dir, folder)]
    lines += settings
    lines += _container_lines(site, run_dir, folder, Path(words[0]))
    if site.modules:
        lines += ["module purge", f"module load {shlex.join(site.modules)}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in _variables(site).items()]
    lines += [f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]
    lines += [f"set -- {shlex.join(words)}"]
    text = "\n".join(lines) + "\n"
    try:
        script = template.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{template} is not there: submit from an installation out of a checkout (make venv)"
        ) from None
    return _SETTINGS.sub(lambda _: text, script)


def _options(wanted: Mapping[str, object], site: Site, run_dir: RunDir, folder: Path) -> list[str]:
    output = str(run_dir.path.absolute() / "logs").replace("%", "%%")
    all_wanted = {
        **wanted,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "chdir": folder.absolute(),
        "output": f"{output}/slurm-%j.out",
    }
    given = {name: value for name, value in all_wanted.items() if value is not None}
    options = [f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}" for name, value in given.items()]
    return [*options, *site.sbatch]


def _container_lines(site: Site, run_dir: RunDir, folder: Path, page: Path) -> list[str]:
    """Where the tasks run; they see folder, page and run at the same paths."""
    container = container_of(site.container, site.container_runtime, site.container_mounts)
    places = ((folder / page).absolute().parent, run_dir.path.absolute(), site.scratch or Path("/tmp"))
    return shell_lines(container, folder.absolute(), places, _variables(site))


def _variables(site: Site) -> dict[str, str]:
    """What the job exports; compile caches of a thousand ranks do not belong on the disk that all nodes share."""
    if site.scratch is None:
        return dict(site.environment)
    caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TORCH_EXTENSIONS_DIR": "extensions"}
    folders = {name: str(site.scratch / "sdtrain-cache" / folder) for name, folder in caches.items()}
    return {"TMPDIR": str(site.scratch), **folders, **site.environment}


def refuse_impossible(nodes: int, gpus_per_node: int, time: str, site: Site) -> None:
    """Refuse a job that this cluster can never start.

    Args:
        nodes: Number of nodes.
        gpus_per_node: GPUs of each.
        time: Time limit.
        site: Partition, and how long before the limit a job is told.

    Raises:
        ConfigError: Its partition does not exist, has too few nodes with that many GPUs, or ends jobs earlier.
    """
    groups = groups_of(site.partition)
    name = groups[0].partition
    fitting = sum(group.nodes for group in groups if group.gpus >= gpus_per_node)
    if fitting < nodes:
        listed = ", ".join(f"{group.nodes} with {group.gpus}" for group in groups)
        raise ConfigError(
            f"--nodes {nodes} --gpus-per-node {gpus_per_node}: partition {name} has {fitting} such nodes "
            f"(nodes with GPUs on each: {listed}); ask for less, or for another --partition"
        )
    limits = [group.limit_seconds for group in groups]
    wanted, limit = seconds_of(time), min((one for one in limits if one is not None), default=None)
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError(
            f"--time {time}: partition {name} ends jobs after {limit // 3600}:{limit // 60 % 60:02d}:00; ask for "
            "less, its work goes on in the next job"
        )
    if wanted is not None and wanted <= site.save_seconds:
        raise ConfigError(
            f"--time {time}: a job is told to leave {site.save_seconds} s before the limit (save_seconds of "
            "the site); ask for more"
        )


def refuse_node_local(path: Path, site: Site, mounts: str = "/proc/self/mounts", key: str = "run_dir") -> None:
    """Refuse a folder for output that other nodes would not see.

    Args:
        path: The folder, which need not be there.
        site: It names folders that are shared although they do not look it.
        mounts: Table of file systems.
        key: What the page calls the folder.

    Raises:
        ConfigError: It lies on a disk of this node.
    """
    there = (nearest_existing(path) or path).resolve()
    if any(there.is_relative_to(folder) for folder in site.shared_folders):
        return
    point, kind = _file_system_of(there, Path(mounts).read_text(encoding="utf-8"))
    if kind in NODE_LOCAL:
        raise ConfigError(
            f"{key} = {path}: lies on {point}, a disk of this node ({kind}) that other nodes do not see; give a "
            f"{key} on the file system that they share, or name the folder under shared_folders of the site's file "
            "if all nodes do see it"
        )


def _file_system_of(path: Path, mounts: str) -> tuple[Path, str]:
    """Mount point and type of the file system that holds a path."""
    rows = [line.split() for line in mounts.splitlines()]
    points = [(Path(row[1].replace("\\040", " ")), row[2]) for row in rows]
    holding = [(point, kind) for point, kind in points if path.is_relative_to(point)]
    return max(reversed(holding), key=lambda one: len(one[0].parts))  # of two at one place, the later hides the earlier
