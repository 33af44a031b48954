"""Stage `score`: similarity of picture and caption and an aesthetic score, for each stored sample, by a CLIP model.

Scores are a table beside each shard; `select` then applies the thresholds. Percentiles are exact: `score-percentiles`
sorts the scores of a thousand shards, and the value at a rank is found by bisection, as for the filter
(`data_pipeline.stages.percentiles`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.ledger import sha256_file
from data_pipeline.stage import Needs, Unit, Work, has_gpu, numbered_files, one_to_one
from data_pipeline.stages.content_dedup import KEPT
from sdtrain.config.curation import ScoresConfig
from sdtrain.data.shard import ShardReader
from sdtrain.run_dir import write_atomically

SHARDS_AT_ONCE = 1000  # in a file of sorted scores: about a million


@dataclass(frozen=True)
class ScoreStage:
    """`<shard>.parquet` with key and scores; samples that a verdict has dropped are not in it.

    The table's metadata says what the scores were made with.

    Attributes:
        settings: Model, files, batch size and precision.
        images: Folder of the image shards.
        verdicts: Folder of the verdicts of the content dedup; None scores all samples.
        folder: Where the scores go.
    """

    settings: ScoresConfig
    images: Path
    verdicts: Path | None
    folder: Path
    name: str = "score"
    version: str = "1"

    @property
    def needs(self) -> Needs:
        """Long-lived processes that hold the model."""
        device = self.settings.device
        return Needs(num_gpus=float(device == "cuda"), prefers_gpu=device == "auto", keeps_worker=True)

    def config_facts(self) -> Mapping[str, Any]:
        """The model; its weights are inputs. The batch size decides the kernels and so the last bits."""
        return self.settings.model_dump(mode="json", include={"model", "batch_size", "precision"})

    def units(self) -> Sequence[Unit]:
        """One for each image shard.

        Raises:
            ConfigError: An unknown model, or files that are not there.
        """
        from data_pipeline.scorer import check_files  # imports torch

        check_files(self.settings)
        files = [path for path in (self.settings.weights, self.settings.aesthetic_head) if path is not None]
        units = []
        for unit in one_to_one(self.images, ".tar"):
            verdicts = () if self.verdicts is None else (self.verdicts / f"{unit.name}.parquet",)
            units.append(replace(unit, inputs=(*unit.inputs, *files, *verdicts)))
        return units

    def worker(self) -> Work:
        """Load the model once."""
        from data_pipeline.scorer import Scorer

        scorer = Scorer(self.settings, on_gpu=self.settings.device != "cpu" and has_gpu())
        tools = json.dumps(self._tools(), sort_keys=True)

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            columns: dict[str, list[Any]] = {"key": [], **{name: [] for name in scorer.columns}}
            with ShardReader(unit.inputs[0]) as shard:
                wanted = self._wanted(unit, len(shard))
                for start in range(0, len(wanted), self.settings.batch_size):
                    batch = wanted[start : start + self.settings.batch_size]
                    pictures = [shard.read(sample, "jpg") for sample in batch]
                    scores = scorer.score(pictures, [shard.decode(sample, "txt") for sample in batch])
                    columns["key"] += [shard.keys[sample] for sample in batch]
                    for name in scorer.columns:
                        columns[name] += scores[name].tolist()
            kinds = {name: pa.string() if name == "key" else pa.float32() for name in columns}
            table = pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})
            table = table.replace_schema_metadata({"made_with": tools})
            pq.write_table(table, folder / f"{unit.name}.parquet", compression="zstd")
            means = {name: round(float(np.mean(columns[name])), 6) if wanted else 0.0 for name in scorer.columns}
            return {"scored": len(wanted), "means": means}

        return work

    def _wanted(self, unit: Unit, count: int) -> list[int]:
        if self.verdicts is None:
            return list(range(count))
        verdicts = pq.read_table(unit.inputs[-1], columns=["verdict"])["verdict"].to_pylist()
        return [sample for sample, verdict in enumerate(verdicts) if verdict == KEPT]

    def _tools(self) -> dict[str, str]:
        """Names and digests that stand beside every score."""
        head = self.settings.aesthetic_head
        tools = {"model": self.settings.model, "weights_sha256": sha256_file(self.settings.weights)}
        return tools | ({} if head is None else {"aesthetic_head_sha256": sha256_file(head)})

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """Write `summary.json`: how many were scored, by what, and the mean scores."""
        count = sum(row["scored"] for row in stats)
        names = stats[0]["means"]
        means = {name: sum(row["means"][name] * row["scored"] for row in stats) / max(count, 1) for name in names}
        summary = {"scored": count, "means": means, "made_with": made_with(numbered_files(self.folder, ".parquet")[0])}
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        words = ", ".join(f"mean {name} {value:.4f}" for name, value in means.items())
        return f"score: {count:,} pictures by {self.settings.model}, {words}"


def made_with(path: Path) -> dict[str, str]:
    """Model and digests that a table of scores was made with."""
    return json.loads(pq.read_schema(path).metadata[b"made_with"])


@dataclass(frozen=True)
class ScorePercentilesStage:
    """The sorted scores of a thousand shards, `<unit>.<column>.npy`.

    Attributes:
        columns: Scores that have a percentile.
        source: Folder of the scores.
        folder: Where the sorted ones go.
    """

    columns: tuple[str, ...]
    source: Path
    folder: Path
    name: str = "score-percentiles"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """The columns."""
        return {"columns": list(self.columns)}

    def units(self) -> list[Unit]:
        """One for each thousand shards."""
        files = [unit.inputs[0] for unit in one_to_one(self.source, ".parquet")]
        parts = [files[start : start + SHARDS_AT_ONCE] for start in range(0, len(files), SHARDS_AT_ONCE)]
        return [Unit(index, tuple(part)) for index, part in enumerate(parts)]

    def worker(self) -> Work:
        """Sort."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            for column in self.columns:
                parts = [pq.read_table(path, columns=[column])[column].to_numpy() for path in unit.inputs]
                np.save(folder / f"{unit.name}.{column}.npy", np.sort(np.concatenate(parts)), allow_pickle=False)
            return {}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> None:
        """The selection tells it."""
