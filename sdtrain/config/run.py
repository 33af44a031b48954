"""Kind `training`: the whole page of a training run, and the rules between its sections."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from sdtrain.config.autoencoder import AutoencoderConfig
from sdtrain.config.base import NonEmptyStr, NonNegativeInt, SchemaVersion, Section
from sdtrain.config.checkpoint import CheckpointConfig
from sdtrain.config.conditioner import ClipTextConfig, ConditionerConfig, NoConditionerConfig
from sdtrain.config.data import DataConfig
from sdtrain.config.denoiser import CONTEXT_WIDTHS, DenoiserConfig, DiTArch, DiTConfig, UNetArch
from sdtrain.config.ema import EmaConfig
from sdtrain.config.health import HealthConfig
from sdtrain.config.init_from import InitFromConfig
from sdtrain.config.optimizer import OptimizerConfig
from sdtrain.config.problems import Problem
from sdtrain.config.process import ProcessConfig
from sdtrain.config.samples import SamplesConfig
from sdtrain.config.task import LatentDiffusionTask, TaskConfig
from sdtrain.config.tracking import TrackingConfig
from sdtrain.config.trainer import CUDA_GRAPH_MODES, CompileMode, TrainerConfig
from sdtrain.config.validation import ValidationConfig
from sdtrain.errors import ConfigError

_NO_STORAGE = ("http", "https", "ftp")


class TrainingConfig(Section):
    """One training run.

    Attributes:
        schema_version: Version of this page's keys.
        kind: `training`.
        name: What the run is called; null takes folder and file name.
        run_dir: Folder for everything that the run leaves; null takes `runs/<name>`.
        seed: Start of the order of samples, of every random draw and of fresh weights.
        task: What is learned.
        data: Shards and batches.
        autoencoder: The images' way to latents and back.
        denoiser: The trained network; latent_diffusion only.
        conditioner: What the denoiser is told; latent_diffusion only.
        process: How noise is added; latent_diffusion only.
        optimizer: AdamW and its learning rate.
        trainer: How long and how the steps are run.
        init_from: The other run's checkpoint that this run begins with; null begins with fresh weights.
        ema: Moving average of the weights; null keeps none.
        health: Which steps are thrown away, and when the run goes back to an older checkpoint.
        checkpoint: When to save and what to keep.
        validation: Loss on samples never trained on; null never validates.
        samples: Pictures drawn while training; null draws none.
        tracking: The copy of the metrics in Weights & Biases.
    """

    schema_version: SchemaVersion
    kind: Literal["training"] = "training"
    name: NonEmptyStr | None = None
    run_dir: Path | None = None
    seed: NonNegativeInt = 42
    task: TaskConfig
    data: DataConfig
    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig | None = None
    conditioner: ConditionerConfig | None = None
    process: ProcessConfig | None = None
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    init_from: InitFromConfig | None = None
    ema: EmaConfig | None = EmaConfig()
    health: HealthConfig = HealthConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig | None = None
    samples: SamplesConfig | None = None
    tracking: TrackingConfig = TrackingConfig()

    @property
    def resolved_run_dir(self) -> Path:
        """Where this run lives."""
        return self.run_dir or Path("runs") / (self.name or "unnamed")


def allowed_world_sizes(batch_size: int, micro_batch_size: int = 1) -> tuple[int, ...]:
    """Numbers of ranks that split a batch evenly into micro-batches, ascending."""
    portions = batch_size // micro_batch_size
    return tuple(ranks for ranks in range(1, portions + 1) if portions % ranks == 0)


def grad_accum_steps(config: TrainingConfig, world_size: int) -> int:
    """Micro-steps per optimiser step: batch_size = micro_batch_size x this x world_size.

    Raises:
        ConfigError: The batch does not split; names the world sizes that do.
    """
    batch_size, micro_batch_size = config.data.batch_size, config.data.micro_batch_size
    if batch_size % (micro_batch_size * world_size) == 0:
        return batch_size // (micro_batch_size * world_size)
    allowed = allowed_world_sizes(batch_size, micro_batch_size)
    message = (
        f"data.batch_size = {batch_size} does not split into micro-batches of "
        f"data.micro_batch_size = {micro_batch_size} on {world_size} ranks; "
        f"with these sizes the number of ranks may be {_listed(allowed)}"
    )
    if batch_size % world_size == 0:
        message += (
            f"; on {world_size} ranks data.micro_batch_size may be {_listed(_divisors(batch_size // world_size))}"
        )
    raise ConfigError(message)


def _divisors(number: int) -> tuple[int, ...]:
    return tuple(part for part in range(1, number + 1) if number % part == 0)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in numbers)


# Rules. The names of a rule's arguments are the sections that it needs; it runs where all of them did validate. -------


def batch_splits_into_micro_batches(data: DataConfig) -> Iterator[Problem]:
    """Without this no number of ranks can run the page."""
    if data.batch_size % data.micro_batch_size:
        allowed = _listed(_divisors(data.batch_size))
        yield Problem(
            "data.micro_batch_size", f"must divide data.batch_size = {data.batch_size}; allowed are {allowed}"
        )


def object_storage_has_a_cache(data: DataConfig) -> Iterator[Problem]:
    """Shards are never read over the network one sample at a time."""
    if not isinstance(data.manifest, str):
        return
    scheme = data.manifest.partition("://")[0]
    if "::" in scheme or scheme in _NO_STORAGE:
        yield Problem(
            "data.manifest",
            f"must be a file or object storage (s3://, gs://, az://, ...), not {scheme}://: a web server's answers and "
            "redirects are not trusted with training data; copy the data set, or mount it",
        )
    if data.cache_dir is None:
        yield Problem(
            "data.cache_dir",
            "is missing; shards of object storage are read through a folder on the node's own disk, for example "
            "cache_dir: /scratch/sdtrain",
        )


def one_length_of_the_run(trainer: TrainerConfig) -> Iterator[Problem]:
    """Steps or epochs, not both."""
    if (trainer.max_steps is None) == (trainer.max_epochs is None):
        yield Problem("trainer", "give exactly one of max_steps and max_epochs, and set the other to null")


def a_step_hangs_before_its_peers_give_up(trainer: TrainerConfig) -> Iterator[Problem]:
    """Steps get less patience than what is known to take long."""
    if trainer.step_timeout_seconds > trainer.timeout_seconds:
        limit = trainer.timeout_seconds
        yield Problem("trainer.hang_timeout_seconds", f"must be <= trainer.timeout_seconds = {limit:g}")


def compiled_blocks_record_no_cuda_graphs(trainer: TrainerConfig, data: DataConfig) -> Iterator[Problem]:
    """What a graph wrote stands in its own memory until it runs again: too early here, and in silence."""
    if not trainer.compile or trainer.compile_mode not in CUDA_GRAPH_MODES:
        return
    reasons = ["overwrite each other's outputs where blocks are compiled one by one (pytorch issue 152887)"]
    if data.micro_batch_size < data.batch_size or trainer.oom_skip:
        reasons.append(
            "overwrite gradients that are added up over micro-steps or wait for their reduction (issues 96693, 169545)"
        )
    if trainer.gradient_checkpointing == "blocks":
        reasons.append("fail when gradient_checkpointing runs them twice (issue 154306)")
    allowed = [mode for mode in get_args(CompileMode) if mode not in CUDA_GRAPH_MODES]
    yield Problem(
        "trainer.compile_mode",
        f"records CUDA graphs, which {', '.join(reasons)}; allowed are {' and '.join(allowed)}",
    )


def warmup_ends_before_the_run(optimizer: OptimizerConfig, trainer: TrainerConfig) -> Iterator[Problem]:
    """A warm-up as long as the run never reaches the peak rate."""
    if trainer.max_steps is not None and optimizer.warmup_steps >= trainer.max_steps:
        yield Problem("optimizer.warmup_steps", f"must be < trainer.max_steps = {trainer.max_steps}")


def warmup_rises(optimizer: OptimizerConfig) -> Iterator[Problem]:
    """A warm-up that starts above the peak is a mistake in an exponent."""
    if optimizer.warmup_steps and optimizer.warmup_start_lr > optimizer.learning_rate:
        yield Problem("optimizer.warmup_start_lr", f"must be <= optimizer.learning_rate = {optimizer.learning_rate:g}")


def diffusion_needs_its_sections(
    task: TaskConfig,
    denoiser: DenoiserConfig | None,
    conditioner: ConditionerConfig | None,
    process: ProcessConfig | None,
) -> Iterator[Problem]:
    """A denoiser needs a process and a conditioner, if only `{type: none}`."""
    if not isinstance(task, LatentDiffusionTask):
        return
    examples = {
        "denoiser": (denoiser, "{type: unet, preset: sd15}"),
        "conditioner": (conditioner, "{type: none}"),
        "process": (process, "{beta_schedule: scaled_linear, prediction_type: epsilon}"),
    }
    for name, (section, example) in examples.items():
        if section is None:
            yield Problem(name, f"is missing; task.type = latent_diffusion needs it, for example {name}: {example}")


def _one_architecture(name: str, given: dict[str, object]) -> Iterator[Problem]:
    found = [key for key, value in given.items() if value is not None]
    if len(found) != 1:
        yield Problem(name, f"give exactly one of {', '.join(given)}; found {' and '.join(found) or 'none'}")


def one_autoencoder_architecture(autoencoder: AutoencoderConfig) -> Iterator[Problem]:
    """Weights bring their architecture along."""
    yield from _one_architecture("autoencoder", autoencoder.model_dump(include={"weights", "preset", "arch"}))
    if autoencoder.arch is not None:
        yield from _groups_divide("autoencoder.arch", autoencoder.arch.channels, autoencoder.arch.norm_groups)


def one_denoiser_architecture(denoiser: DenoiserConfig | None) -> Iterator[Problem]:
    """Weights bring their architecture along."""
    if denoiser is None:
        return
    yield from _one_architecture("denoiser", denoiser.model_dump(include={"weights", "preset", "arch"}))
    if isinstance(denoiser, DiTConfig):
        yield from _preset_is_there_to_change(denoiser)
    match denoiser.arch:
        case UNetArch() as arch:
            yield from _unet_fits_together(arch)
        case DiTArch() as arch:
            yield from _dit_fits_together(arch)


def _groups_divide(path: str, channels: tuple[int, ...], norm_groups: int) -> Iterator[Problem]:
    wrong = [width for width in channels if width % norm_groups]
    if wrong:
        yield Problem(
            f"{path}.norm_groups", f"must divide every width in {path}.channels, not so {_listed(tuple(wrong))}"
        )


def _unet_fits_together(arch: UNetArch) -> Iterator[Problem]:
    path = "denoiser.arch"
    yield from _groups_divide(path, arch.channels, arch.norm_groups)
    if len(arch.down_blocks) != len(arch.channels):
        yield Problem(
            f"{path}.down_blocks", f"must name one block per width in {path}.channels, {len(arch.channels)} in all"
        )
    if (arch.num_heads is None) == (arch.head_dim is None):
        yield Problem(path, "give exactly one of num_heads and head_dim")
    for name, part in (("num_heads", arch.num_heads), ("head_dim", arch.head_dim)):
        blocks = zip(arch.channels, arch.down_blocks, strict=False)
        attending = [width for width, block in blocks if block != "plain"] + [arch.channels[-1]]
        wrong = [width for width in dict.fromkeys(attending) if part and width % part]
        if wrong:
            yield Problem(
                f"{path}.{name}", f"must divide the width of every attending block, not so {_listed(tuple(wrong))}"
            )
    crosses = "cross" in (*arch.down_blocks, arch.mid_block)
    if crosses and arch.context_dim is None:
        yield Problem(f"{path}.context_dim", "is missing; cross-attention needs the width of the conditioning tokens")


def _preset_is_there_to_change(denoiser: DiTConfig) -> Iterator[Problem]:
    if denoiser.preset is not None:
        return
    for name in ("context_dim", "sample_size"):
        if getattr(denoiser, name) is not None:
            place = "weights bring their own" if denoiser.arch is None else f"write denoiser.arch.{name}"
            yield Problem(f"denoiser.{name}", f"is for denoiser.preset, which is null here; {place}")


def _dit_fits_together(arch: DiTArch) -> Iterator[Problem]:
    path = "denoiser.arch"
    if arch.width % arch.num_heads:
        yield Problem(f"{path}.num_heads", f"must divide {path}.width = {arch.width}")
    if arch.width % 4:
        yield Problem(f"{path}.width", "must be a multiple of 4: sines and cosines of two coordinates")
    if arch.sample_size % arch.patch_size:
        yield Problem(f"{path}.patch_size", f"must divide {path}.sample_size = {arch.sample_size}")
    if arch.sinusoid_width % 2:
        yield Problem(f"{path}.sinusoid_width", "must be even: half of it are cosines, half are sines")


def one_text_model(conditioner: ConditionerConfig | None) -> Iterator[Problem]:
    """Weights bring their architecture along."""
    if not isinstance(conditioner, ClipTextConfig):
        return
    yield from _one_architecture("conditioner", conditioner.model_dump(include={"weights", "arch"}))
    if conditioner.arch is not None and conditioner.arch.hidden_size % conditioner.arch.num_heads:
        hidden_size = conditioner.arch.hidden_size
        yield Problem("conditioner.arch.num_heads", f"must divide conditioner.arch.hidden_size = {hidden_size}")


def _context_dim(denoiser: DenoiserConfig | None) -> int | None:
    """Width of the tokens that the denoiser attends to, where the page tells."""
    if denoiser is None:
        return None
    if isinstance(denoiser, DiTConfig):
        return denoiser.token_width
    return denoiser.arch.context_dim if denoiser.arch else CONTEXT_WIDTHS.get(denoiser.preset or "")


def text_fits_the_denoiser(denoiser: DenoiserConfig | None, conditioner: ConditionerConfig | None) -> Iterator[Problem]:
    """The width of the text tokens is what cross-attention was built for."""
    wanted = _context_dim(denoiser)
    if wanted is None or not isinstance(conditioner, ClipTextConfig) or conditioner.arch is None:
        return
    if conditioner.arch.hidden_size != wanted:
        yield Problem("conditioner.arch.hidden_size", f"must be {wanted}, the width that the denoiser attends to")


def a_dit_has_a_place_for_text(
    denoiser: DenoiserConfig | None, conditioner: ConditionerConfig | None
) -> Iterator[Problem]:
    """Its presets are built for classes: tokens need to be asked for, and to come."""
    if not isinstance(denoiser, DiTConfig) or denoiser.weights is not None:
        return
    path = "denoiser.context_dim" if denoiser.arch is None else "denoiser.arch.context_dim"
    if isinstance(conditioner, ClipTextConfig) and denoiser.token_width is None:
        width = "their width" if conditioner.arch is None else str(conditioner.arch.hidden_size)
        yield Problem(path, f"is missing; conditioner.type = clip_text gives tokens: write {width}")
    if isinstance(conditioner, NoConditionerConfig) and denoiser.token_width is not None:
        yield Problem(path, "must be left out: conditioner.type = none gives no tokens")


def latents_fit_the_denoiser(autoencoder: AutoencoderConfig, denoiser: DenoiserConfig | None) -> Iterator[Problem]:
    """The denoiser takes and returns the autoencoder's latents."""
    if autoencoder.arch is None or denoiser is None or denoiser.arch is None:
        return
    wanted = autoencoder.arch.latent_channels
    for name in ("in_channels", "out_channels"):
        if getattr(denoiser.arch, name) != wanted:
            yield Problem(f"denoiser.arch.{name}", f"must be autoencoder.arch.latent_channels = {wanted}")


