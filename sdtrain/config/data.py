"""Section `data`: which samples, in what portions."""

from __future__ import annotations

from pathlib import Path

from sdtrain.config.base import Fraction, NonNegativeInt, PositiveInt, Section


class DataConfig(Section):
    """Shards and batches.

    Attributes:
        manifest: The `manifest.json` that `sdtrain-data run` wrote.
        batch_size: Samples in one optimiser step, over all ranks and accumulation.
        micro_batch_size: Samples in one forward-backward on one rank; accumulation follows from the number of ranks.
        num_workers: Reading processes of each rank; 0 reads in the training process. Never changes what is read.
        prefetch: Micro-batches that each worker prepares ahead.
        window_shards: Shards that are shuffled together; more mixes better and opens more files.
        read_retries: New looks at a shard that is away before its samples count as unreadable; they come after 0.1,
            0.2, 0.4 ... seconds, at most 10.
        max_bad_fraction: Share of unreadable samples above which the run stops.
    """

    manifest: Path
    batch_size: PositiveInt
    micro_batch_size: PositiveInt
    num_workers: NonNegativeInt = 2
    prefetch: PositiveInt = 4
    window_shards: PositiveInt = 16
    read_retries: NonNegativeInt = 6
    max_bad_fraction: Fraction = 0.01
