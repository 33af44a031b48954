"""Section `data`: which samples, in what portions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import GetPydanticSchema
from pydantic_core import core_schema

from sdtrain.config.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


def _location(text: str) -> Path | str:
    return text if "://" in text else Path(text)


Location = Annotated[
    Path | str,
    GetPydanticSchema(
        lambda _, schema_of: core_schema.no_info_after_validator_function(
            _location, schema_of(str), serialization=core_schema.to_string_ser_schema()
        )
    ),
]
"""A file on this machine, or the URL of one on object storage, which is not touched: `Path` would cut its `//`."""


class DataConfig(Section):
    """Shards and batches.

    Attributes:
        manifest: The `manifest.json` that `sdtrain-data run` wrote; a file, or a URL of object storage (`s3://`,
            `gs://`, `az://`, ...) whose credentials and options are in the environment.
        batch_size: Samples in one optimiser step, over all ranks and accumulation.
        micro_batch_size: Samples in one forward-backward on one rank; accumulation follows from the number of ranks.
        num_workers: Reading processes of each rank; 0 reads in the training process. Never changes what is read.
        prefetch: Micro-batches that each worker prepares ahead.
        window_shards: Shards that are shuffled together; more mixes better and opens more files.
        read_retries: New looks at a shard that is away before its samples count as unreadable; they come after 0.1,
            0.2, 0.4 ... seconds, at most 10.
        cache_dir: Folder on the node's own disk through which shards of object storage are read; shared by all ranks.
        cache_gib: Most GiB that the cache may hold.
        ram_cache_gib: GiB of decoded samples that each reading process keeps in memory, for small data sets.
        max_bad_fraction: Share of unreadable samples above which the run stops.
    """

    manifest: Location
    batch_size: PositiveInt
    micro_batch_size: PositiveInt
    num_workers: NonNegativeInt = 2
    prefetch: PositiveInt = 4
    window_shards: PositiveInt = 16
    read_retries: NonNegativeInt = 6
    cache_dir: Path | None = None
    cache_gib: PositiveFloat = 64.0
    ram_cache_gib: NonNegativeFloat = 0.0
    max_bad_fraction: Fraction = 0.01
