"""Stages `images` and `manifest`: the immutable lists of what was made, for the autoencoder and for the denoiser."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from data_pipeline.stage import Needs, Unit, Work, numbered_files
from data_pipeline.stages.buckets import bucket_of
from data_pipeline.takedown import take_down_again
from sdtrain.data.manifest import Manifest, ShardEntry, describe_shard, write_manifest
from sdtrain.data.shard import ShardReader
from sdtrain.errors import DataError
from sdtrain.run_dir import sync_folder, write_atomically

SHARDS_AT_ONCE = 1000
"""In one list: a worker holds a few hundred bytes of each, and reads a hundred kilobytes of sidecar."""

_INDEX = ".tar.index.json"
_LIST = ".shards.json"


class Maker(Protocol):
    """A stage that says what it made the data with."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Facts that a training run compares with its recipe."""
        ...


@dataclass(frozen=True)
class ManifestStage:
    """One manifest over all shards of a folder; shards without a sample are left out.

    A unit lists a thousand shards; from the lists the driver then writes the manifest. A manifest that said something
    else is kept under another name: its shards were replaced, so it can no longer be trained on.

    Attributes:
        name: `images` or `manifest`.
        source: Folder of the shards.
        folder: Where the list goes.
        target: The manifest, in a folder above the shards.
        makers: Stages whose facts make up the fingerprint.
        bucketed: Whether each shard is of one of several sizes, which is named then.
    """

    name: str
    source: Path
    folder: Path
    target: Path
    makers: tuple[Maker, ...]
    bucketed: bool = False
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> Mapping[str, Any]:
        """The fingerprint, and whether there are buckets."""
        merged: dict[str, Any] = {}
        for maker in self.makers:
            merged |= maker.fingerprint()
        return {"fingerprint": merged} | ({"bucketed": True} if self.bucketed else {})

    def units(self) -> Sequence[Unit]:
        """One for each thousand shards, made from their sidecars: they hold their tars' digests.

        Raises:
            DataError: There is no shard.
        """
        indexes = numbered_files(self.source, _INDEX)
        if not indexes:
            raise DataError(f"{self.source} holds no shard; run the stage that writes them first")
        starts = range(0, len(indexes), SHARDS_AT_ONCE)
        return [Unit(number, tuple(indexes[start : start + SHARDS_AT_ONCE])) for number, start in enumerate(starts)]

    def worker(self) -> Work:
        """List the shards."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            shards = [path.with_name(path.name.removesuffix(".index.json")) for path in unit.inputs]
            listed = (list_shard(path, self.target.parent, bucketed=self.bucketed) for path in shards)
            entries = [entry for entry in listed if entry is not None]
            text = json.dumps([asdict(entry) for entry in entries], indent=1, sort_keys=True)
            (folder / f"{unit.name}{_LIST}").write_text(text + "\n", encoding="utf-8")
            counts = Counter[str]()
            for entry in entries:
                counts[entry.split] += entry.num_samples
            return {
                "shards": len(entries),
                "empty": len(shards) - len(entries),
                "samples": dict(sorted(counts.items())),
            }

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """Write the manifest where it is missing or says something else.

        Raises:
            DataError: No shard holds a sample.
        """
        count, empty = (sum(row[name] for row in stats) for name in ("shards", "empty"))
        if not count:
            raise DataError(f"{self.source}: not one of {empty} shards holds a sample; see summary.json there")
        text = publish(self.target, self._entries(), self.config_facts()["fingerprint"])
        masked = take_down_again(self.target, Console(quiet=True))
        text += f"; {masked}" if masked else ""
        totals = sum((Counter(row["samples"]) for row in stats), Counter[str]())
        samples = ", ".join(f"{total:,} {split}" for split, total in sorted(totals.items()))
        return f"{self.name}: {samples} samples in {count} shards; {text}"

    def _entries(self) -> list[ShardEntry]:
        """What all lists say."""
        rows = (json.loads(path.read_text(encoding="utf-8")) for path in numbered_files(self.folder, _LIST))
        return [ShardEntry(**(row | {"fields": tuple(row["fields"])})) for part in rows for row in part]


def list_shard(path: Path, folder: Path, *, bucketed: bool = False) -> ShardEntry | None:
    """The manifest's entry of a shard, split and bucket from its first sample; None for a shard without samples.

    Raises:
        DataError: The shard is damaged, or its sample does not say which split it belongs to, or which size it has.
    """
    with ShardReader(path) as reader:
        if len(reader) == 0:
            return None
        facts, index = reader.decode(0, "json"), reader.index
    split = facts.get("split")
    if not isinstance(split, str) or not split:
        raise DataError(f"{path}: json of the first sample has split {split!r}; expected 'train' or 'validation'")
    bucket = bucket_of(facts, f"{path}: the first sample") if bucketed else None
    return describe_shard(path, split=split, folder=folder, bucket=bucket, index=index)


def publish(target: Path, entries: Sequence[ShardEntry], fingerprint: Mapping[str, Any]) -> str:
    """Write the manifest; returns what was done in words.

    Raises:
        DataError: What stands there is no valid manifest.
    """
    fresh = target.with_name(f".{target.name}.new")
    fresh.unlink(missing_ok=True)
    new = write_manifest(fresh, entries, fingerprint=fingerprint)
    old = Manifest.load(target) if target.exists() else None
    if old is not None and old.sha256 == new.sha256:
        fresh.unlink()
        return f"{target} stands"
    text = f"wrote {target}"
    if old is not None:
        kept = target.with_name(f"{target.stem}.superseded-{old.sha256[:12]}.json")
        write_atomically(kept, target.read_text(encoding="utf-8"))
        text += f"; the one before is {kept.name} now, its shards were replaced"
    fresh.replace(target)
    sync_folder(target.parent)
    return text