def betas_rise(process: ProcessConfig | None) -> Iterator[Problem]:
    """Noise is added ever faster."""
    if process and process.beta_schedule not in ("cosine", None) and process.beta_start >= process.beta_end:
        yield Problem("process.beta_start", f"must be < process.beta_end = {process.beta_end:g}")


def noise_levels_fit_the_prediction(process: ProcessConfig | None) -> Iterator[Problem]:
    """A flow's path is straight, all others follow betas; the noise in pure noise says nothing of the image."""
    if process is None:
        return
    kind = process.prediction_type
    if kind != "flow" and process.beta_schedule is None:
        yield Problem(
            "process.beta_schedule",
            f"is missing; process.prediction_type = {kind} needs one of linear, scaled_linear, cosine",
        )
    if kind == "flow" and process.beta_schedule is not None:
        yield Problem("process.beta_schedule", "must be left out: process.prediction_type = flow has no betas")
    if kind != "flow" and process.shift != 1:
        yield Problem("process.shift", f"is for process.prediction_type = flow, which is {kind} here; leave it out")
    if process.zero_terminal_snr and kind not in ("v_prediction", "sample"):
        reason = "ends in pure noise anyway" if kind == "flow" else "cannot tell an image from pure noise"
        yield Problem(
            "process.zero_terminal_snr",
            f"needs process.prediction_type = v_prediction or sample; {kind} {reason}",
        )


