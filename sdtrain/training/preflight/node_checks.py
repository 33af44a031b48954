"""The checks of one machine alone: software, GPUs, weights, data, room. None of them is collective."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import secrets
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.cuda import nccl

import sdtrain
from sdtrain.checkpoints.protocol import SPARE_BYTES, free_space
from sdtrain.config.run import TrainingConfig
from sdtrain.data.manifest import Manifest
from sdtrain.errors import SdtrainError
from sdtrain.run_dir import RunDir
from sdtrain.training import environment
from sdtrain.training.preflight import gpu_health
from sdtrain.training.preflight.findings import Finding
from sdtrain.training.preflight.node_speed import MATMUL_SIZE, Speed, measure

MIB, GIB = 2**20, 2**30
RUN_WARNING_BYTES = 32 * GIB
"""Two checkpoints of an 860M network with EMA (13.8 GB each) and its exports: less is refused or warned of exactly when
the networks are built, but a job of 64 nodes should hear of it before."""
RUN_WARNING_INODES = 10_000
"""A checkpoint has a file per rank and network, and logs, samples and W&B leave some thousands."""
SCRATCH_BYTES, SCRATCH_INODES = 256 * MIB, 1_000
"""What the ranks' own temporary files may need; below that libraries fail in odd places."""
SCRATCH_WARNING_BYTES = 5 * GIB
"""Compile caches of eight ranks and a core dump."""
SHM = Path("/dev/shm")
DEVICES = Path("/dev")
BYTES_PER_NUMBER = 4
"""Of a batch in the loader: float32 at most."""


def examine(config: TrainingConfig | None, ranks_here: int | None = None) -> list[Finding]:
    """Everything that is checked once per node.

    Args:
        config: The page; without one only the machine is looked at.
        ranks_here: Ranks of this node; None where nobody has said how many there will be.
    """
    checks: list[tuple[str, Callable[[], Finding], bool]] = [
        ("versions", check_versions, True),
        ("gpus", lambda: check_gpus(ranks_here), True),
        ("driver", check_driver, True),
        ("scratch", check_scratch, True),
    ]
    if config is not None:
        manifest: list[Manifest] = []
        checks += [
            ("precision", lambda: check_precision(config), True),
            ("weights", lambda: check_weights(config), False),
            ("manifest", lambda: check_manifest(config, manifest), False),
            ("run folder", lambda: check_run_folder(RunDir(config.resolved_run_dir)), False),
            ("shared memory", lambda: check_shared_memory(config, manifest, ranks_here or 1), True),
        ]
    return [guarded(name, check, of_node=of_node) for name, check, of_node in checks]


def guarded(name: str, check: Callable[[], Finding], *, of_node: bool) -> Finding:
    """A check's finding; what it cannot even look at has failed, in the error's own words."""
    try:
        return check()
    except (SdtrainError, OSError, RuntimeError) as error:
        said = str(error) or type(error).__name__
        return Finding(name, "failed", said, of_node=of_node)


# Software and GPUs ----------------------------------------------------------------------------------------------------


def software() -> dict[str, str]:
    """Versions of everything that must be the same on all nodes, and a digest of our own source."""
    found = environment.versions() | {"source": source_digest(), "cuda": torch.version.cuda or "none"}
    if torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(str(part) for part in nccl.version())
    return found


