"""Stage `content-dedup`: pictures that are the same whatever their URLs, and pictures of an evaluation set.

Passes over numbers, a stage each, so that memory stays bounded and any number of workers gives the same bytes:

1. `content-dedup-hash`: sha256 and perceptual hash of each picture, shard by shard.
2. `content-dedup-exclude`: the hashes of what must not be trained on, where `exclude` names any.
3. `content-dedup-gather`: the hashes of a thousand shards in one file; what is excluded loses its hashes.
4. By bytes: `content-dedup-split` and `content-dedup-pick`, the passes of the URL dedup. Perceptually:
   `content-dedup-near`, the pairs within the radius, found by bands (`data_pipeline.perceptual`).
5. `content-dedup-group`: who is kept. In the order of shards and rows a picture is dropped if one that is kept before
   it is its duplicate. So each one dropped is within the radius of the one that stands for it, no two that are kept
   are, and training rows, which come first, win over the validation split.
6. `content-dedup`: the verdicts of each shard, with group and size of the group; `select` then leaves pictures out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.perceptual import Hashes, band_masks, hash_of_file, hash_text, pairs_within
from data_pipeline.stage import Needs, Stage, Unit, Work, numbered_files, one_to_one
from data_pipeline.stages.content_exclude import ExcludeStage, exclusions
from data_pipeline.stages.dedup import PickStage, SplitStage
from data_pipeline.stages.identity import HashIdentity, mixed
from sdtrain.config.curation import ContentDedupConfig
from sdtrain.config.ingestion import DownloadConfig
from sdtrain.data.shard import ShardReader
from sdtrain.run_dir import write_atomically

SHARDS_AT_ONCE = 1000  # in a gathered file: about a million pictures
PICTURES_PER_BUCKET = 4_000_000  # about 0.4 GB in a worker
_IDS_AT_ONCE = 1 << 20
_PHASH, _EXCLUDED = ".phash.npy", ".excluded.npy"

KEPT, DUPLICATE, EXCLUDED = "kept", "duplicate", "excluded"


def content_dedup_stages(
    settings: ContentDedupConfig, pictures: DownloadConfig, images: Path, folder: Path
) -> list[Stage]:
    """All passes.

    Args:
        settings: What makes pictures the same.
        pictures: How pictures were brought to one size; those of an evaluation set are before they are compared.
        images: Folder of the image shards.
        folder: Folder of the verdicts; the passes before lie beside it.
    """
    hashes, excluded, gathered, split, pick, near, groups = (
        folder.with_name(f"{folder.name}-{name}")
        for name in ("hash", "exclude", "gather", "split", "pick", "near", "group")
    )
    by_bytes = settings.by == "bytes"
    radius = 0 if by_bytes else settings.radius
    listing = [ExcludeStage(settings.exclude, pictures, excluded)] if settings.exclude else []
    gather = GatherStage(hashes, excluded if settings.exclude else None, by_bytes, radius, gathered)
    if by_bytes:
        pairing: list[Stage] = [
            SplitStage(HashIdentity("sha256"), gathered, split, name="content-dedup-split"),
            PickStage(0, 0, split, pick, name="content-dedup-pick"),
        ]
    else:
        pairing = [NearStage(radius, gathered, near)]
    return [
        HashStage(images, hashes),
        *listing,
        gather,
        *pairing,
        GroupStage(by_bytes, gathered, pick if by_bytes else near, groups),
        VerdictStage(by_bytes, hashes, gathered, groups, folder),
    ]


@dataclass(frozen=True)
class HashStage:
    """Pass 1: key, sha256 and perceptual hash of each sample of a shard, in its order.

    The sha256 is that of the file as it was fetched or found; the perceptual hash is that of the stored picture.
    """

    images: Path
    folder: Path
    name: str = "content-dedup-hash"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """Nothing: hashes do not depend on what they are compared by."""
        return {}

    def units(self) -> list[Unit]:
        """One for each image shard."""
        return one_to_one(self.images, ".tar")

    def worker(self) -> Work:
        """Hash the pictures of one shard."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            with ShardReader(unit.inputs[0]) as shard:
                rows = [_hash_row(shard, sample) for sample in range(len(shard))]
            columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("key", "sha256", "phash")}
            pq.write_table(pa.table(columns), folder / f"{unit.name}.parquet", compression="zstd")
            return {"pictures": len(rows)}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """How many pictures there are."""
        return f"{self.name}: {sum(row['pictures'] for row in stats):,} pictures"


def _hash_row(shard: ShardReader, sample: int) -> dict[str, str]:
    picture = shard.read(sample, "jpg")
    digest = shard.decode(sample, "json").get("sha256") or hashlib.sha256(picture).hexdigest()
    return {"key": shard.keys[sample], "sha256": digest, "phash": hash_text(hash_of_file(picture))}