def phases_cover_the_run(task: TaskConfig) -> Iterator[Problem]:
    """Phases follow each other to the end, and each says how likely every part of its axis is."""
    if not isinstance(task, LatentDiffusionTask) or not task.timesteps.phases:
        return
    phases = task.timesteps.phases
    ends = [0.0, *(phase.until for phase in phases)]
    if any(low >= high for low, high in pairwise(ends)) or ends[-1] != 1:
        yield Problem("task.timesteps.phases", f"must end at ascending shares of the run, the last at 1.0; {ends[1:]}")
    for index, phase in enumerate(phases):
        path = f"task.timesteps.phases.{index}"
        if any(low >= high for low, high in pairwise(phase.edges)):
            yield Problem(f"{path}.edges", "must ascend")
        if len(phase.weights) != len(phase.edges) + 1:
            yield Problem(f"{path}.weights", f"must be one more than edges, {len(phase.edges) + 1} in all")
        elif not any(phase.weights):
            yield Problem(f"{path}.weights", "must hold a number above 0")


def steps_fit_the_process(samples: SamplesConfig | None, process: ProcessConfig | None) -> Iterator[Problem]:
    """A sampler visits every noise level once at most, and never the lowest one unless it begins in pure noise."""
    if samples is None or process is None:
        return
    total = process.num_train_timesteps
    if process.prediction_type == "flow" or process.zero_terminal_snr:
        if samples.num_steps > total:
            yield Problem("samples.num_steps", f"must be <= process.num_train_timesteps = {total}")
    elif samples.num_steps >= total:
        yield Problem(
            "samples.num_steps",
            f"must be < process.num_train_timesteps = {total}: sampling leaves out timestep 0 where the last one is "
            "not pure noise",
        )