def source_digest(folder: Path | None = None) -> str:
    """Twelve digits of a digest of the package's Python files, which tell two states of one version apart.

    Args:
        folder: Of the package; ours by default.
    """
    folder = folder or Path(sdtrain.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_versions() -> Finding:
    """All that training imports is installed."""
    found = software()
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    if "deepspeed" not in found:
        return Finding(
            "versions", "failed", f"deepspeed is not installed ({told})", "pip install 'sdtrain[train]'", of_node=True
        )
    return Finding("versions", "ok", told)


def check_gpus(ranks_here: int | None) -> Finding:
    """A GPU for every rank, seen by torch."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return _without_gpu()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    told = f"{count} visible: {names}"
    if ranks_here is None or count == ranks_here:
        return Finding("gpus", "ok", told)
    if count > ranks_here:
        return Finding("gpus", "warning", f"{told}; {count - ranks_here} of them have no rank", "start a rank for each")
    return Finding(
        "gpus",
        "failed",
        f"{told}; this node has {ranks_here} ranks",
        "every task must see all GPUs of its node (--gpus-per-node, not --gpus-per-task); else look at nvidia-smi and "
        "CUDA_VISIBLE_DEVICES there",
        of_node=True,
    )


def _without_gpu() -> Finding:
    devices = sorted(path.name for path in DEVICES.glob("nvidia[0-9]*"))
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return Finding("gpus", "ok", "none is asked for (DS_ACCELERATOR=cpu)")
    if devices:
        return Finding(
            "gpus",
            "failed",
            f"torch sees none, and the node has {', '.join(devices)}",
            "look at nvidia-smi there: the driver may be older than this torch needs, or CUDA_VISIBLE_DEVICES is empty",
            of_node=True,
        )
    return Finding("gpus", "warning", "none: training runs on the CPU", "set DS_ACCELERATOR=cpu if this is meant")


def check_driver() -> Finding:
    """What nvidia-smi knows of memory errors and of GPUs that want a reset."""
    report = gpu_health.query()
    if report is None:
        return Finding("driver", "ok", "no nvidia-smi here")
    gpus = gpu_health.parse(report)
    sick = [f"GPU {index}: {words}" for index, gpu in enumerate(gpus) for words in gpu.sick]
    if sick:
        return Finding("driver", "failed", "; ".join(sick), "drain the node and reset the GPU", of_node=True)
    strained = [f"GPU {index}: {words}" for index, gpu in enumerate(gpus) for words in gpu.strained]
    if strained:
        return Finding("driver", "warning", "; ".join(strained), "have the node's cooling and power looked at")
    drivers = ", ".join(sorted({gpu.driver for gpu in gpus})) or "none"
    return Finding("driver", "ok", f"{len(gpus)} GPUs without memory errors, driver {drivers}")


def check_precision(config: TrainingConfig) -> Finding:
    """The page's working precision is one that the GPUs have."""
    wanted = config.trainer.precision
    if wanted == "bf16" and torch.cuda.is_available():
        without = [index for index in range(torch.cuda.device_count()) if not _has_bf16(index)]
        if without:
            name = torch.cuda.get_device_name(without[0])
            return Finding(
                "precision",
                "failed",
                f"trainer.precision = bf16, and {name} cannot compute in it",
                "give trainer.precision=fp16",
            )
    return Finding("precision", "ok", f"trainer.precision = {wanted}")


def _has_bf16(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)  # Ampere; torch emulates it on older ones, slowly


def examine_device(device: torch.device) -> tuple[Finding, Speed | None]:
    """Compute on a rank's own device: a product with a known result, and how quick it is."""
    speed: Speed | None = None

    def check() -> Finding:
        nonlocal speed
        speed = measure(device)
        if not speed.is_right:
            size = MATMUL_SIZE[device.type]
            return Finding(
                "computing",
                "failed",
                f"{device}: a product of two {size} x {size} matrices of small integers is wrong",
                "take the node out of service: this GPU or CPU computes wrong numbers",
                of_node=True,
            )
        return Finding("computing", "ok", f"{device.type}: products right, {speed.matmul_seconds * 1e3:.2f} ms each")

    return guarded("computing", check, of_node=True), speed


# Weights and data -----------------------------------------------------------------------------------------------------


def check_weights(config: TrainingConfig) -> Finding:
    """Pretrained weights that the page names are there and whole, or on a hub that answers; none is loaded."""
    from sdtrain import build
    from sdtrain.nn.folders import look_for

    places, problems = [], []
    for key, source, part, file in build.pretrained(config):
        try:
            places.append(f"{key} = {source} ({look_for(source, part=part, weights_file=file)})")
        except SdtrainError as error:
            problems.append(f"{key}: {error}")
    if problems:
        return Finding("weights", "failed", "; ".join(problems))
    return Finding("weights", "ok", ", ".join(places) or "the page names none")


def check_manifest(config: TrainingConfig, keep: list[Manifest]) -> Finding:
    """The data set's list is whole and fits the page, and its first and last shards are where it says.

    Args:
        config: The page.
        keep: Receives the manifest, for a check that needs it.

    Raises:
        SdtrainError: It cannot be used.
    """
    from sdtrain import build

    manifest = build.load_manifest(config.data)
    keep.append(manifest)
    build.check_manifest(config, manifest)
    shards = manifest.split("train")
    told = f"{manifest.path}: {manifest.num_samples('train')} samples in {len(shards)} shards"
    if not isinstance(manifest.path, Path):
        return Finding("manifest", "ok", told)
    for shard in (shards[0], shards[-1]):
        path = manifest.folder / shard.path
        size = path.stat().st_size
        if size != shard.size_bytes:
            return Finding(
                "manifest",
                "failed",
                f"{path}: has {size} bytes, its manifest says {shard.size_bytes}",
                f"copy the data set again, or see what is damaged: sdtrain-data verify {manifest.path}",
            )
    return Finding("manifest", "ok", told)


# Room -----------------------------------------------------------------------------------------------------------------


def check_run_folder(run: RunDir) -> Finding:
    """The run's folder is one, can be written to, and has room.

    Raises:
        SdtrainError: It is no run's folder or cannot be written to.
    """
    run.refuse_unusable()
    free_bytes, free_inodes = free_space(run.checkpoints)
    told = f"{run.path}: {_room(free_bytes, free_inodes)}"
    advice = "free some space, or give another run_dir"
    if free_bytes < SPARE_BYTES or free_inodes < 8:
        return Finding("run folder", "failed", told, advice)
    if free_bytes < RUN_WARNING_BYTES or free_inodes < RUN_WARNING_INODES:
        return Finding("run folder", "warning", told, f"{advice}, if checkpoints are large")
    return Finding("run folder", "ok", told)


def check_scratch() -> Finding:
    """Temporary files have a folder of their own node, with room; `TMPDIR` names it."""
    folder = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    name = f"TMPDIR = {folder}" if os.environ.get("TMPDIR") else str(folder)
    try:
        probe = folder / f".sdtrain-{secrets.token_hex(6)}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        return Finding(
            "scratch",
            "failed",
            f"{name}: cannot be written to: {error.strerror}",
            "make the folder on this node, or set another (scratch of the site's file, or TMPDIR)",
            of_node=True,
        )
    free_bytes, free_inodes = free_space(folder)
    told = f"{name}: {_room(free_bytes, free_inodes)}"
    if free_bytes < SCRATCH_BYTES or free_inodes < SCRATCH_INODES:
        return Finding("scratch", "failed", told, "remove what earlier jobs left there", of_node=True)
    if free_bytes < SCRATCH_WARNING_BYTES:
        return Finding("scratch", "warning", told, "compile caches may not fit: remove what earlier jobs left there")
    return Finding("scratch", "ok", told)


