"""Starts a new run from a checkpoint of another one: to fine-tune, to extend, or to go on at another resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sdtrain.checkpoints.manifest import Checkpoint, content_digest
from sdtrain.checkpoints.recut import Layout, kinds_of, layout_of
from sdtrain.checkpoints.weights import load_weights, read_buffers
from sdtrain.errors import CheckpointError
from sdtrain.training.engine import Engine
from sdtrain.training.state import buffers_of, restore

Load = Literal["weights", "ema", "all"]
SHOWN = 8


def ancestry(source: Checkpoint, load: Load) -> dict[str, Any]:
    """What ledger and manifests say of where a run was forked from."""
    return {
        "checkpoint": str(source.path.resolve()),
        "run": source.manifest.get("run", source.manifest["attempt"]),
        "step": source.step,
        "load": load,
        "manifest_sha256": content_digest(source.manifest),
    }


def take_over(source: Checkpoint, load: Load, engines: Mapping[str, Engine]) -> None:
    """Load a verified checkpoint of another run into fresh engines; collective.

    With `weights` and `ema` the averages begin at the loaded weights, and no update counts as applied; with `all`
    master, average, moments and the count of updates are taken over.

    Raises:
        CheckpointError: The checkpoint lacks something or does not fit; names the tensors.
    """
    for name, engine in engines.items():
        _refuse_misfits(source, name, engine)
        if load == "ema" and "ema" not in kinds_of(source, name):
            raise CheckpointError(
                f"{source.path}: holds no averaged weights of {name}, and init_from.load is 'ema'. Set it to 'weights'."
            )
    if load == "all":
        _refuse_other_groups(source, engines)
        restore(source, engines)
        return
    for name, engine in engines.items():
        tensors = load_weights(source, name, ema=load == "ema")
        engine.partitions.load({slot.name: tensors[slot.name] for slot in _slots(engine.partitions.layout)})
        if engine.ema is not None:
            engine.ema.restore(engine.partitions.masters())
        for key, buffer in buffers_of(engine).items():
            buffer.copy_(tensors[key])


def _slots(layout: Layout) -> list[Any]:
    return [slot for group in layout.groups for slot in group.slots]


def _refuse_misfits(source: Checkpoint, name: str, engine: Engine) -> None:
    """Every parameter and buffer must be there in the same shape, and nothing else."""
    there = {slot.name: slot.shape for slot in _slots(layout_of(source, name))}
    there |= {key: tuple(value.shape) for key, value in read_buffers(source, name).items()}
    here = {slot.name: slot.shape for slot in _slots(engine.partitions.layout)}
    here |= {key: tuple(value.shape) for key, value in buffers_of(engine).items()}
    odd = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if not odd:
        return
    listed = "\n".join(f"  {key}: {there.get(key, 'not there')} -> {here.get(key, 'not here')}" for key in odd[:SHOWN])
    more = f"\n  and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
    raise CheckpointError(
        f"{source.path}: {len(odd)} of {len(there.keys() | here.keys())} tensors of {name} do not fit this run "
        f"(checkpoint -> page):\n{listed}{more}\n"
        "Give this page the network of that run (see its config.yaml), or set init_from to null."
    )


def _refuse_other_groups(source: Checkpoint, engines: Mapping[str, Engine]) -> None:
    """The optimiser's state lies in groups; weights alone can be read out of any."""
    for name, engine in engines.items():
        if layout_of(source, name) != engine.partitions.layout:
            raise CheckpointError(
                f"{source.path}: the optimiser's groups of {name} are others than this run's, and init_from.load is "
                "'all'. Set optimizer.weight_decay_on as that run had it, or init_from.load to 'weights' or 'ema'."
            )
