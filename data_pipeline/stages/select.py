"""Stage `select`: image shards without what the content dedup dropped and without what scores below a threshold.

Everything is written once, here: the stages before leave tables. What became of every picture is in the tables and in
the survival funnel; a kept sample's json says which group it stands for, and its scores with the model's digest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.table import Table

from data_pipeline.funnel import Funnel
from data_pipeline.stage import Needs, Unit, Work, one_to_one
from data_pipeline.stages.content_dedup import DUPLICATE, EXCLUDED
from data_pipeline.stages.percentiles import value_at_percentile
from data_pipeline.stages.score import made_with
from sdtrain.config.curation import ScoresConfig
from sdtrain.data.shard import ShardReader, ShardWriter
from sdtrain.errors import DataError


@dataclass(frozen=True, slots=True)
class Threshold:
    """A least score.

    Attributes:
        score: `similarity` or `aesthetic`.
        value: The least score, or the percentile that it is at.
        is_percentile: Which of the two.
    """

    score: str
    value: float
    is_percentile: bool

    @property
    def rule(self) -> str:
        """Its name in the funnel."""
        return f"{self.score}_percentile" if self.is_percentile else self.score


def thresholds_of(scores: ScoresConfig | None) -> tuple[Threshold, ...]:
    """The thresholds of a page, in the order in which they are applied."""
    if scores is None:
        return ()
    limits = (
        ("similarity", scores.min_similarity, False),
        ("similarity", scores.similarity_percentile, True),
        ("aesthetic", scores.min_aesthetic, False),
        ("aesthetic", scores.aesthetic_percentile, True),
    )
    return tuple(Threshold(score, value, ranked) for score, value, ranked in limits if value is not None)


@dataclass(frozen=True)
class SelectStage:
    """One shard for each image shard, of the same number, with the samples that are kept, in their order.

    Attributes:
        images: Folder of the image shards.
        verdicts: Folder of the verdicts of the content dedup, where there is one.
        scores: Folder of the scores, where there are any.
        percentiles: Folder of the sorted scores, where a threshold is a percentile.
        thresholds: The least scores.
        folder: Where the selected shards go.
        dedup_setting: What the funnel says of the content dedup.
    """

    images: Path
    verdicts: Path | None
    scores: Path | None
    percentiles: Path | None
    thresholds: tuple[Threshold, ...]
    folder: Path
    dedup_setting: str = ""
    name: str = "select"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """Nothing beyond the limits that each unit has."""
        return {}

    def units(self) -> list[Unit]:
        """One for each image shard; percentiles are values by now."""
        tables = [folder for folder in (self.verdicts, self.scores) if folder is not None]
        limits = {threshold.rule: self._limit(threshold) for threshold in self.thresholds}
        return [
            replace(
                unit,
                inputs=(*unit.inputs, *(folder / f"{unit.name}.parquet" for folder in tables)),
                facts={"limits": limits},
            )
            for unit in one_to_one(self.images, ".tar")
        ]

    def _limit(self, threshold: Threshold) -> float:
        if not threshold.is_percentile:
            return threshold.value
        assert self.percentiles is not None, "a percentile threshold comes with its stage"
        paths = sorted(self.percentiles.glob(f"*.{threshold.score}.npy"))
        parts = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        return value_at_percentile(parts, threshold.value, threshold.score)

    def worker(self) -> Work:
        """Copy what is kept."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            verdicts = {} if self.verdicts is None else _by_key(unit.inputs[1])
            scores = {} if self.scores is None else _by_key(unit.inputs[-1])
            tools = {} if self.scores is None else made_with(unit.inputs[-1])
            counts, stored = Counter[str](), 0
            with (
                ShardReader(unit.inputs[0]) as shard,
                ShardWriter(folder / f"{unit.name}.tar") as writer,
            ):
                for sample, key in enumerate(shard.keys):
                    verdict, score = verdicts.get(key, {}), scores.get(key, {})
                    reason = self._reason(verdict, score, unit.facts["limits"])
                    counts[reason] += 1
                    if not reason:
                        stored += 1
                        fields: dict[str, Any] = {name: shard.read(sample, name) for name in shard.fields}
                        facts = shard.decode(sample, "json") | _facts(verdict, score, tools)
                        writer.write(key, fields | {"json": facts})
                rows = len(shard)
            rejected = {reason: count for reason, count in sorted(counts.items()) if reason}
            return {"rows": rows, "rejected": rejected, "stored": stored, "limits": unit.facts["limits"]}

        return work

    def _reason(self, verdict: Mapping[str, Any], score: Mapping[str, Any], limits: Mapping[str, float]) -> str:
        """The first rule that rejects a sample; empty where none does."""
        if verdict.get("verdict") in (EXCLUDED, DUPLICATE):
            return verdict["verdict"]
        for threshold in self.thresholds:
            if not score[threshold.score] >= limits[threshold.rule]:
                return threshold.rule
        return ""

    def report(self, stats: Sequence[Mapping[str, Any]]) -> Table:
        """Write funnel.json, show the funnel.

        Raises:
            DataError: Nothing is left.
        """
        settings = [] if self.verdicts is None else [(EXCLUDED, self.dedup_setting), (DUPLICATE, self.dedup_setting)]
        for threshold in self.thresholds:
            words = f" ({threshold.value:g} %)" if threshold.is_percentile else ""
            settings.append((threshold.rule, f">= {stats[0]['limits'][threshold.rule]:.6g}{words}"))
        rejected = sum((Counter(row["rejected"]) for row in stats), Counter[str]())
        funnel = Funnel.empty(settings).add(sum(row["rows"] for row in stats), rejected)
        funnel.write(self.folder / "funnel.json")
        if funnel.rows_out == 0:
            raise DataError(
                f"select: none of {funnel.rows_in:,} pictures is left; {self.folder / 'funnel.json'} shows which rule "
                "rejected them: loosen it"
            )
        return funnel.table()


def _by_key(path: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(path).to_pylist()}


def _facts(verdict: Mapping[str, Any], score: Mapping[str, Any], tools: Mapping[str, str]) -> dict[str, Any]:
    """What a kept sample's json says beyond what it said before."""
    facts: dict[str, Any] = {}
    if verdict:
        facts["content_group"] = {"id": verdict["group"], "size": verdict["size"]}
    if score:
        facts["clip_scores"] = {name: value for name, value in score.items() if name != "key"} | dict(tools)
    return facts