def bins_fit_the_process(validation: ValidationConfig | None, process: ProcessConfig | None) -> Iterator[Problem]:
    """A bin holds one timestep at least."""
    if validation and process and validation.timestep_bins > process.num_train_timesteps:
        limit = process.num_train_timesteps
        yield Problem("validation.timestep_bins", f"must be <= process.num_train_timesteps = {limit}")


def kept_checkpoints_are_written(checkpoint: CheckpointConfig) -> Iterator[Problem]:
    """A step that is never saved cannot be kept."""
    if checkpoint.keep_every_steps is not None and checkpoint.keep_every_steps % checkpoint.every_steps:
        every = checkpoint.every_steps
        yield Problem("checkpoint.keep_every_steps", f"must be a multiple of checkpoint.every_steps = {every}")


def the_best_are_measured(checkpoint: CheckpointConfig, validation: ValidationConfig | None) -> Iterator[Problem]:
    """A checkpoint is judged by what validation measured at its own step."""
    if checkpoint.keep_best is None:
        return
    if validation is None:
        yield Problem("checkpoint.keep_best", f"needs a section validation, which measures {checkpoint.best_by}")
        return
    saves, measures = checkpoint.every_steps, validation.every_steps
    if saves % measures and measures % saves:
        yield Problem(
            "checkpoint.keep_best",
            f"needs validation at the steps of checkpoints: of checkpoint.every_steps = {saves} and "
            f"validation.every_steps = {measures} one must be a multiple of the other",
        )


def uploads_go_to_a_url(checkpoint: CheckpointConfig) -> Iterator[Problem]:
    """A folder of this machine is no second place."""
    if checkpoint.upload_to is not None and "://" not in checkpoint.upload_to:
        yield Problem("checkpoint.upload_to", "must be a URL, such as s3://bucket/runs/sd15 or file:///mnt/backup/sd15")


TRAINING_RULES = (
    batch_splits_into_micro_batches,
    object_storage_has_a_cache,
    one_length_of_the_run,
    a_step_hangs_before_its_peers_give_up,
    compiled_blocks_record_no_cuda_graphs,
    warmup_ends_before_the_run,
    warmup_rises,
    diffusion_needs_its_sections,
    one_autoencoder_architecture,
    one_denoiser_architecture,
    one_text_model,
    text_fits_the_denoiser,
    a_dit_has_a_place_for_text,
    latents_fit_the_denoiser,
    betas_rise,
    noise_levels_fit_the_prediction,
    phases_cover_the_run,
    steps_fit_the_process,
    bins_fit_the_process,
    kept_checkpoints_are_written,
    the_best_are_measured,
    uploads_go_to_a_url,
)
