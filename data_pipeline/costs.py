"""Bytes and hours of a run, from the number of rows that reach each stage.

What is known is computed (latents, tokens, tables); what is not is an assumption of `plan` in the configuration, and
the forecast names each of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config.ingestion import EncodeConfig, IngestionConfig

_JPEG_BYTES_PER_PIXEL = 35_000 / 512**2
"""Of stored pictures at quality 95: 35 GB for a million of 512 x 512."""

_TAR_BYTES_PER_FIELD = 1024
"""Header and padding of one file in a tar."""

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


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage takes.

    Attributes:
        stage: Its name.
        reads: What comes over the network, in bytes.
        writes: What lies on disk afterwards, in bytes.
        hours: How long it takes; None where it is short beside the download.
    """

    stage: str
    reads: int
    writes: int
    hours: float | None


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


def costs_of(config: IngestionConfig, rows: Rows, table_bytes: int, mean_pixels: float | None) -> Cost:
    """Bytes and hours.

    Args:
        config: The page.
        rows: What each stage gives to the next.
        table_bytes: Of all tables.
        mean_pixels: Pixels of a picture on the web; None where no table tells.
    """
    plan, size = config.plan, config.download.image_size
    images = round(rows.kept * plan.link_success)
    pixels = mean_pixels or float(size * size)
    fetched = round(images * pixels * plan.fetched_bytes_per_pixel)
    stored = round(images * (size * size * _JPEG_BYTES_PER_PIXEL + 3 * _TAR_BYTES_PER_FIELD))
    of_network = fetched * 8 / (plan.bandwidth_mbit * 1e6) / 3600
    of_cores = rows.kept / (plan.images_per_core_second * config.download.processes) / 3600
    stages = [*_tables(config, rows, table_bytes), StageCost("download", fetched, stored, max(of_network, of_cores))]
    assumptions = [
        f"{100 * plan.link_success:g} % of the links still give a picture (plan.link_success)",
        f"{plan.bandwidth_mbit:g} Mbit/s (plan.bandwidth_mbit); pictures of {pixels / 1e6:.2f} megapixels with "
        f"{plan.fetched_bytes_per_pixel:g} bytes a pixel (plan.fetched_bytes_per_pixel)",
        f"{config.download.processes} processes (download.processes) with {plan.images_per_core_second:g} pictures a "
        "second each (plan.images_per_core_second)",
        f"the limit of the download is the {'processes' if of_cores > of_network else 'bandwidth'}",
    ]
    if config.content_dedup is not None or config.scores is not None:
        stages.append(StageCost("select", 0, stored, None))
        assumptions.append(
            "content_dedup and scores reject no picture: what they find is known only once pictures are there"
        )
    if config.encode is not None:
        tokens = images * (2 * config.tokenize.max_length + 2 * _TAR_BYTES_PER_FIELD)
        stages.append(StageCost("tokens", 0, tokens, None))
        stage, words = _encode(config, images, config.encode)
        stages.append(stage)
        assumptions += words
        if config.captions is not None:
            stages.append(StageCost("captions", 0, stage.writes, None))
    return Cost(images, tuple(stages), tuple(assumptions))


def _tables(config: IngestionConfig, rows: Rows, table_bytes: int) -> list[StageCost]:
    """The stages before the download."""
    row_bytes = table_bytes / max(rows.tables, 1)
    remote = table_bytes if "://" in getattr(config.source, "metadata", "") else 0
    identities = rows.passed * _IDENTITY_BYTES + rows.kept * _PICKED_BYTES
    return [
        StageCost("metadata", remote, remote, remote * 8 / (config.plan.bandwidth_mbit * 1e6) / 3600 or None),
        StageCost("filter", 0, round(rows.passed * row_bytes), None),
        StageCost("dedup", 0, round(identities + 2 * rows.kept * (row_bytes + _KEY_BYTES)), None),
    ]


def _encode(config: IngestionConfig, images: int, encode: EncodeConfig) -> tuple[StageCost, list[str]]:
    plan, size, precision = config.plan, config.download.image_size, encode.precision
    channels, factor, words = _latent_shape(encode.autoencoder)
    moments = 2 * channels * (size // factor) ** 2 * 2  # mean and log-variance in fp16
    written = images * (moments + 2 * config.tokenize.max_length + 4 * _TAR_BYTES_PER_FIELD)
    rate = plan.encode_images_per_second
    if rate is None:
        peak = _TFLOPS[plan.gpu]["fp32" if precision == "fp32" else "bf16"] * 1e12
        rate = _UTILISATION * peak / (size * size * _ENCODER_FLOP_PER_PIXEL)
        words.append(
            f"{plan.num_gpus} x {plan.gpu} (plan.gpu) at {100 * _UTILISATION:g} % of its published {precision} speed, "
            f"for an autoencoder of Stable Diffusion's size: {rate:.0f} pictures a second each; give what you measured "
            "as plan.encode_images_per_second"
        )
    else:
        words.append(f"{plan.num_gpus} GPUs with {rate:g} pictures a second each (plan.encode_images_per_second)")
    return StageCost("encode", 0, written, images / (rate * plan.num_gpus) / 3600), words


def _latent_shape(autoencoder: str) -> tuple[int, int, list[str]]:
    """Latent channels and pixels of a latent's side, from a folder in diffusers' layout; else Stable Diffusion's."""
    config = Path(autoencoder) / "config.json"
    if not config.is_file():
        return 4, 8, [f"latents of 4 channels and an eighth of the side ({autoencoder} is no folder here)"]
    page = json.loads(config.read_text(encoding="utf-8"))
    return page["latent_channels"], 2 ** (len(page["block_out_channels"]) - 1), []
