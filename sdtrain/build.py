"""The one place where config meets classes: every `match` is exhaustive, and parts get plain keyword arguments."""

from __future__ import annotations

from typing import Any, NamedTuple, assert_never

from sdtrain.autoencoders import kl
from sdtrain.autoencoders.load import autoencoder_facts, load_autoencoder
from sdtrain.conditioners.none import NoConditioner
from sdtrain.conditioners.text import WEIGHTS_FILE as TEXT_WEIGHTS_FILE
from sdtrain.conditioners.text import (
    ClipTextConditioner,
    build_tokenizer,
    load_clip_text,
    small_clip_text,
    tokenizer_fingerprint,
)
from sdtrain.config.autoencoder import AutoencoderConfig
from sdtrain.config.conditioner import ClipTextConfig, ConditionerConfig, NoConditionerConfig
from sdtrain.config.data import DataConfig
from sdtrain.config.denoiser import DenoiserConfig, DiTConfig, UNetConfig
from sdtrain.config.process import ProcessConfig
from sdtrain.config.run import TrainingConfig
from sdtrain.config.task import AutoencodingTask as AutoencodingConfig
from sdtrain.config.task import LatentDiffusionTask as LatentDiffusionConfig
from sdtrain.config.task import MinSnrWeighting, NoWeighting, TimestepsConfig
from sdtrain.data.dataset import ShardDataset
from sdtrain.data.manifest import Manifest, bytes_in_use, check_fingerprint
from sdtrain.data.plan import order_of
from sdtrain.data.shard_cache import ShardCache
from sdtrain.data.storage import is_url
from sdtrain.denoisers import dit, unet
from sdtrain.denoisers.load import Denoiser, load_dit, load_unet
from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.diffusion.timesteps import TimestepPhase, TimestepSampling
from sdtrain.errors import ConfigError, DataError
from sdtrain.nn.compilation import compile_blocks
from sdtrain.nn.folders import WEIGHTS_FILE
from sdtrain.records import DrawSpec, Task
from sdtrain.tasks.autoencoding import AutoencodingTask
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask

GIB = 2**30
STORED = {"moments": "moments.npy", "tokens": "tokens.npy", "pixels": "jpg"}
"""Name of a field in a batch -> its name in the shards."""


def build_autoencoder(config: AutoencoderConfig) -> kl.AutoencoderKL:
    """The autoencoder that the page names: published weights, a preset, or an architecture of one's own."""
    if config.weights is not None:
        autoencoder = load_autoencoder(config.weights)
        if config.scaling_factor is not None:
            autoencoder.scaling_factor = config.scaling_factor
        return autoencoder
    if config.preset is not None:
        kwargs: dict[str, Any] = dict(kl.PRESETS[config.preset])
    else:
        assert config.arch is not None, "the page's rules ask for weights, preset or arch"
        kwargs = config.arch.model_dump()
    if config.scaling_factor is not None or "scaling_factor" not in kwargs:
        kwargs["scaling_factor"] = config.scaling_factor or 1.0
    return kl.AutoencoderKL(**kwargs)


class Pretrained(NamedTuple):
    """Weights that a page names: the key, the folder or hub name, and where in a pipeline's folder they would lie."""

    key: str
    source: str
    part: str
    weights_file: str


def pretrained(config: TrainingConfig) -> list[Pretrained]:
    """All weights that networks of this page begin with."""
    found = []
    if config.autoencoder is not None and config.autoencoder.weights is not None:
        found.append(Pretrained("autoencoder.weights", config.autoencoder.weights, "vae", WEIGHTS_FILE))
    if isinstance(config.conditioner, ClipTextConfig) and config.conditioner.weights is not None:
        found.append(Pretrained("conditioner.weights", config.conditioner.weights, "text_encoder", TEXT_WEIGHTS_FILE))
    if config.denoiser is not None and config.denoiser.weights is not None:
        part = "unet" if isinstance(config.denoiser, UNetConfig) else "transformer"
        found.append(Pretrained("denoiser.weights", config.denoiser.weights, part, WEIGHTS_FILE))
    return found


def build_denoiser(config: DenoiserConfig) -> Denoiser:
    """The denoiser that the page names, with fresh weights unless it names some."""
    match config:
        case UNetConfig(weights=str() as weights):
            return load_unet(weights)
        case UNetConfig(preset=str() as preset):
            return unet.UNet(**unet.PRESETS[preset])
        case UNetConfig(arch=arch):
            assert arch is not None, "the page's rules ask for weights, preset or arch"
            return unet.UNet(**arch.model_dump())
        case DiTConfig(weights=str() as weights):
            return load_dit(weights)
        case DiTConfig(preset=str()):
            return dit.DiT(**_preset_for_data(config))
        case DiTConfig(arch=arch):
            assert arch is not None, "the page's rules ask for weights, preset or arch"
            return dit.DiT(**arch.model_dump())
        case _:
            assert_never(config)


