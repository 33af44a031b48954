"""Settings that are allowed but have no effect, or an effect that few would want."""

from __future__ import annotations

from collections.abc import Iterator

from sdtrain.config.base import Section
from sdtrain.config.conditioner import NoConditionerConfig
from sdtrain.config.ingestion import DigitsSource, IngestionConfig, LaionSource
from sdtrain.config.run import TrainingConfig
from sdtrain.config.sampling import SamplingConfig
from sdtrain.config.task import AutoencodingTask, LatentDiffusionTask


def warnings(config: Section) -> list[str]:
    """One line per setting that deserves a second look; none of them keeps a run from starting."""
    match config:
        case TrainingConfig():
            found = [
                *_optimizer(config),
                *_process(config),
                *_timesteps(config),
                *_health(config),
                *_trainer(config),
                *_autoencoding(config),
                *_guidance(config),
                *_checkpoint(config),
            ]
        case IngestionConfig():
            found = list(_ingestion(config))
        case SamplingConfig():
            found = list(_sampling(config))
        case _:
            found = []
    return found


def _is_set(section: Section, key: str) -> bool:
    """Whether the page gives this key (a default that is written out counts)."""
    return key in section.model_fields_set


def _optimizer(config: TrainingConfig) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.warmup_steps == 0 and _is_set(optimizer, "warmup_start_lr"):
        yield "optimizer.warmup_start_lr has no effect: optimizer.warmup_steps is 0"
    if optimizer.lr_schedule == "constant" and _is_set(optimizer, "final_lr_fraction"):
        yield "optimizer.final_lr_fraction has no effect: optimizer.lr_schedule is constant"
    if optimizer.weight_decay == 0 and _is_set(optimizer, "weight_decay_on"):
        yield "optimizer.weight_decay_on has no effect: optimizer.weight_decay is 0"


def _process(config: TrainingConfig) -> Iterator[str]:
    process = config.process
    if process is None:
        return
    reason = {"cosine": "process.beta_schedule is cosine", None: "process.prediction_type is flow"}
    for key in ("beta_start", "beta_end"):
        if process.beta_schedule in reason and _is_set(process, key):
            yield f"process.{key} has no effect: {reason[process.beta_schedule]}"


def _timesteps(config: TrainingConfig) -> Iterator[str]:
    if isinstance(config.task, LatentDiffusionTask) and config.task.timesteps.distribution == "uniform":
        for key in ("logit_mean", "logit_std"):
            if _is_set(config.task.timesteps, key):
                yield f"task.timesteps.{key} has no effect: task.timesteps.distribution is uniform"


def _health(config: TrainingConfig) -> Iterator[str]:
    if config.health.spike_ratio is None and _is_set(config.health, "spike_deviations"):
        yield "health.spike_deviations has no effect: health.spike_ratio is null"


def _trainer(config: TrainingConfig) -> Iterator[str]:
    max_steps = config.trainer.max_steps
    for name, section in (("validation", config.validation), ("samples", config.samples)):
        if max_steps is not None and section is not None and section.every_steps > max_steps:
            every_steps = section.every_steps
            yield f"{name}.every_steps = {every_steps} is beyond trainer.max_steps = {max_steps}: only the end counts"
    yield from _precision(config)
    if not config.trainer.compile and config.trainer.compile_mode != "default":
        yield "trainer.compile_mode has no effect: trainer.compile is false"
    if config.data.num_workers == 0 and _is_set(config.data, "prefetch"):
        yield "data.prefetch has no effect: data.num_workers is 0"
    if not isinstance(config.data.manifest, str):
        for key in ("cache_dir", "cache_gib"):
            if _is_set(config.data, key) and getattr(config.data, key) is not None:
                yield f"data.{key} has no effect: data.manifest is a file on this machine"


def _precision(config: TrainingConfig) -> Iterator[str]:
    """What the task really works in: autoencoders are fp32 whatever the page says."""
    trainer, is_autoencoding = config.trainer, isinstance(config.task, AutoencodingTask)
    if is_autoencoding and trainer.precision != "fp32":
        yield f"trainer.precision = {trainer.precision} has no effect: autoencoders are trained in fp32"
    elif trainer.precision == "fp16":
        yield (
            "trainer.precision = fp16 is for GPUs without bf16 (V100, T4): its range is small, and steps that overflow "
            "are thrown away until the loss scale fits; anywhere else bf16 is as fast and needs no scale"
        )
    if trainer.reduce_precision == "working" and (is_autoencoding or trainer.precision == "fp32"):
        reason = "task.type is autoencoding" if is_autoencoding else "trainer.precision is fp32"
        yield f"trainer.reduce_precision = working has no effect: {reason}, so gradients are fp32"


def _autoencoding(config: TrainingConfig) -> Iterator[str]:
    if not isinstance(config.task, AutoencodingTask):
        return
    for name in ("denoiser", "conditioner", "process", "samples"):
        if getattr(config, name) is not None:
            yield f"{name} has no effect: task.type is autoencoding"


def _guidance(config: TrainingConfig) -> Iterator[str]:
    if not isinstance(config.task, LatentDiffusionTask):
        return
    if isinstance(config.conditioner, NoConditionerConfig):
        if config.task.condition_dropout > 0 and _is_set(config.task, "condition_dropout"):
            yield "task.condition_dropout has no effect: conditioner.type is none"
        if config.samples is not None:
            yield "samples.prompts and samples.guidance_scale have no effect: conditioner.type is none"
    elif config.task.condition_dropout == 0 and config.samples is not None and config.samples.guidance_scale != 1.0:
        yield (
            f"samples.guidance_scale = {config.samples.guidance_scale:g} means nothing: "
            "with task.condition_dropout = 0 the network never learns the empty condition"
        )


def _checkpoint(config: TrainingConfig) -> Iterator[str]:
    wanted = config.checkpoint
    for key, default in (("best_by", "validation/loss"), ("best_is", "lowest")):
        if wanted.keep_best is None and getattr(wanted, key) != default:
            yield f"checkpoint.{key} has no effect: checkpoint.keep_best is null"
    if wanted.upload_to is None and wanted.upload_keep != "all":
        yield "checkpoint.upload_keep has no effect: checkpoint.upload_to is null"


def _ingestion(config: IngestionConfig) -> Iterator[str]:
    if isinstance(config.source, DigitsSource):
        for name in ("filter", "dedup"):
            if _is_set(config, name):
                yield f"{name} has no effect: source.type is digits"
    if isinstance(config.source, LaionSource) and not config.download.contact:
        yield "download.contact is empty: nothing is downloaded before it names an e-mail or URL for site owners"
    if config.download.allow_loopback:
        yield "download.allow_loopback is true: URLs of this machine are fetched; for tests and the demo only"
    alike = config.content_dedup
    if alike is not None and alike.by == "bytes" and _is_set(alike, "radius"):
        yield "content_dedup.radius has no effect: content_dedup.by is bytes"
    if config.filter.min_aesthetic is None and _is_set(config.filter, "aesthetic_scale"):
        yield "filter.aesthetic_scale has no effect: filter.min_aesthetic is null"


def _sampling(config: SamplingConfig) -> Iterator[str]:
    if config.sampler != "ddim" and _is_set(config, "eta"):
        yield f"eta has no effect: sampler is {config.sampler}"