@dataclass(frozen=True)
class GatherStage:
    """Pass 3: the hashes of many shards in one file; excluded pictures have none and take no further part.

    `<unit>.parquet` holds the column sha256, `<unit>.phash.npy` the perceptual hashes, `<unit>.excluded.npy` who is
    excluded.
    """

    hashes: Path
    excluded: Path | None
    by_bytes: bool
    radius: int
    folder: Path
    name: str = "content-dedup-gather"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """How pictures are compared with excluded ones."""
        return {"by_bytes": self.by_bytes, "radius": self.radius} if self.excluded else {}

    def units(self) -> list[Unit]:
        """One for each thousand shards."""
        files = [unit.inputs[0] for unit in one_to_one(self.hashes, ".parquet")]
        lists = () if self.excluded is None else exclusions(self.excluded)
        return [
            Unit(
                index, (*files[start : start + SHARDS_AT_ONCE], *lists), {"shards": len(files[start:][:SHARDS_AT_ONCE])}
            )
            for index, start in enumerate(range(0, len(files), SHARDS_AT_ONCE))
        ]

    def worker(self) -> Work:
        """Join the hashes, find what is excluded."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            files, lists = unit.inputs[: unit.facts["shards"]], unit.inputs[unit.facts["shards"] :]
            table = pa.concat_tables([pq.read_table(path, columns=["sha256", "phash"]) for path in files])
            digests = table["sha256"].to_pylist()
            hashes = np.array([int(text, 16) for text in table["phash"].to_pylist()], np.uint64)
            is_out = np.zeros(len(digests), bool)
            if lists:
                out_digests, out_hashes = (np.load(path, allow_pickle=False) for path in lists)
                is_out |= np.isin(np.array(digests, "S64"), out_digests)
                if not self.by_bytes:
                    is_out |= _is_near(hashes, out_hashes, self.radius)
            kept = pa.array([None if out else text for text, out in zip(digests, is_out, strict=True)], pa.string())
            pq.write_table(pa.table({"sha256": kept}), folder / f"{unit.name}.parquet", compression="zstd")
            np.save(folder / f"{unit.name}{_PHASH}", hashes, allow_pickle=False)
            np.save(folder / f"{unit.name}{_EXCLUDED}", is_out, allow_pickle=False)
            return {"pictures": len(digests), "excluded": int(is_out.sum())}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> None:
        """The last pass tells it."""


def _is_near(hashes: Hashes, others: Hashes, radius: int) -> npt.NDArray[np.bool_]:
    """Which hashes are within the radius of any other."""
    found = np.zeros(len(hashes), bool)
    for mask in band_masks(len(hashes) + len(others), radius):
        for mine, _ in pairs_within(hashes, others, mask, radius):
            found[mine] = True
    return found


def _load(path: Path) -> npt.NDArray[Any]:
    return np.load(path, mmap_mode="r", allow_pickle=False)


@dataclass(frozen=True)
class NearStage:
    """Pass 4, perceptually: the pairs of one mask and one bucket, `[later, earlier]` by number, ascending.

    Pictures are numbered through all gathered files. Of equal hashes only the first is compared with others;
    `<unit>.equal.npy` ties the rest to it. Hashes that are equal under a mask fall into the same bucket.
    """

    radius: int
    source: Path
    folder: Path
    name: str = "content-dedup-near"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """The radius."""
        return {"radius": self.radius}

    def units(self) -> list[Unit]:
        """One for each mask and bucket; their numbers follow from the number of pictures."""
        files = tuple(numbered_files(self.source, _PHASH))
        count = sum(len(_load(path)) for path in files)
        buckets = max(1, -(-count // PICTURES_PER_BUCKET))
        masks = band_masks(count, self.radius)
        inputs = (*files, *numbered_files(self.source, _EXCLUDED))
        return [
            Unit(
                table * buckets + bucket,
                inputs,
                {"mask": hash_text(mask), "first": table == 0, "bucket": bucket, "buckets": buckets},
            )
            for table, mask in enumerate(masks)
            for bucket in range(buckets)
        ]

    def worker(self) -> Work:
        """Read one bucket, find its pairs."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            mask = int(unit.facts["mask"], 16)
            hashes, numbers = _bucket(unit.inputs, mask, unit.facts["bucket"], unit.facts["buckets"])
            order = np.lexsort((numbers, hashes))
            hashes, numbers = hashes[order], numbers[order]
            is_first = np.ones(len(hashes), bool)
            is_first[1:] = hashes[1:] != hashes[:-1]
            firsts = numbers[is_first]
            equal = np.stack([numbers, np.repeat(firsts, np.diff(np.flatnonzero(is_first), append=len(hashes)))], 1)
            if not unit.facts["first"]:
                equal = equal[:0]
            near = _pairs(hashes[is_first], firsts, mask, self.radius)
            np.save(folder / f"{unit.name}.near.npy", near, allow_pickle=False)
            np.save(folder / f"{unit.name}.equal.npy", equal[equal[:, 0] != equal[:, 1]], allow_pickle=False)
            return {"pictures": len(hashes), "pairs": len(near)}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> None:
        """The last pass tells it."""