def _preset_for_data(config: DiTConfig) -> dict[str, Any]:
    """A preset's size with the data's conditions and latents."""
    assert config.preset is not None
    kwargs = dict(dit.PRESETS[config.preset])
    if config.context_dim is not None:
        kwargs |= {"context_dim": config.context_dim, "num_classes": None}
    if config.sample_size is not None:
        kwargs["sample_size"] = config.sample_size
    return kwargs


def build_conditioner(config: ConditionerConfig, *, seed: int = 0) -> ClipTextConditioner | NoConditioner:
    """The conditioner that the page names."""
    match config:
        case ClipTextConfig(weights=str() as weights):
            return load_clip_text(weights, trainable=config.trainable, max_length=config.max_length)
        case ClipTextConfig(arch=arch):
            assert arch is not None, "the page's rules ask for weights or arch"
            return small_clip_text(
                hidden_size=arch.hidden_size,
                layers=arch.num_layers,
                heads=arch.num_heads,
                max_length=config.max_length,
                seed=seed,
                trainable=config.trainable,
            )
        case NoConditionerConfig():
            return NoConditioner()
        case _:
            assert_never(config)


def build_process(config: ProcessConfig) -> DiffusionProcess:
    """The forward process and what the network predicts."""
    return DiffusionProcess(
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        num_train_timesteps=config.num_train_timesteps,
        prediction_type=config.prediction_type,
        zero_terminal_snr=config.zero_terminal_snr,
        shift=config.shift,
    )


def build_timesteps(config: TimestepsConfig, *, batch_size: int, total_steps: int) -> TimestepSampling:
    """How training chooses noise levels; phases end at steps from here on."""
    ends = [round(phase.until * total_steps) for phase in config.phases[:-1]]
    return TimestepSampling(
        distribution=config.distribution,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        strata=batch_size if config.quasi_random else None,
        phases=tuple(
            TimestepPhase(until_step=end, edges=phase.edges, weights=phase.weights)
            for phase, end in zip(config.phases, [*ends, None], strict=False)
        ),
    )


