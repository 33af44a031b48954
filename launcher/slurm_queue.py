"""What Slurm's own commands say of its partitions and jobs, and what they are asked to do."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from sdtrain.config.problems import nearest
from sdtrain.errors import ConfigError

TIMEOUT_SECONDS = 60
_LIMIT = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
_GPUS = re.compile(r"\bgpu(?::[^:,()]+)?:(\d+)")
_EXCLUDED = re.compile(r"\bExcNodeList=(\S+)")
_UNUSABLE = re.compile(r"down|drain|fail|maint|power_?down|unknown|future|.*\*$")  # `*`: does not answer
ENDED = frozenset({"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE"})


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Nodes of one partition that are alike.

    Attributes:
        partition: Its name.
        is_default: Whether jobs that name no partition run here.
        nodes: How many of them.
        gpus: On each.
        limit_seconds: Longest job; None without limit.
    """

    partition: str
    is_default: bool
    nodes: int
    gpus: int
    limit_seconds: int | None


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """How the scheduler sees a job.

    Attributes:
        state: `PENDING`, `RUNNING`, ...
        reason: Why it waits or has ended; `None` in words where there is no reason.
        elapsed: Time since its last start.
        limit: Its time limit.
        nodes: Names of its nodes; empty while it waits.
        starts_at: When it will start, or did.
    """

    state: str
    reason: str
    elapsed: str
    limit: str
    nodes: str
    starts_at: str

    @property
    def is_over(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in ENDED


def ask(*command: str, stdin: str | None = None) -> str:
    """Standard output of one of Slurm's commands.

    Raises:
        ConfigError: It is not installed here, did not answer, or refused; with its own words.
    """
    name = command[0]
    if shutil.which(name) is None:
        raise ConfigError(
            f"{name} is not there: run this on a login node of a Slurm cluster, or see the job with --dry-run; to try "
            'it without a cluster: eval "$(slurm/local_cluster/start.sh)"'
        )
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{name} did not answer within {TIMEOUT_SECONDS} s; is slurmctld up (scontrol ping)?"
        ) from None
    if done.returncode != 0:
        words = done.stderr.strip() or done.stdout.strip() or f"it returned {done.returncode}"
        raise ConfigError(f"{' '.join(command)} failed: {words}")
    return done.stdout


def seconds_of(limit: str) -> int | None:
    """A time limit in Slurm's own spellings, in seconds; None for `infinite`.

    Raises:
        ValueError: It is none.
    """
    if limit.lower() in ("infinite", "unlimited"):
        return None
    match = _LIMIT.fullmatch(limit)
    if match is None:
        raise ValueError(limit)
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    minutes, seconds = (*parts, 0)[:2]  # minutes[:seconds]
    return minutes * 60 + seconds


def node_groups() -> list[NodeGroup]:
    """All nodes, grouped by partition and likeness.

    Raises:
        ConfigError: sinfo does not answer.
    """
    groups = []
    for line in ask("sinfo", "--noheader", "--format=%P|%D|%G|%l").splitlines():
        name, nodes, gres, limit = line.strip().split("|")
        groups.append(NodeGroup(name.rstrip("*"), name.endswith("*"), int(nodes), _gpus_of(gres), seconds_of(limit)))
    return groups


def _gpus_of(gres: str) -> int:
    return sum(int(count) for count in _GPUS.findall(gres))


def usable_nodes(partition: str, gpus: int) -> list[str]:
    """Names of a partition's nodes with that many GPUs, busy or not, that the scheduler gives to jobs.

    Raises:
        ConfigError: sinfo does not answer.
    """
    rows = ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%G|%T").splitlines()
    found = [row.strip().split("|") for row in rows]
    return [name for name, gres, state in found if _gpus_of(gres) >= gpus and not _UNUSABLE.match(state)]


def host_names(nodes: str) -> list[str]:
    """The names in one of Slurm's lists, such as `n[1-3,7]`.

    Raises:
        ConfigError: scontrol does not answer.
    """
    return ask("scontrol", "show", "hostnames", nodes).split() if nodes else []


def excluded_nodes(job: str) -> str:
    """The nodes that a job must not run on, as Slurm's list; empty where there are none.

    Raises:
        ConfigError: scontrol does not answer, or knows no such job.
    """
    match = _EXCLUDED.search(ask("scontrol", "show", "job", job))
    return "" if match is None or match[1] == "(null)" else match[1]


def groups_of(partition: str | None) -> list[NodeGroup]:
    """The nodes of a partition; of the default one where none is named.

    Raises:
        ConfigError: There is no such partition; names those there are.
    """
    groups = node_groups()
    found = [group for group in groups if group.partition == partition or (partition is None and group.is_default)]
    if found:
        return found
    names = sorted({group.partition for group in groups})
    if partition is None:
        raise ConfigError(f"the cluster has no default partition; give --partition, one of {', '.join(names)}")
    meant = nearest(partition, names)
    hint = f"; did you mean {meant}?" if meant else ""
    raise ConfigError(f"--partition {partition}: the cluster has no such partition, only {', '.join(names)}{hint}")


def find_job(job: str) -> QueuedJob | None:
    """A job that waits, runs, or ended a short while ago; from accounting later. None where nobody knows it."""
    return _in_queue(job) or _in_accounting(job)


def _in_queue(job: str) -> QueuedJob | None:
    try:
        found = ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r|%M|%l|%N|%S").splitlines()
    except ConfigError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return QueuedJob(*found[0].strip().split("|", 5)) if found else None


def _in_accounting(job: str) -> QueuedJob | None:
    fields = "State,Reason,Elapsed,Timelimit,NodeList,Start"
    try:
        found = ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", f"--format={fields}")
    except ConfigError:  # a cluster need not keep accounts
        return None
    rows = found.splitlines()
    if not rows:
        return None
    state, *rest = rows[-1].split("|", 5)
    return QueuedJob(state.split()[0], *rest)  # `CANCELLED by 1000`


def requeue(job: str, *, delay_seconds: int = 0, exclude: Sequence[str] = ()) -> None:
    """Let the running job that this process belongs to be started again.

    Args:
        job: Its number.
        delay_seconds: How long it waits at least; 0 leaves that to the scheduler.
        exclude: Nodes that it must not run on from now on, beside those that it must not run on already.

    Raises:
        ConfigError: The scheduler refuses; with its words.
    """
    if delay_seconds > 0 or exclude:  # a requeued job's processes are told to end, this one has more to say
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    without = ",".join([*filter(None, [excluded_nodes(job)]), *exclude]) if exclude else ""
    ask("scontrol", "requeue", job)
    if exclude:  # refused while the job runs; a requeued one waits at least as long as credentials live
        ask("scontrol", "update", f"jobid={job}", f"ExcNodeList={without}")
    if delay_seconds > 0:
        ask("scontrol", "update", f"jobid={job}", f"StartTime=now+{delay_seconds}")


def cancel(job: str) -> None:
    """End a job, or take it out of the queue.

    Raises:
        ConfigError: The scheduler refuses; with its words.
    """
    ask("scancel", job)


def submit(script: str, arguments: Sequence[str] = ()) -> str:
    """Submit a batch script; returns the job's number.

    Raises:
        ConfigError: The scheduler refuses; with its words.
    """
    return ask("sbatch", "--parsable", *arguments, stdin=script).strip().split(";")[0]