def _bucket(inputs: Sequence[Path], mask: int, bucket: int, buckets: int) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Hashes and numbers of the pictures in one bucket, without those that are excluded."""
    half = len(inputs) // 2
    parts, numbers, first = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], 0
    for path, excluded in zip(inputs[:half], inputs[half:], strict=True):
        hashes = np.load(path, allow_pickle=False)
        is_here = (mixed(hashes & np.uint64(mask)) % np.uint64(buckets) == bucket) & ~_load(excluded)
        rows = np.flatnonzero(is_here)
        parts.append(hashes[rows])
        numbers.append(rows + first)
        first += len(hashes)
    return np.concatenate(parts), np.concatenate(numbers)


def _pairs(hashes: Hashes, numbers: npt.NDArray[np.int64], mask: int, radius: int) -> npt.NDArray[np.int64]:
    """Pairs of different hashes as rows of (later, earlier), ascending."""
    found = [np.empty((0, 2), np.int64)]
    for mine, theirs in pairs_within(hashes, hashes, mask, radius) if radius else ():
        pairs = np.stack([numbers[mine], numbers[theirs]], 1)
        found.append(pairs[pairs[:, 0] > pairs[:, 1]])
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


@dataclass(frozen=True)
class GroupStage:
    """Pass 5: for each picture the number of the one that is kept for it, in one worker.

    `00000.kept.npy`: that number (its own where it is kept itself, -1 where it is excluded); `00000.hash.npy`: the
    perceptual hash of that one; `00000.size.npy`: how many pictures one stands for, 0 where it is not kept. They are
    written through the page cache, so a hundred million pictures need no more memory than a million.
    """

    by_bytes: bool
    gathered: Path
    pairs: Path
    folder: Path
    name: str = "content-dedup-group"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """What the pairs are made by."""
        return {"by_bytes": self.by_bytes}

    def units(self) -> list[Unit]:
        """One, made from all pairs."""
        gathered = (*numbered_files(self.gathered, _PHASH), *numbered_files(self.gathered, _EXCLUDED))
        if self.by_bytes:
            pairs = numbered_files(self.pairs, ".groups.parquet")
        else:
            pairs = [*numbered_files(self.pairs, ".near.npy"), *numbered_files(self.pairs, ".equal.npy")]
        return [Unit(0, (*gathered, *pairs))]

    def worker(self) -> Work:
        """Follow the pairs in the order of the pictures."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            hashes = [_load(path) for path in unit.inputs if path.name.endswith(_PHASH)]
            excluded = [_load(path) for path in unit.inputs if path.name.endswith(_EXCLUDED)]
            starts = np.cumsum([0, *map(len, hashes)])
            kept = _new_array(folder / f"{unit.name}.kept.npy", np.int64, int(starts[-1]))
            for start, is_out in zip(starts, excluded, strict=False):
                kept[start : start + len(is_out)] = np.where(is_out, -1, np.arange(start, start + len(is_out)))
            if self.by_bytes:
                _follow_groups(kept, [path for path in unit.inputs if path.suffix == ".parquet"], starts)
            else:
                _follow_near(kept, [_load(path) for path in unit.inputs if path.name.endswith(".near.npy")])
                for path in unit.inputs:
                    if path.name.endswith(".equal.npy"):
                        later, earlier = _load(path).T
                        kept[later] = kept[earlier]
            _write_groups(kept, hashes, starts, folder, unit.name)
            return {"pictures": len(kept)}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> None:
        """The last pass tells it."""


def _new_array(path: Path, dtype: type, length: int) -> npt.NDArray[Any]:
    """An array of zeros in a file."""
    if not length:
        np.save(path, np.empty(0, dtype), allow_pickle=False)
        return np.empty(0, dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(length,))


def _follow_groups(kept: npt.NDArray[np.int64], paths: Sequence[Path], starts: npt.NDArray[np.int64]) -> None:
    """Equal bytes: the groups name whom they are kept for."""
    for path in paths:
        groups = {name: column.to_numpy() for name, column in zip(*_columns(path), strict=True)}
        kept[starts[groups["file"]] + groups["row"]] = starts[groups["kept_file"]] + groups["kept_row"]


def _columns(path: Path) -> tuple[list[str], list[pa.ChunkedArray]]:
    table = pq.read_table(path)
    return table.schema.names, table.columns


