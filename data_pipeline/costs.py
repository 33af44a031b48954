"""Bytes and hours of a run, from the number of rows that reach each stage.

What is known is computed (latents, tokens, tables); what is not is an assumption of `plan` in the configuration, and
the forecast names each of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.layout import shapes_of
from data_pipeline.plan_pictures import Pictures, in_tar
from sdtrain.config.ingestion import EncodeConfig, IngestionConfig, ShardsSource

_TAR_HEADER = 512
_HALF_BLOCK = 256
"""What is filled up on average behind a file whose size is not known."""
_PER_SHARD = 1024 + 5120 + 300
"""End mark of a tar, half of the record that it is filled up to, head of the sidecar and stats."""
_SIDECAR_PER_SAMPLE = 36
_SIDECAR_PER_FIELD = 23
_NPY_HEADER = 128

_ENCODER_FLOP_PER_PIXEL = 1.1167e12 / 512**2
"""Of Stable Diffusion's autoencoder (channels 128, 256, 512, 512), counted at 512 x 512."""

_UTILISATION = 0.3
_TFLOPS = {
    "a100": {"fp32": 156.0, "bf16": 312.0},
    "h100": {"fp32": 494.0, "bf16": 989.0},
    "h200": {"fp32": 494.0, "bf16": 989.0},
    "l40s": {"fp32": 183.0, "bf16": 362.0},
    "rtx4090": {"fp32": 82.6, "bf16": 165.2},
}
"""Peak of dense matrix products as published by the maker; convolutions in fp32 run as TF32 by default."""

_IDENTITY_BYTES = 32
_PICKED_BYTES = 20
_KEY_BYTES = 60
_VERDICT_BYTES = 150
_SCORE_BYTES = 40

