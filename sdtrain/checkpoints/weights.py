"""Reads a run's weights for sampling, evaluation and export: no process group, no DeepSpeed, no GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sdtrain.checkpoints.manifest import MANIFEST, Checkpoint, buffer_key, list_checkpoints, rank_file
from sdtrain.checkpoints.protocol import verify
from sdtrain.checkpoints.recut import assemble, kinds_of
from sdtrain.config.load import load_training
from sdtrain.config.run import TrainingConfig
from sdtrain.errors import CheckpointError

log = logging.getLogger(__name__)

CONFIG = "config.yaml"


def open_checkpoint(path: Path, *, check: Callable[[Checkpoint], list[str]] = verify) -> Checkpoint:
    """The checkpoint that `path` means: itself, or the newest valid one of a run folder.

    Args:
        path: A checkpoint folder, a run folder, or a run's `checkpoints` folder.
        check: Says what is wrong with one; ranks that open together give `verify_together`.

    Raises:
        CheckpointError: There is none, or none (not the named one) verifies.
    """
    if (path / MANIFEST).exists():
        candidates = [Checkpoint.open(path)]
    else:
        candidates = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not candidates:
        raise CheckpointError(
            f"{path}: holds no checkpoint; give a run folder or one of its checkpoints/step-* folders"
        )
    refused: list[str] = []
    for checkpoint in candidates:
        problems = check(checkpoint)
        if not problems:
            return checkpoint
        log.warning("%s is corrupt and not used: %s", checkpoint.path, "; ".join(problems))
        refused.append(f"  {checkpoint.path.name}: {'; '.join(problems)}")
    raise CheckpointError(f"{path}: no checkpoint is valid:\n" + "\n".join(refused))


def load_weights(
    path: Path | Checkpoint, trainable: str, *, ema: bool = True, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Parameters and buffers of a trainable by name, as its module's `load_state_dict` wants them, on the CPU.

    Args:
        path: See `open_checkpoint`; one that is open already is not verified again.
        trainable: Its name, such as `denoiser`.
        ema: Take the EMA weights; where the run keeps none, the master weights, with a warning.
        dtype: Cast floating-point tensors; None keeps parameters float32 and buffers as they were.

    Raises:
        CheckpointError: No valid checkpoint, or it holds no such trainable.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    kind = "ema" if ema else "master"
    if ema and "ema" not in kinds_of(checkpoint, trainable):
        log.warning("%s holds no EMA weights of %s: its last weights are taken", checkpoint.path, trainable)
        kind = "master"
    tensors = assemble(checkpoint, trainable, kind) | read_buffers(checkpoint, trainable)
    return {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }


def read_buffers(checkpoint: Checkpoint, trainable: str, *, rank: int = 0) -> dict[str, Tensor]:
    """Buffers of a trainable by name, as `rank` saved them; empty if it saved none."""
    path = checkpoint.path / rank_file("extra", rank)
    prefix = buffer_key(trainable, "")
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        names = filter(lambda name: name.startswith(prefix), file.keys())
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def read_config(path: Path | Checkpoint) -> TrainingConfig:
    """The resolved configuration that a checkpoint was trained with.

    Raises:
        CheckpointError: No valid checkpoint, or it holds no configuration.
        ConfigError: The configuration does not load with this version.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    if CONFIG not in checkpoint.files:
        raise CheckpointError(f"{checkpoint.path}: holds no {CONFIG}; it was not written by `sdtrain train`")
    return load_training(checkpoint.path / CONFIG)