def check_shared_memory(config: TrainingConfig, known: Sequence[Manifest], ranks_here: int, shm: Path = SHM) -> Finding:
    """What data workers hand to their ranks fits into shared memory, where they pass it.

    Args:
        config: The page.
        known: Its manifest, if it could be read.
        ranks_here: Ranks of this node.
        shm: Folder of shared memory.
    """
    from sdtrain import build

    free_bytes, _ = free_space(shm)
    told = f"{shm}: {_gib(free_bytes)} free"
    workers = config.data.num_workers
    if workers == 0 or not known:
        return Finding("shared memory", "ok", f"{told}; {'no data workers' if known else 'no manifest to reckon with'}")
    numbers = sum(math.prod(build.field_shape(known[0], name)) for name in build.fields_of(config))
    batch = 2 * BYTES_PER_NUMBER * numbers * config.data.micro_batch_size  # with as much noise as data
    needed = ranks_here * workers * (config.data.prefetch + 1) * batch
    if free_bytes < needed:
        return Finding(
            "shared memory",
            "failed",
            f"{told}, and {_gib(needed)} may be needed by {ranks_here} ranks x {workers} workers x "
            f"{config.data.prefetch + 1} micro-batches",
            "give the container more (--shm-size), or lower data.num_workers or data.prefetch",
            of_node=True,
        )
    return Finding("shared memory", "ok", f"{told}, at most {_gib(needed)} needed by data workers")


def _room(free_bytes: float, free_inodes: float) -> str:
    inodes = "" if math.isinf(free_inodes) else f", {free_inodes:,.0f} inodes"
    return f"{_gib(free_bytes)}{inodes} free"


def _gib(size: float) -> str:
    if math.isinf(size):
        return "unlimited room"
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / MIB:,.1f} MiB"


def machine() -> str:
    """What this node computes on, for comparison with others."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"CPU {platform.machine()}"
