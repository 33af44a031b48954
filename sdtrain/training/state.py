"""A run's state as checkpoint files, and back at any world size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sdtrain import distributed
from sdtrain.checkpoints.manifest import Checkpoint, buffer_key, rank_file
from sdtrain.checkpoints.recut import KINDS, layout_of, read_span, tensor_name
from sdtrain.checkpoints.weights import read_buffers
from sdtrain.errors import CheckpointError
from sdtrain.training.engine import Engine

MASTER_BYTES = 4
"""Of an element of any of `KINDS`: all are fp32."""


def rank_files(engines: Mapping[str, Engine]) -> dict[str, dict[str, Tensor]]:
    """Everything that this rank writes: one file per trainable, and one of buffers."""
    rank = distributed.ranks().rank
    files = {rank_file(name, rank): engine.tensors() for name, engine in engines.items()}
    extra = {
        buffer_key(name, key): value for name, engine in engines.items() for key, value in buffers_of(engine).items()
    }
    return files | {rank_file("extra", rank): extra}


def expected_bytes(trained: nn.Module, *, has_ema: bool) -> int:
    """About how many bytes all ranks together write of a trainable per checkpoint, known before there is an engine."""
    kinds = len(KINDS) if has_ema else len(KINDS) - 1
    parameters = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    return parameters * kinds * MASTER_BYTES + sum(buffer.nbytes for buffer in trained.buffers())


def state_facts(engines: Mapping[str, Engine]) -> dict[str, Any]:
    """What the checkpoint's manifest says of the state; collective, because every rank names its spans."""
    spans = distributed.gather_objects({name: engine.partitions.spans for name, engine in engines.items()})
    return {
        "applied_steps": {name: engine.applied_steps for name, engine in engines.items()},
        "layouts": {name: engine.partitions.layout.to_json() for name, engine in engines.items()},
        "spans": {name: [rank[name] for rank in spans] for name in engines},
        "has_ema": {name: engine.ema is not None for name, engine in engines.items()},
        "scalers": {name: engine.scaler_state() for name, engine in engines.items()},
    }


def restore(checkpoint: Checkpoint, engines: Mapping[str, Engine]) -> None:
    """Load a verified checkpoint into the engines, re-cut to this world size; collective.

    Raises:
        CheckpointError: The checkpoint holds other trainables or other parameters than this run.
    """
    facts = checkpoint.manifest
    _check_layouts(checkpoint, engines)
    for name, engine in engines.items():
        kinds = [kind for kind in KINDS if kind != "ema" or engine.ema is not None]
        if engine.ema is not None and not facts["has_ema"][name]:
            raise CheckpointError(
                f"{checkpoint.path}: holds no EMA of {name}, but this run keeps one (section ema). Set `ema: null`, or "
                "start a new run from these weights."
            )
        read = {
            tensor_name(group, kind): read_span(checkpoint, name, group, kind, start, stop)
            for group, (start, stop) in enumerate(engine.partitions.spans)
            for kind in kinds
        }
        scaler = facts["scalers"][name] if engine.scaler_state() else {}  # a fork may have another precision
        engine.restore(read, applied_steps=facts["applied_steps"][name], scaler=scaler)
    _restore_buffers(checkpoint, engines)


def _check_layouts(checkpoint: Checkpoint, engines: Mapping[str, Engine]) -> None:
    saved = checkpoint.manifest["layouts"]
    if saved.keys() != engines.keys():
        raise CheckpointError(f"{checkpoint.path}: holds {sorted(saved)}, this run trains {sorted(engines)}")
    for name, engine in engines.items():
        theirs, mine = layout_of(checkpoint, name), engine.partitions.layout
        if theirs == mine:
            continue
        old = {slot.name: slot for group in theirs.groups for slot in group.slots}
        new = {slot.name: slot for group in mine.groups for slot in group.slots}
        odd = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        raise CheckpointError(
            f"{checkpoint.path}: the parameters of {name} are laid out differently, first {odd[:5] or 'their groups'}. "
            "The network or optimizer.weight_decay_on changed: start a new run from these weights instead of resuming."
        )


def buffers_of(engine: Engine) -> dict[str, Tensor]:
    """What a module keeps beside its parameters, by name."""
    parameters = {name for name, _ in engine.module.named_parameters()}
    return {name: value for name, value in engine.module.state_dict().items() if name not in parameters}


def _restore_buffers(checkpoint: Checkpoint, engines: Mapping[str, Engine]) -> None:
    """A rank's own buffers at the same world size, rank 0's at another one."""
    place = distributed.ranks()
    source = place.rank if checkpoint.world_size == place.world_size else 0
    for name, engine in engines.items():
        saved = read_buffers(checkpoint, name, rank=source)
        for key, buffer in buffers_of(engine).items():
            buffer.copy_(saved[key])
