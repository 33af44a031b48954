"""Stage `encode`: images and tokens become latent shards, through an autoencoder that is frozen from here on.

Stored are moments (mean and log-variance), so that every epoch can draw another posterior sample. The last batch of a
shard is padded, so every forward has one shape and an image's moments do not depend on its neighbours' number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float16, UInt8

from data_pipeline.stage import Needs, Unit, Work, has_gpu, numbered_files, one_to_one
from sdtrain.autoencoders.load import autoencoder_facts, load_autoencoder
from sdtrain.config.ingestion import EncodeConfig
from sdtrain.data.manifest import FLIPPED
from sdtrain.data.shard import ShardReader, ShardWriter
from sdtrain.errors import ConfigError, DataError
from sdtrain.run_dir import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sdtrain.autoencoders.kl import AutoencoderKL

STD_RANGE = (0.8, 1.25)
"""Standard deviation of scaled latents that passes without a warning; diffusion assumes 1."""


@dataclass(frozen=True)
class EncodeStage:
    """One latent shard (`moments.npy`, `tokens.npy`, `txt`, `json`) for each image shard, same keys, same order.

    Where the page asks for flips, shards to train on hold `moments_flipped.npy` too, of the mirrored pictures.

    Attributes:
        images: Folder of the image shards.
        tokens: Folder of the token shards.
        folder: Where the latent shards go.
        settings: Autoencoder, batch size, precision, compilation, flips and how many images are checked.
    """

    images: Path
    tokens: Path
    folder: Path
    settings: EncodeConfig
    name: str = "encode"
    version: str = "1"

    @property
    def needs(self) -> Needs:
        """Long-lived processes that hold the autoencoder."""
        return Needs(prefers_gpu=True, keeps_worker=True)

    def fingerprint(self) -> dict[str, Any]:
        """What the data set's manifest says of its latents."""
        return {"autoencoder": autoencoder_facts(self.settings.autoencoder) | {"precision": self.settings.precision}}

    def config_facts(self) -> Mapping[str, Any]:
        """Weights and precision; batch size and compilation decide the kernels and so the last bits."""
        facts = self.fingerprint() | self.settings.model_dump(mode="json", include={"batch_size", "check_samples"})
        chosen = {"compile": self.settings.compile, "flips": self.settings.flips}
        return facts | {name: True for name, is_on in chosen.items() if is_on}

    def units(self) -> Sequence[Unit]:
        """One per image shard, with its token shard.

        Raises:
            DataError: Image and token shards do not pair up.
        """
        units = one_to_one(self.images, ".tar")
        tokens = {path.name: path for path in numbered_files(self.tokens, ".tar")}
        lonely = [unit.inputs[0].name for unit in units if unit.inputs[0].name not in tokens]
        if lonely:
            raise DataError(f"{self.tokens}: no token shard for {lonely[:5]}; run stage tokens first")
        return [Unit(unit.index, (unit.inputs[0], tokens[unit.inputs[0].name])) for unit in units]

    def worker(self) -> Work:
        """Load the autoencoder once."""
        encoder = Encoder(self.settings, on_gpu=has_gpu())

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            with (
                ShardReader(unit.inputs[0]) as images,
                ShardReader(unit.inputs[1]) as tokens,
                ShardWriter(folder / f"{unit.name}.tar") as writer,
            ):
                return encoder.encode_shard(images, tokens, writer)

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """Write `summary.json`; say how well the latents fit, and warn where they do not."""
        summary = summarize(stats)
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return describe(summary, autoencoder_facts(self.settings.autoencoder)["scaling_factor"])


