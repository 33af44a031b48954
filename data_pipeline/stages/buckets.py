"""Stages `buckets-sort` and `buckets`: shards of pictures of one size each, where the download keeps several sizes.

1. `buckets-sort`: for each image shard a list of which of its samples have which size.
2. `buckets`: numbered shards of `samples_per_shard` pictures, each of one split and one size: train before validation,
   sizes in the order of their names, samples in the order of the image shards; the last shard of a size may be smaller.

A shard of one size is what all later stages want: an autoencoder meets one shape for a whole shard, and a manifest says
of each shard which bucket it is. Which samples share a shard follows from the image shards alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.stage import Needs, Stage, Unit, Work, numbered_files, one_to_one
from sdtrain.data.shard import ShardReader, ShardWriter
from sdtrain.errors import DataError

_PLACES = ".places.json"
_STATS = ".stats.json"


def bucket_stages(images: Path, sorted_places: Path, folder: Path, samples_per_shard: int) -> list[Stage]:
    """Both stages.

    Args:
        images: Folder of the image shards.
        sorted_places: Where the lists go.
        folder: Where the shards of one size go.
        samples_per_shard: Samples in one of them.
    """
    return [BucketSortStage(images, sorted_places), BucketStage(images, sorted_places, samples_per_shard, folder)]


def bucket_of(facts: Mapping[str, Any], source: str) -> str:
    """Name of a sample's bucket, `WIDTHxHEIGHT` in pixels of the stored picture.

    Args:
        facts: The sample's `json`.
        source: What messages call the sample.

    Raises:
        DataError: The facts do not say the size.
    """
    size = facts.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise DataError(
            f"{source}: its json has size {size!r}, expected [width, height] in pixels, by which pictures are put into "
            "buckets; run the stage that stores the pictures again"
        )
    return f"{size[0]}x{size[1]}"


@dataclass(frozen=True)
class BucketSortStage:
    """Pass 1: one list for each image shard, `{"split": ..., "buckets": {"640x448": [0, 3, ...], ...}}`.

    Attributes:
        source: Folder of the image shards.
        folder: Where the lists go.
    """

    source: Path
    folder: Path
    name: str = "buckets-sort"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """Nothing: sizes are what the pictures have."""
        return {}

    def units(self) -> list[Unit]:
        """One for each image shard."""
        return one_to_one(self.source, ".tar")

    def worker(self) -> Work:
        """Read what each sample says of its size."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            split, places = _places_of(unit.inputs[0])
            text = json.dumps({"split": split, "buckets": places}, sort_keys=True, separators=(",", ":"))
            (folder / f"{unit.name}{_PLACES}").write_text(text + "\n", encoding="utf-8")
            return {"split": split, "buckets": {bucket: len(found) for bucket, found in sorted(places.items())}}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> None:
        """The shards tell it."""


def _places_of(path: Path) -> tuple[str | None, dict[str, list[int]]]:
    """Split of an image shard, None without samples, and the places of its samples by bucket.

    Raises:
        DataError: A sample does not say its size, or the shard mixes splits.
    """
    splits, places = set(), dict[str, list[int]]()
    with ShardReader(path) as reader:
        for sample, key in enumerate(reader.keys):
            facts = reader.decode(sample, "json")
            splits.add(str(facts.get("split")))
            places.setdefault(bucket_of(facts, f"{path}: sample {key!r}"), []).append(sample)
    if len(splits) > 1:
        raise DataError(f"{path}: holds splits {sorted(splits)}; a shard belongs to exactly one")
    return next(iter(splits), None), places


class Span(NamedTuple):
    """Consecutive samples of one bucket in one image shard: from the `first`-th of them on, `length` in all."""

    shard: int
    first: int
    length: int


@dataclass(frozen=True)
class BucketStage:
    """Pass 2: numbered shards of one split and one size each; what is stored of a sample is copied as it is.

    Attributes:
        images: Folder of the image shards.
        places: Folder of the lists of pass 1.
        samples_per_shard: Samples in one shard.
        folder: Where the shards go.
    """

    images: Path
    places: Path
    samples_per_shard: int
    folder: Path
    name: str = "buckets"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """Nothing beyond each unit's slices."""
        return {}

    def units(self) -> list[Unit]:
        """One for each shard to be written.

        Raises:
            DataError: There is no sample at all.
        """
        lists = numbered_files(self.places, _PLACES)
        groups: dict[tuple[str, str], list[Span]] = {}
        for number, path in enumerate(lists):
            stats = json.loads(path.with_name(path.name.replace(_PLACES, _STATS)).read_text(encoding="utf-8"))
            for bucket, count in stats["buckets"].items():
                groups.setdefault((stats["split"], bucket), []).append(Span(number, 0, count))
        units: list[Unit] = []
        for split, bucket in sorted(groups):
            for spans in cut(groups[split, bucket], self.samples_per_shard):
                units.append(self._unit(len(units), split, bucket, spans, lists))
        if not units:
            raise DataError(f"{self.images}: not one of {len(lists)} shards holds a sample; see summary.json there")
        return units

    def _unit(self, index: int, split: str, bucket: str, spans: Sequence[Span], lists: Sequence[Path]) -> Unit:
        places = [lists[span.shard] for span in spans]
        tars = [self.images / path.name.replace(_PLACES, ".tar") for path in places]
        slices = [[span.first, span.length] for span in spans]
        return Unit(index, (*tars, *places), {"split": split, "bucket": bucket, "slices": slices})

    def worker(self) -> Work:
        """Copy the samples of one shard."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            slices, bucket = unit.facts["slices"], unit.facts["bucket"]
            tars, lists = unit.inputs[: len(slices)], unit.inputs[len(slices) :]
            with ShardWriter(folder / f"{unit.name}.tar") as writer:
                for tar, places, (start, count) in zip(tars, lists, slices, strict=True):
                    found = json.loads(places.read_text(encoding="utf-8"))["buckets"][bucket]
                    _copy(tar, found[start : start + count], writer)
            return {"split": unit.facts["split"], "bucket": bucket, "stored": sum(count for _, count in slices)}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """Samples and shards of each bucket."""
        samples, shards = Counter[str](), Counter[str]()
        for row in stats:
            samples[row["bucket"]] += row["stored"]
            shards[row["bucket"]] += 1
        words = [f"{bucket}: {count:,} in {shards[bucket]}" for bucket, count in sorted(samples.items())]
        return f"buckets: {samples.total():,} samples in {shards.total():,} shards of one size each; {', '.join(words)}"


def _copy(tar: Path, places: Sequence[int], writer: ShardWriter) -> None:
    with ShardReader(tar) as reader:
        for sample in places:
            writer.write(reader.keys[sample], {name: reader.read(sample, name) for name in reader.fields})


def cut(spans: Sequence[Span], size: int) -> Iterator[list[Span]]:
    """Cut consecutive spans into groups of `size` samples; the last may be smaller."""
    group: list[Span] = []
    room = size
    for shard, first, length in spans:
        while length > 0:
            taken = min(length, room)
            group.append(Span(shard, first, taken))
            first, length, room = first + taken, length - taken, room - taken
            if room == 0:
                yield group
                group, room = [], size
    if group:
        yield group