def _follow_near(kept: npt.NDArray[np.int64], parts: Sequence[npt.NDArray[np.int64]]) -> None:
    """Drop a picture where one before it is near and kept; pairs come in the order of the later picture."""
    for pairs in _by_later(parts, len(kept)):
        for later, earlier in pairs.tolist():
            if kept[later] == later and kept[earlier] == earlier:
                kept[later] = earlier


def _by_later(parts: Sequence[npt.NDArray[np.int64]], count: int) -> Iterator[npt.NDArray[np.int64]]:
    """All pairs once, ascending, a window of pictures at a time."""
    for first in range(0, count, _IDS_AT_ONCE):
        slices = []
        for part in parts:
            start, end = np.searchsorted(part[:, 0], [first, first + _IDS_AT_ONCE])
            slices.append(part[start:end])
        yield np.unique(np.concatenate(slices), axis=0)


def _write_groups(
    kept: npt.NDArray[np.int64], hashes: Sequence[Hashes], starts: npt.NDArray[np.int64], folder: Path, name: str
) -> None:
    """Size and hash of each picture's group, a window of pictures at a time."""
    size = _new_array(folder / f"{name}.size.npy", np.int32, len(kept))
    group = _new_array(folder / f"{name}.hash.npy", np.uint64, len(kept))
    for start in range(0, len(kept), _IDS_AT_ONCE):
        window = kept[start : start + _IDS_AT_ONCE]
        numbers, counts = np.unique(window[window >= 0], return_counts=True)
        size[numbers] += counts.astype(np.int32)
        found = np.zeros(len(window), np.uint64)
        for first, part in zip(starts, hashes, strict=False):
            is_here = (window >= first) & (window < first + len(part))
            found[is_here] = part[window[is_here] - first]
        group[start : start + len(window)] = found


@dataclass(frozen=True)
class VerdictStage:
    """Pass 6: key, verdict, group, size of the group and distance to the kept picture, for each sample of a shard.

    A group is called by what its pictures share: their sha256, or the perceptual hash of the one that is kept.
    """

    by_bytes: bool
    hashes: Path
    gathered: Path
    groups: Path
    folder: Path
    name: str = "content-dedup"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """What groups are called by."""
        return {"by_bytes": self.by_bytes}

    def units(self) -> list[Unit]:
        """One for each shard."""
        groups = tuple(self.groups / f"00000.{name}.npy" for name in ("kept", "size", "hash"))
        first, units = 0, []
        for unit in one_to_one(self.hashes, ".parquet"):
            units.append(replace(unit, inputs=(*unit.inputs, *groups), facts={"first": first}))
            first += pq.read_metadata(unit.inputs[0]).num_rows
        return units

    def worker(self) -> Work:
        """Cut the shard's rows out of the groups."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            table = pq.read_table(unit.inputs[0])
            rows = slice(unit.facts["first"], unit.facts["first"] + table.num_rows)
            kept, sizes, group = (_load(path) for path in unit.inputs[1:])
            kept, group, numbers = np.array(kept[rows]), np.array(group[rows]), np.arange(rows.start, rows.stop)
            verdicts = np.where(kept == numbers, KEPT, np.where(kept < 0, EXCLUDED, DUPLICATE)).tolist()
            own = np.array([int(text, 16) for text in table["phash"].to_pylist()], np.uint64)
            names = table["sha256"].to_pylist() if self.by_bytes else [hash_text(value) for value in group.tolist()]
            is_in = kept >= 0
            columns = {
                "key": table["key"],
                "verdict": pa.array(verdicts, pa.string()),
                "group": pa.array([name if ok else None for name, ok in zip(names, is_in, strict=True)], pa.string()),
                "size": pa.array(sizes[np.where(is_in, kept, numbers)], pa.int32(), mask=~is_in),
                "distance": pa.array(np.bitwise_count(own ^ group), pa.int8(), mask=~is_in),
            }
            pq.write_table(pa.table(columns), folder / f"{unit.name}.parquet", compression="zstd")
            return {"verdicts": dict(sorted(Counter(verdicts).items())), "groups": int((sizes[rows] > 1).sum())}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """Write `duplicates.json`, say how many are the same."""
        counts = sum((Counter(row["verdicts"]) for row in stats), Counter[str]())
        pictures = counts.total()
        told = {"pictures": pictures} | {name: counts[name] for name in (EXCLUDED, DUPLICATE, KEPT)}
        told["groups"] = sum(row["groups"] for row in stats)
        write_atomically(self.folder / "duplicates.json", json.dumps(told, indent=2) + "\n")
        words = f", {counts[EXCLUDED]:,} excluded" if counts[EXCLUDED] else ""
        return (
            f"{self.name}: {counts[DUPLICATE]:,} of {pictures:,} pictures are duplicates in {told['groups']:,} groups"
            f"{words}, {counts[KEPT]:,} left"
        )
