"""What a run writes down of its surroundings: versions, git commit, machine, argv."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sdtrain import __version__, distributed

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors", "pydantic")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a run's bits."""
    found = {"sdtrain": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the source that runs, with `-dirty` where files differ; None outside a git checkout."""
    source = Path(__file__).resolve().parent
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def describe() -> dict[str, Any]:
    """Everything that `environment.json` and each checkpoint hold."""
    device = distributed.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "argv": sys.argv,
        "git_commit": git_commit(),
        "versions": versions(),
        "world_size": distributed.ranks().world_size,
        "device": name,
        "num_threads": torch.get_num_threads(),
    }
