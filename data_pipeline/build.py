"""Where the ingestion page meets the stages: a configuration in, runnable stages out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.cluster import RayExecutor
from data_pipeline.layout import shapes_of
from data_pipeline.runner import Runner
from data_pipeline.stage import Stage
from data_pipeline.stages.filter import FilterSettings
from sdtrain.config.curation import ContentDedupConfig
from sdtrain.config.ingestion import (
    DigitsSource,
    DownloadConfig,
    FilterConfig,
    IngestionConfig,
    LaionSource,
    ShardsSource,
)
from sdtrain.errors import ConfigError


def stages_for(config: IngestionConfig) -> list[Stage]:
    """All stages of a page, in the order in which they run. Each folder's number is the stage's place."""
    match config.source:
        case LaionSource():
            stages = _laion_stages(config, config.source)
        case ShardsSource():
            stages = _adopting_stages(config, config.source)
        case DigitsSource():
            stages = [_digits_stage(config, config.source)]
    return [*stages, *_curation_stages(config), *_bucket_stages(config), *_shard_stages(config)]


def _laion_stages(config: IngestionConfig, source: LaionSource) -> list[Stage]:
    """Metadata to images."""
    from data_pipeline.stages.download import DownloadStage
    from data_pipeline.stages.metadata import MetadataStage

    out = config.output
    return [
        MetadataStage(source.metadata, source.columns, out / "01-metadata"),
        *_row_stages(config),
        DownloadStage(
            out / "03-dedup",
            images_folder(out),
            config.download,
            memory_limit_bytes=config.runner.memory_per_worker_bytes,
        ),
    ]


def _adopting_stages(config: IngestionConfig, source: ShardsSource) -> list[Stage]:
    """Shards of others to images."""
    from data_pipeline.stages.adopt import AdoptStage, ShardTablesStage

    out = config.output
    return [
        ShardTablesStage(source.shards, config.download.max_bytes, out / "01-metadata"),
        *_row_stages(config),
        AdoptStage(
            out / "01-metadata",
            out / "03-dedup",
            images_folder(out),
            config.download,
            memory_limit_bytes=config.runner.memory_per_worker_bytes,
        ),
    ]


def _row_stages(config: IngestionConfig) -> list[Stage]:
    """Rows of metadata to parts of equal size."""
    from data_pipeline.stages.dedup import dedup_stages
    from data_pipeline.stages.filter import filter_stages

    out = config.output
    dedup = dedup_stages(
        source=out / "02-filter",
        folder=out / "03-dedup",
        by=config.dedup.by,
        seed=config.seed,
        num_validation=config.validation.num_samples,
        samples_per_shard=config.download.samples_per_shard,
        exclude=config.dedup.exclude,
    )
    return [*filter_stages(filter_settings(config.filter), out / "01-metadata", out / "02-filter"), *dedup]


def _curation_stages(config: IngestionConfig) -> list[Stage]:
    """Images to the images that are kept; none where the page asks for neither content dedup nor scores."""
    if config.content_dedup is None and config.scores is None:
        return []
    from data_pipeline.stages.content_dedup import content_dedup_stages
    from data_pipeline.stages.score import ScorePercentilesStage, ScoreStage
    from data_pipeline.stages.select import SelectStage, thresholds_of

    out, images = config.output, images_folder(config.output)
    stages: list[Stage] = []
    verdicts = scored = percentiles = None
    if config.content_dedup is not None:
        verdicts = out / "04-content-dedup"
        stages += content_dedup_stages(config.content_dedup, config.download, images, verdicts)
    thresholds = thresholds_of(config.scores)
    if config.scores is not None:
        _check_device(config)
        scored = out / "04-score"
        stages.append(ScoreStage(config.scores, images, verdicts, scored))
    ranked = tuple(sorted({threshold.score for threshold in thresholds if threshold.is_percentile}))
    if ranked and scored is not None:
        percentiles = out / "04-score-percentiles"
        stages.append(ScorePercentilesStage(ranked, scored, percentiles))
    folder, words = selected_folder(config), _in_words(config.content_dedup)
    return [*stages, SelectStage(images, verdicts, scored, percentiles, thresholds, folder, words)]


def _in_words(dedup: ContentDedupConfig | None) -> str:
    """What the funnel says of the content dedup."""
    if dedup is None:
        return ""
    return "equal bytes" if dedup.by == "bytes" else f"perceptual hash within {dedup.radius} bits"


def _check_device(config: IngestionConfig) -> None:
    """Tell at once, where Ray runs on this machine alone; a cluster's nodes may have GPUs that this machine lacks.

    Raises:
        ConfigError: The page wants a GPU where there is none.
    """
    if config.runner.address is not None or config.scores is None or config.scores.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("scores.device is cuda, but this machine has no GPU that torch can use; take auto or cpu")


def _digits_stage(config: IngestionConfig, source: DigitsSource) -> Stage:
    """Images, rendered here."""
    from data_pipeline.stages.digits import DigitsStage

    return DigitsStage(
        num_images=source.num_images,
        num_validation=config.validation.num_samples,
        image_size=config.download.image_size,
        samples_per_shard=config.download.samples_per_shard,
        seed=config.seed,
        folder=images_folder(config.output),
    )


def _bucket_stages(config: IngestionConfig) -> list[Stage]:
    """Images of several sizes to shards of one size each."""
    if not _is_bucketed(config):
        return []
    from data_pipeline.stages.buckets import bucket_stages

    out, images = config.output, selected_folder(config)
    return bucket_stages(images, out / "04-buckets-sort", bucketed_folder(config), config.download.samples_per_shard)


def _is_bucketed(config: IngestionConfig) -> bool:
    return config.download.resize_mode == "buckets"


def _shard_stages(config: IngestionConfig) -> list[Stage]:
    """Images to manifests: `images.json` lists the pictures, `manifest.json` what training reads.

    Where `encode` is null they list the same shards, for the training of an autoencoder.
    """
    from data_pipeline.stages.manifest import ManifestStage

    out = config.output
    images, tokens, latents = bucketed_folder(config), out / "06-tokens", out / "07-encode"
    transform = ImageTransform(config.download)
    listed = ManifestStage("images", images, out / "05-images", out / "images.json", (transform,), _is_bucketed(config))
    target = out / "manifest.json"
    if config.encode is None:
        captions, last = _captions_stages(config, images)
        manifest = ManifestStage("manifest", last, out / "08-manifest", target, (transform,), _is_bucketed(config))
        return [listed, *captions, manifest]
    from data_pipeline.stages.encode import EncodeStage
    from data_pipeline.stages.tokenize import TokenizeStage

    tokenize = TokenizeStage(images, tokens, config.tokenize.max_length)
    encode = EncodeStage(images, tokens, latents, config.encode)
    captions, last = _captions_stages(config, latents)
    makers = (transform, tokenize, encode)
    manifest = ManifestStage("manifest", last, out / "08-manifest", target, makers, _is_bucketed(config))
    return [listed, tokenize, encode, *captions, manifest]


def _captions_stages(config: IngestionConfig, source: Path) -> tuple[list[Stage], Path]:
    """The stages that replace text, and the folder of the shards after them."""
    if config.captions is None:
        return [], source
    from data_pipeline.stages.captions import caption_stages

    table, by, folder = config.captions.table, config.captions.by, config.output / "07-captions"
    return caption_stages(table, by, config.tokenize.max_length, source, folder), folder


@dataclass(frozen=True)
class ImageTransform:
    """What was done to the pictures, for the fingerprint of a manifest.

    Attributes:
        settings: How they were brought to one size.
    """

    settings: DownloadConfig

    def fingerprint(self) -> dict[str, Any]:
        """Size, crop and quality; the shapes too, where there are several."""
        facts = self.settings.model_dump(mode="json", include={"image_size", "resize_mode", "jpeg_quality"})
        shapes = [list(shape) for shape in shapes_of(self.settings)] if self.settings.resize_mode == "buckets" else []
        return {"transform": facts | ({"bucket_shapes": shapes} if shapes else {})}


def images_folder(output: Path) -> Path:
    """Where the image shards of every source lie."""
    return output / "04-download"


def selected_folder(config: IngestionConfig) -> Path:
    """Where the image shards lie that everything after them is made of."""
    is_selected = config.content_dedup is not None or config.scores is not None
    return config.output / "04-select" if is_selected else images_folder(config.output)


def bucketed_folder(config: IngestionConfig) -> Path:
    """Where the image shards of one size each lie: those that were selected, where there is one size."""
    return config.output / "04-buckets" if _is_bucketed(config) else selected_folder(config)


def filter_settings(config: FilterConfig) -> FilterSettings:
    """The filter's plain settings."""
    nsfw = config.nsfw
    return FilterSettings(
        min_aesthetic=config.min_aesthetic,
        aesthetic_scale=config.aesthetic_scale,
        min_similarity=config.min_similarity,
        min_width=config.min_width,
        min_height=config.min_height,
        min_aspect_ratio=config.min_aspect_ratio,
        max_aspect_ratio=config.max_aspect_ratio,
        min_caption_chars=config.min_caption_chars,
        max_caption_chars=config.max_caption_chars,
        max_pwatermark=config.max_pwatermark,
        nsfw_allow=None if nsfw is None else nsfw.allow,
        max_punsafe=None if nsfw is None else nsfw.max_punsafe,
        nulls=config.nulls.model_dump(),
        percentiles=config.percentiles.model_dump(exclude_none=True),
        keep_rejected=config.keep_rejected,
    )


def runner_for(config: IngestionConfig, executor: RayExecutor, console: Console) -> Runner:
    """The runner of a page."""
    return Runner(output=config.output, executor=executor, max_attempts=config.runner.max_attempts, console=console)


def executor_for(config: IngestionConfig) -> RayExecutor:
    """Ray as the page wants it; nothing starts before the first stage has work."""
    settings = config.runner
    return RayExecutor(settings.workers, settings.address, settings.memory_per_worker_bytes)