def summarize(stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures over all shards from those of each: sums weighted by samples.

    Returns:
        `samples`, `latent_mean` and `latent_std` of scaled latents, `psnr_db` of decoded means (None: not checked).
    """
    total, checked = sum(row["samples"] for row in stats), sum(row["checked"] for row in stats)

    def mean(name: str, weight: str, over: int) -> float | None:
        return sum(row[name] * row[weight] for row in stats if row[weight]) / over if over else None

    first, second = mean("latent_mean", "samples", total), mean("latent_mean_square", "samples", total)
    error = mean("squared_error", "checked", checked)
    return {
        "samples": total,
        "latent_mean": first,
        "latent_std": None if first is None or second is None else math.sqrt(max(0.0, second - first**2)),
        "checked": checked,
        "psnr_db": None if error is None else 10 * math.log10(4.0 / max(error, 1e-12)),  # images span 2
    }


def describe(summary: Mapping[str, Any], scaling_factor: float) -> str:
    """The summary in words, with a warning where scaled latents are far from unit variance."""
    std, psnr = summary["latent_std"], summary["psnr_db"]
    text = f"encode: {summary['samples']:,} samples"
    if std is None:
        return text
    text += f", scaled latents have standard deviation {std:.3f}"
    if psnr is not None:
        text += f", {summary['checked']} decoded again at {psnr:.1f} dB"
    if not STD_RANGE[0] <= std <= STD_RANGE[1]:
        fit = "the latents are constant" if std == 0 else f"a scaling_factor of {scaling_factor / std:.5g} would give 1"
        text += f"\nwarning: diffusion assumes a standard deviation of 1; {fit} (it is {scaling_factor:g} now)"
    return text


class Encoder:
    """An autoencoder that turns shards into shards.

    Args:
        settings: Which autoencoder, and how.
        on_gpu: Whether to use the GPU that the process was given.
    """

    def __init__(self, settings: EncodeConfig, *, on_gpu: bool):
        import torch

        if on_gpu:
            torch.backends.cudnn.benchmark = False  # a timed choice of kernels would differ from run to run
            torch.backends.cudnn.deterministic = True
        else:
            torch.set_num_threads(1)  # sums in another order for another number of threads
        self._settings = settings
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._autoencoder: AutoencoderKL = load_autoencoder(settings.autoencoder).to(self._device).requires_grad_(False)
        if settings.compile:
            _compile(self._autoencoder)

    def encode_shard(self, images: ShardReader, tokens: ShardReader, writer: ShardWriter) -> dict[str, Any]:
        """Write every sample's moments beside its tokens, caption and facts; returns the unit's stats.

        Raises:
            DataError: Keys, splits or image sizes do not fit together, or moments are not finite in float16.
        """
        if images.keys != tokens.keys:
            raise DataError(f"{tokens.path}: holds other samples than {images.path}; run stage tokens again")
        figures: list[dict[str, float]] = []
        split = _split_of(images)
        for start, pixels in self._batches(images):
            stored = {"moments.npy": self._stored_moments(pixels, images, start)}
            if self._settings.flips and split == "train":
                mirrored = np.ascontiguousarray(pixels[..., ::-1])
                stored[FLIPPED["moments.npy"]] = self._stored_moments(mirrored, images, start)
            for offset in range(len(pixels)):
                sample = start + offset
                fields: dict[str, Any] = {name: moments[offset] for name, moments in stored.items()}
                fields |= {name: images.read(sample, name) for name in ("txt", "json")}
                writer.write(images.keys[sample], fields | {"tokens.npy": tokens.read(sample, "tokens.npy")})
            figures += self._figures(pixels, stored["moments.npy"], start)
        return _stats(figures)

    def _stored_moments(
        self, pixels: UInt8[np.ndarray, "batch 3 height width"], images: ShardReader, start: int
    ) -> Float16[np.ndarray, "batch moments h w"]:
        """Moments as they are stored.

        Raises:
            DataError: Some are not finite in float16.
        """
        stored = self._moments(pixels).astype(np.float16)
        for offset, row in enumerate(stored):
            _check_finite(row, images, start + offset)
        return stored

    def _batches(self, images: ShardReader) -> Iterator[tuple[int, UInt8[np.ndarray, "batch 3 height width"]]]:
        """Consecutive samples, with the position of the first."""
        size, factor = self._settings.batch_size, self._autoencoder.downsample_factor
        shape: tuple[int, ...] | None = None
        for start in range(0, len(images), size):
            rows = []
            for sample in range(start, min(start + size, len(images))):
                row = images.decode(sample, "jpg")  # (3, H, W)
                shape = shape or row.shape
                if row.shape != shape or row.shape[1] % factor or row.shape[2] % factor:
                    found = f"image {images.keys[sample]!r} is {row.shape[2]}x{row.shape[1]}"
                    raise DataError(
                        f"{images.path}: {found}; all images of a shard must be of one size, "
                        f"a multiple of the autoencoder's factor {factor}"
                    )
                rows.append(row)
            yield start, np.stack(rows)

    def _moments(self, pixels: UInt8[np.ndarray, "batch 3 height width"]) -> Float[np.ndarray, "batch moments h w"]:
        """Moments of a batch, computed at the full batch size."""
        import torch

        padding = self._settings.batch_size - len(pixels)
        padded = np.pad(pixels, ((0, padding), (0, 0), (0, 0), (0, 0)))
        with torch.inference_mode(), self._autocast():
            moments = self._autoencoder.encode(self._images(padded))  # (B, 2C, h, w)
        return moments.float().cpu().numpy()[: len(pixels)]

    def _images(self, pixels: UInt8[np.ndarray, "batch 3 height width"]) -> Tensor:
        import torch

        return torch.from_numpy(pixels).to(self._device).float() / 127.5 - 1.0

    def _autocast(self) -> torch.autocast:
        import torch

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self._settings.precision]
        enabled = dtype != torch.float32
        return torch.autocast(self._device.type, dtype=dtype if enabled else None, enabled=enabled)

    def _figures(
        self,
        pixels: UInt8[np.ndarray, "batch 3 height width"],
        stored: Float16[np.ndarray, "batch moments h w"],
        start: int,
    ) -> list[dict[str, float]]:
        """Per sample: mean and mean square of scaled latents over the posterior, and the error of the decoded mean."""
        import torch

        from sdtrain.nn.compilation import eagerly

        autoencoder = self._autoencoder
        moments = torch.from_numpy(stored).to(self._device).float()
        log_variance = moments.chunk(2, dim=1)[1]
        with torch.inference_mode(), self._autocast():
            scaled = autoencoder.scale(autoencoder.posterior_mean(moments))
            spread = log_variance.exp() * autoencoder.scaling_factor**2
            figures = [
                {"latent_mean": float(mean), "latent_mean_square": float(square)}
                for mean, square in zip(scaled.mean((1, 2, 3)), (scaled**2 + spread).mean((1, 2, 3)), strict=True)
            ]
            for row in range(min(len(pixels), self._settings.check_samples - start)):
                with eagerly():  # one picture of another size than a batch's is not worth a compilation
                    decoded = autoencoder.decode(autoencoder.posterior_mean(moments[row : row + 1])).float()
                error = (decoded.clamp(-1, 1) - self._images(pixels[row : row + 1])).square().mean()
                figures[row]["squared_error"] = float(error)
        return figures


def _compile(autoencoder: AutoencoderKL) -> None:
    """Compile the encoder's blocks, one variant per size of pictures; what is decoded for the check runs as written.

    Raises:
        ConfigError: This machine has no compiler.
    """
    from sdtrain.nn.compilation import compile_blocks

    try:
        compile_blocks(autoencoder)
    except ConfigError as error:
        raise ConfigError(str(error).replace("trainer.compile", "encode.compile")) from error


def _split_of(images: ShardReader) -> str | None:
    """The split of a shard; None without samples.

    Raises:
        DataError: It has several.
    """
    splits = {images.decode(sample, "json")["split"] for sample in range(len(images))}
    if len(splits) > 1:
        raise DataError(f"{images.path}: holds splits {sorted(splits)}; a shard belongs to exactly one")
    return next(iter(splits), None)


def _check_finite(moments: Float16[np.ndarray, "moments h w"], images: ShardReader, sample: int) -> None:
    if not np.isfinite(moments).all():
        raise DataError(
            f"{images.path}: moments of {images.keys[sample]!r} are not finite in float16; "
            "encode with encode.precision=fp32, or with another autoencoder"
        )


def _stats(figures: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over a shard's samples, rounded so that the last bits of a sum do not matter."""

    def mean(name: str) -> float:
        values = [row[name] for row in figures if name in row]
        return round(sum(values) / len(values), 6) if values else 0.0

    return {
        "samples": len(figures),
        "checked": sum("squared_error" in row for row in figures),
        **{name: mean(name) for name in ("latent_mean", "latent_mean_square", "squared_error")},
    }