NOT_FORECAST = "not forecast"


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage takes.

    Attributes:
        stage: Its name.
        reads: What comes over the network, in bytes.
        writes: What lies on disk afterwards, in bytes.
        hours: How long it takes; None where it only copies, or where `note` says why not.
        note: Stands in place of the hours.
    """

    stage: str
    reads: int
    writes: int
    hours: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run takes.

    Attributes:
        images: Pictures that arrive.
        stages: Stage by stage.
        assumptions: What was taken for granted.
    """

    images: int
    stages: tuple[StageCost, ...]
    assumptions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rows each stage gives to the next.

    Attributes:
        tables: Rows of all tables.
        passed: Rows that pass the filter.
        kept: Rows that are left after dedup: links to fetch.
    """

    tables: int
    passed: int
    kept: int


def costs_of(config: IngestionConfig, rows: Rows, table_bytes: int, pictures: Pictures, tar_bytes: int = 0) -> Cost:
    """Bytes and hours.

    Args:
        config: The page.
        rows: What each stage gives to the next.
        table_bytes: Of all tables.
        pictures: Means over those that pass the filter.
        tar_bytes: Of the shards to adopt, where there are any.
    """
    model = _Model(config, rows, pictures)
    stages = [*_tables(config, rows, table_bytes, tar_bytes)]
    stages.append(model.adopt() if isinstance(config.source, ShardsSource) else model.download())
    stages += [*model.curation(), *model.encoding()]
    return Cost(model.images, tuple(stages), tuple(model.assumptions))


def _tables(config: IngestionConfig, rows: Rows, table_bytes: int, tar_bytes: int) -> list[StageCost]:
    """The stages before the pictures."""
    row_bytes = table_bytes / max(rows.tables, 1)
    if isinstance(config.source, ShardsSource):
        remote = tar_bytes if "://" in config.source.shards else 0
        written = remote + table_bytes
    else:
        written = remote = table_bytes if "://" in getattr(config.source, "metadata", "") else 0
    identities = rows.passed * _IDENTITY_BYTES + rows.kept * _PICKED_BYTES
    return [
        StageCost("metadata", remote, written, remote * 8 / (config.plan.bandwidth_mbit * 1e6) / 3600 or None),
        StageCost("filter", 0, round(rows.passed * row_bytes)),
        StageCost("dedup", 0, round(identities + 2 * rows.kept * (row_bytes + _KEY_BYTES))),
    ]


class _Model:
    """The stages from the pictures on; each method names what it takes for granted.

    Args:
        config: The page.
        rows: What each stage gives to the next.
        pictures: Means over those that pass the filter.
    """

    def __init__(self, config: IngestionConfig, rows: Rows, pictures: Pictures):
        self._config, self._plan, self._rows, self._pictures = config, config.plan, rows, pictures
        is_adopted = isinstance(config.source, ShardsSource)
        self.images = round(rows.kept * (pictures.large_enough if is_adopted else config.plan.link_success))
        self.assumptions: list[str] = []
        size, held_out = config.download.samples_per_shard, min(config.validation.num_samples, rows.kept)
        parts = -(-held_out // size) - (held_out - rows.kept) // size
        stored = pictures.stored_pixels * config.plan.stored_bytes_per_pixel + _HALF_BLOCK
        of_picture = _TAR_HEADER + stored + pictures.text_bytes
        self._picture_shards = self._shards(of_picture, 3, parts)
        self._num_shards = float(parts)
        if config.download.resize_mode == "buckets":  # the last shard of each size and split is half full on average
            self._num_shards = self.images / size + len(shapes_of(config.download)) * (2 if held_out else 1) / 2
        self._sorted_shards = self._shards(of_picture, 3, self._num_shards)

    def _shards(self, sample_bytes: float, num_fields: int, num_shards: float) -> int:
        """Bytes of shards and their sidecars.

        Args:
            sample_bytes: What the fields of a sample take in its tar.
            num_fields: How many these are.
            num_shards: Shards that all pictures lie in.
        """
        of_sample = sample_bytes + _SIDECAR_PER_SAMPLE + num_fields * _SIDECAR_PER_FIELD
        return round(self.images * of_sample + num_shards * _PER_SHARD)

    def download(self) -> StageCost:
        """What is fetched and stored."""
        plan, processes = self._plan, self._config.download.processes
        pixels = self._pictures.found_pixels or self._pictures.stored_pixels
        fetched = round(self.images * pixels * plan.fetched_bytes_per_pixel)
        of_network = fetched * 8 / (plan.bandwidth_mbit * 1e6) / 3600
        of_cores = self._rows.kept / (plan.images_per_core_second * processes) / 3600
        self.assumptions += [
            f"{100 * plan.link_success:g} % of the links still give a picture (plan.link_success)",
            f"{plan.bandwidth_mbit:g} Mbit/s (plan.bandwidth_mbit); pictures of {pixels / 1e6:.2f} megapixels with "
            f"{plan.fetched_bytes_per_pixel:g} bytes a pixel (plan.fetched_bytes_per_pixel)",
            f"{processes} processes (download.processes) with {plan.images_per_core_second:g} pictures a second each "
            "(plan.images_per_core_second)",
            f"the limit of the download is the {'processes' if of_cores > of_network else 'bandwidth'}",
            self._stored_in_words(),
        ]
        return StageCost("download", fetched, self._picture_shards, max(of_network, of_cores))

    def adopt(self) -> StageCost:
        """What is stored of pictures that are there already."""
        workers = self._config.runner.workers or os.cpu_count() or 1
        rate = self._plan.images_per_core_second
        self.assumptions += [
            f"{workers} workers (runner.workers) with {rate:g} pictures a second each (plan.images_per_core_second)",
            self._stored_in_words(),
        ]
        if self._config.download.only_if_bigger and self._pictures.large_enough < 1:
            share = 100 * (1 - self._pictures.large_enough)
            self.assumptions.append(f"{share:.1f} % of the pictures are too small (download.only_if_bigger)")
        return StageCost("adopt", 0, self._picture_shards, self._rows.kept / (rate * workers) / 3600)

    def _stored_in_words(self) -> str:
        return (
            f"stored pictures of {self._pictures.stored_pixels / 1e6:.3g} megapixels (download.resize_mode "
            f"{self._config.download.resize_mode}) with {self._plan.stored_bytes_per_pixel:g} bytes a pixel "
            "(plan.stored_bytes_per_pixel)"
        )

    def curation(self) -> Iterator[StageCost]:
        """Dedup of the pictures, scores, selection, buckets."""
        config = self._config
        if config.content_dedup is not None:
            yield StageCost("content-dedup", 0, self.images * _VERDICT_BYTES, note=NOT_FORECAST)
        if config.scores is not None:
            yield self._score()
        if config.content_dedup is not None or config.scores is not None:
            self.assumptions.append(
                "content_dedup and scores reject no picture: what they find is known only once pictures are there"
            )
            yield StageCost("select", 0, self._picture_shards)
        if config.download.resize_mode == "buckets":
            yield StageCost("buckets", 0, self._sorted_shards)

    def _score(self) -> StageCost:
        rate, written = self._plan.score_images_per_second, self.images * _SCORE_BYTES
        if rate is None:
            self.assumptions.append("hours of the scores are not forecast: give plan.score_images_per_second")
            return StageCost("score", 0, written, note=NOT_FORECAST)
        self.assumptions.append(
            f"{self._plan.num_gpus} GPUs score {rate:g} pictures a second each (plan.score_images_per_second)"
        )
        return StageCost("score", 0, written, self.images / (rate * self._plan.num_gpus) / 3600)

    def encoding(self) -> Iterator[StageCost]:
        """Tokens, latents, other captions."""
        config, last = self._config, self._sorted_shards
        if config.encode is not None:
            tokens = in_tar(_NPY_HEADER + 2 * config.tokenize.max_length)
            yield StageCost("tokens", 0, self._shards(tokens, 1, self._num_shards))
            encoded = self._encode(config.encode, tokens)
            last = encoded.writes
            yield encoded
        if config.captions is not None:
            yield StageCost("captions", 0, last)

    def _encode(self, encode: EncodeConfig, tokens: int) -> StageCost:
        channels, factor, words = _latent_shape(encode.autoencoder)
        self.assumptions += words
        pixels = self._pictures.stored_pixels
        moments = in_tar(_NPY_HEADER + round(2 * channels * pixels / factor**2) * 2)  # mean and log-variance in fp16
        held_out = min(self._config.validation.num_samples / max(self._rows.kept, 1), 1.0)
        mirrored = round(self.images * (1 - held_out)) if encode.flips else 0
        written = self._shards(moments + tokens + self._pictures.text_bytes, 4, self._num_shards)
        written += mirrored * (moments + _SIDECAR_PER_FIELD)
        if mirrored:
            self.assumptions.append("encode.flips: pictures to train on are encoded and stored twice")
        hours = (self.images + mirrored) / (self._encoding_rate(encode) * self._plan.num_gpus) / 3600
        return StageCost("encode", 0, written, hours)

    def _encoding_rate(self, encode: EncodeConfig) -> float:
        """Pictures a second of one GPU."""
        plan, precision = self._plan, encode.precision
        if plan.encode_images_per_second is not None:
            rate = plan.encode_images_per_second
            self.assumptions.append(
                f"{plan.num_gpus} GPUs with {rate:g} pictures a second each (plan.encode_images_per_second)"
            )
            return rate
        peak = _TFLOPS[plan.gpu]["fp32" if precision == "fp32" else "bf16"] * 1e12
        rate = _UTILISATION * peak / (self._pictures.stored_pixels * _ENCODER_FLOP_PER_PIXEL)
        self.assumptions.append(
            f"{plan.num_gpus} x {plan.gpu} (plan.gpu) at {100 * _UTILISATION:g} % of its published {precision} speed, "
            f"for an autoencoder of Stable Diffusion's size: {rate:.0f} pictures a second each; give what you measured "
            "as plan.encode_images_per_second"
        )
        return rate


def _latent_shape(autoencoder: str) -> tuple[int, int, list[str]]:
    """Latent channels and pixels of a latent's side, from a folder in diffusers' layout; else Stable Diffusion's."""
    config = Path(autoencoder) / "config.json"
    if not config.is_file():
        return 4, 8, [f"latents of 4 channels and an eighth of the side ({autoencoder} is no folder here)"]
    page = json.loads(config.read_text(encoding="utf-8"))
    return page["latent_channels"], 2 ** (len(page["block_out_channels"]) - 1), []