def build_task(config: TrainingConfig, manifest: Manifest) -> Task:
    """The task with all its networks, on the CPU in fp32; same seed, same weights on every rank."""
    match config.task:
        case LatentDiffusionConfig():
            return _latent_diffusion(config, config.task, manifest)
        case AutoencodingConfig():
            assert config.autoencoder is not None, "the page's rules ask for an autoencoder"
            autoencoder = build_autoencoder(config.autoencoder)
            _, height, width = field_shape(manifest, "pixels")
            factor = autoencoder.downsample_factor
            return AutoencodingTask(
                autoencoder=autoencoder,
                reconstruction=config.task.reconstruction,
                kl_weight=config.task.kl_weight,
                latent_shape=(autoencoder.latent_channels, height // factor, width // factor),
            )
        case _:
            assert_never(config.task)


def _latent_diffusion(config: TrainingConfig, task: LatentDiffusionConfig, manifest: Manifest) -> LatentDiffusionTask:
    assert config.denoiser is not None and config.autoencoder is not None, "the page's rules ask for both"
    assert config.conditioner is not None and config.process is not None, "the page's rules ask for both"
    denoiser = build_denoiser(config.denoiser)
    prepare(denoiser, config)
    channels, height, width = field_shape(manifest, "moments")
    if denoiser.out_channels != channels // 2:
        raise ConfigError(
            f"denoiser: predicts {denoiser.out_channels} channels, the latents in {manifest.path} have "
            f"{channels // 2}; choose a network with as many (one that also predicts variances has twice as many, "
            "and is not trained here)"
        )
    match task.loss_weighting:
        case NoWeighting():
            gamma = None
        case MinSnrWeighting(gamma=gamma):
            pass
        case _:
            assert_never(task.loss_weighting)
    return LatentDiffusionTask(
        denoiser=denoiser,
        conditioner=build_conditioner(config.conditioner, seed=config.seed),
        autoencoder=build_autoencoder(config.autoencoder),
        process=build_process(config.process),
        condition_dropout=task.condition_dropout,
        loss_weighting=gamma,
        latents=task.latents,
        noise_offset=config.process.noise_offset,
        timesteps=build_timesteps(
            task.timesteps, batch_size=config.data.batch_size, total_steps=max_steps(config, manifest)
        ),
        loss_bins=task.loss_bins,
        latent_shape=(channels // 2, height, width),
        condition_field=None if isinstance(config.conditioner, NoConditionerConfig) else "tokens",
        timestep_bins=20 if config.validation is None else config.validation.timestep_bins,
    )


def forward_flops(task: Task) -> int | None:
    """Floating-point operations of one sample's pass through the denoiser; None for a task without one."""
    return task.forward_flops() if isinstance(task, LatentDiffusionTask) else None


def prepare(network: Denoiser, config: TrainingConfig) -> None:
    """Recompute the repeated blocks in the backward pass where the page wants it."""
    network.set_gradient_checkpointing(config.trainer.gradient_checkpointing)


def compile_networks(task: Task, config: TrainingConfig) -> int:
    """Compile what is trained where the page wants it, after DeepSpeed took it over and its weights are loaded.

    Returns:
        The number of compiled blocks.
    """
    if not config.trainer.compile:
        return 0
    return sum(compile_blocks(one.module, mode=config.trainer.compile_mode) for one in task.trainables.values())


def load_manifest(config: DataConfig) -> Manifest:
    """The manifest that the page names; on object storage, with the cache that its shards are read through.

    Raises:
        DataError: The manifest is missing or damaged.
        ConfigError: The cache is too small for what is read at a time.
        StorageError: The cache's folder cannot be made.
    """
    if not is_url(config.manifest):
        return Manifest.load(config.manifest)
    assert config.cache_dir is not None, "the page's rules ask for it"
    cache = ShardCache(config.cache_dir, int(config.cache_gib * GIB))
    manifest = Manifest.load(config.manifest, cache=cache)
    needed = bytes_in_use(manifest, window_shards=config.window_shards)
    if needed > cache.capacity_bytes:
        raise ConfigError(
            f"data.cache_gib = {config.cache_gib:g} is too small: with data.window_shards = {config.window_shards} "
            f"up to {needed / GIB:.3g} GiB of shards are read or brought ahead at a time; raise data.cache_gib"
        )
    return manifest


def build_dataset(config: TrainingConfig, manifest: Manifest, draws: DrawSpec, split: str = "train") -> ShardDataset:
    """The samples of one split: shuffled by the run's order (`train`), or as they stand (`validation`)."""
    order = order_of(
        manifest,
        split,
        seed=config.seed,
        window_shards=config.data.window_shards,
        shuffle=split == "train",
        batch_size=config.data.batch_size,
    )
    return ShardDataset(
        manifest=manifest,
        split=split,
        fields={name: STORED[name] for name in fields_of(config)},
        order=order,
        seed=config.seed,
        draws=draws,
        max_open_shards=(config.data.window_shards + 1) * len(manifest.buckets(split)),
        read_retries=config.data.read_retries,
        ram_cache_bytes=int(config.data.ram_cache_gib * GIB),
    )


def fields_of(config: TrainingConfig) -> tuple[str, ...]:
    """What the task reads of every sample."""
    match config.task:
        case LatentDiffusionConfig():
            return ("moments",) if isinstance(config.conditioner, NoConditionerConfig) else ("moments", "tokens")
        case AutoencodingConfig():
            return ("pixels",)
        case _:
            assert_never(config.task)


def field_shape(manifest: Manifest, name: str) -> tuple[int, ...]:
    """Shape of one sample's field; of the largest bucket where there are several.

    Raises:
        DataError: The shards do not hold it.
    """
    shapes = manifest.shapes_in(manifest.main_bucket("train"))
    if STORED[name] not in shapes:
        raise DataError(
            f"{manifest.path}: holds no {name!r} ({STORED[name]}), which this task trains on; it holds "
            f"{', '.join(sorted(shapes))}. Point data.manifest at the manifest of another stage."
        )
    return shapes[STORED[name]]


def max_steps(config: TrainingConfig, manifest: Manifest) -> int:
    """Optimiser steps of the whole run: as the page says, or enough to see every sample `max_epochs` times."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    assert config.trainer.max_epochs is not None, "the page's rules ask for one of the two"
    return -(-config.trainer.max_epochs * manifest.num_samples("train") // config.data.batch_size)


def check_manifest(config: TrainingConfig, manifest: Manifest) -> None:
    """Refuse shards whose tokens or latents another recipe made.

    Raises:
        DataError: Names each fact that differs.
    """
    expected: dict[str, Any] = {}
    fields = fields_of(config)
    if "tokens" in fields:
        assert isinstance(config.conditioner, ClipTextConfig)
        expected["tokenizer"] = tokenizer_fingerprint(build_tokenizer(config.conditioner.max_length))
    if "moments" in fields and config.autoencoder.weights is not None:
        expected["autoencoder"] = _encoder_facts(config.autoencoder.weights, config.autoencoder.scaling_factor)
    check_fingerprint(manifest, expected)


def _encoder_facts(weights: str, scaling_factor: float | None) -> dict[str, Any]:
    """What the shards must say of their encoder; moments are stored unscaled, so a page may scale them its own way."""
    facts = autoencoder_facts(weights)
    return facts if scaling_factor is None else {k: v for k, v in facts.items() if k != "scaling_factor"}
