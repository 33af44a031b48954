"""The last thing that a run does: its averaged weights in diffusers' layout."""

from __future__ import annotations

from sdtrain import distributed
from sdtrain.build import load_manifest
from sdtrain.checkpoints.manifest import list_checkpoints
from sdtrain.config.run import TrainingConfig
from sdtrain.config.task import AutoencodingTask
from sdtrain.export.diffusers import export
from sdtrain.run_dir import RunDir


def export_weights(config: TrainingConfig, run: RunDir) -> None:
    """Write the newest checkpoint's weights to `weights/step-N` of the run folder; collective, rank 0 writes.

    An autoencoder's scaling factor is measured on its own training images where the page gives none, and stored with
    the weights, so that nobody has to retype it.
    """
    if distributed.ranks().is_main:
        newest = next(checkpoint for checkpoint in list_checkpoints(run.checkpoints) if not checkpoint.damage)
        target = run.weights / newest.path.name
        if not target.exists():
            measured = isinstance(config.task, AutoencodingTask) and config.autoencoder.scaling_factor is None
            export(newest.path, target, scale_manifest=load_manifest(config.data) if measured else None)
        print(f"weights: {target}", flush=True)
    distributed.barrier()
