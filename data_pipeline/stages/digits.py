"""Stage `digits`: shards of captioned digits, rendered here instead of downloaded. For tests and small experiments."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.sources.digits import Picture, draw, render, to_jpeg
from data_pipeline.stage import Needs, Unit, Work
from sdtrain.data.shard import ShardWriter
from sdtrain.errors import DataError


@dataclass(frozen=True)
class DigitsStage:
    """Image shards of the same fields as downloaded ones, and `world.json` for the judge.

    Attributes:
        num_images: Different pictures, validation included.
        num_validation: How many of them are held out.
        image_size: Side in pixels.
        samples_per_shard: Pictures of one shard; a shard is all train or all validation.
        seed: Everything follows from it.
        folder: Where the shards go.
    """

    num_images: int
    num_validation: int
    image_size: int
    samples_per_shard: int
    seed: int
    folder: Path
    name: str = "digits"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """What the pictures depend on."""
        return {"seed": self.seed, "num_images": self.num_images, "image_size": self.image_size}

    def units(self) -> list[Unit]:
        """Train shards, then validation shards.

        Raises:
            DataError: Nothing would remain to train on.
        """
        num_train = self.num_images - self.num_validation
        if num_train <= 0:
            raise DataError(
                f"validation.num_samples = {self.num_validation}, but source.num_images = {self.num_images}: nothing "
                "would remain to train on; lower the one or raise the other"
            )
        units = []
        for split, start, stop in (("train", 0, num_train), ("validation", num_train, self.num_images)):
            for first in range(start, stop, self.samples_per_shard):
                span = [first, min(first + self.samples_per_shard, stop)]
                units.append(Unit(len(units), (), {"split": split, "span": span}))
        return units

    def worker(self) -> Work:
        """Render one shard."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            start, stop = unit.facts["span"]
            with ShardWriter(folder / f"{unit.name}.tar") as writer:
                for picture in draw(self.seed, self.num_images).pictures[start:stop]:
                    writer.write(*self._sample(picture, unit.facts["split"]))
            return {"stored": stop - start, "split": unit.facts["split"]}

        return work

    def _sample(self, picture: Picture, split: str) -> tuple[str, dict[str, Any]]:
        """Key and fields, as a download would have stored them."""
        caption, size = picture.caption(), [self.image_size, self.image_size]
        jpeg = to_jpeg(render(picture, self.image_size))
        key = hashlib.blake2b(picture.path.encode(), digest_size=16).hexdigest()
        facts = {"caption": caption, "url": picture.path, "original_size": size, "size": size, "split": split}
        return key, {"jpg": jpeg, "txt": caption, "json": facts | {"sha256": hashlib.sha256(jpeg).hexdigest()}}

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """Write world.json."""
        draw(self.seed, self.num_images).world(self.image_size, 0, ["good"] * self.num_images).write(self.folder)
        return f"digits: {sum(row['stored'] for row in stats):,} pictures in {len(stats)} shards"
