"""What every objective has to keep, whatever its schedule and prediction: draws, weights, targets, and the way back.

The ways are compared without chance. A Gaussian data set makes the best denoiser of every level an affine function,
which is fitted here by quadrature to the very items and targets that training hands out; samplers are then affine maps
of their noise, whose mean and deviation are read off unit responses.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sdtrain import build
from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.config.load import load_training
from sdtrain.data.loader import train_loader
from sdtrain.data.manifest import Manifest
from sdtrain.data.randomness import normals, uniforms
from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.diffusion.targets import add_noise, target, to_clean_and_noise
from sdtrain.diffusion.weighting import min_snr
from sdtrain.records import Batch, Conditioning, DrawSpec
from sdtrain.samplers.settings import SamplerSettings, run_sampler
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask
from tests.support import make_latent_manifest, tiny_page

T = 1000
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def process(**values) -> DiffusionProcess:
    return DiffusionProcess(num_train_timesteps=T, **values)


OBJECTIVES = {
    f"{schedule}, {kind}": process(prediction_type=kind, **levels)
    for schedule, levels in {
        "scaled linear": STABLE_DIFFUSION,
        "linear": LINEAR,
        "cosine": {"beta_schedule": "cosine"},
    }.items()
    for kind in ("epsilon", "v_prediction", "sample")
}
OBJECTIVES |= {
    f"zero terminal snr, {kind}": process(prediction_type=kind, zero_terminal_snr=True, **STABLE_DIFFUSION)
    for kind in ("v_prediction", "sample")
}
OBJECTIVES |= {f"flow, shift {shift:g}": process(prediction_type="flow", shift=shift) for shift in (1.0, 3.0)}

every_objective = pytest.mark.parametrize("of", OBJECTIVES.values(), ids=OBJECTIVES)


def levels_by_hand(of: DiffusionProcess) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma of every timestep on the scale that the denoiser is shown, from the definitions alone."""
    if of.prediction_type == "flow":
        time = np.arange(1, T + 1) / T
        time = of.shift * time / (1 + (of.shift - 1) * time)
        return 1 - time, time
    if of.beta_schedule == "cosine":
        level = np.cos((np.linspace(0, 1, T + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - level[1:] / level[:-1], 0.9999)
    elif of.beta_schedule == "linear":
        betas = np.linspace(1e-4, 0.02, T)
    else:
        betas = np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2
    alpha = np.sqrt(np.cumprod(1 - betas))
    if of.zero_terminal_snr:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return alpha, np.sqrt(1 - alpha**2)


# Draws ----------------------------------------------------------------------------------------------------------------


def test_every_sample_of_every_rank_and_step_has_noise_of_its_own(tmp_path: Path) -> None:
    """Two ranks, two micro-steps, two epochs of the same pictures: no noise twice, and none of another draw's."""
    manifest = Manifest.load(make_latent_manifest(tmp_path, train=48, validation=16))
    shape = (4, 8, 8)
    config = load_training(tiny_page(tmp_path, manifest.path))
    draws = DrawSpec(normals={"noise": shape, "posterior": shape}, uniforms=("timestep",))
    dataset = build.build_dataset(config, manifest, draws)
    seen: dict[bytes, tuple[str, int]] = {}
    timesteps = set()
    for rank in range(2):
        sizes = {"batch_size": 8, "micro_batch_size": 2, "world_size": 2, "rank": rank}
        batches = train_loader(dataset, start_step=0, max_steps=12, num_workers=0, prefetch=1, **sizes)
        for _, _, batch in batches:
            timesteps |= set(batch.uniforms["timestep"].tolist())
            for name, drawn in batch.normals.items():
                for position, noise in zip(batch.positions.tolist(), drawn, strict=True):
                    for channel, values in enumerate(noise):  # channels of one draw differ, too
                        key = values.numpy().tobytes()
                        assert key not in seen, (name, position, channel, seen[key])
                        seen[key] = (name, position)
    assert len(seen) == 96 * 2 * 4
    assert len(timesteps) == 96
    assert {position for _, position in seen.values()} == set(range(96))


class Told(nn.Module):
    """A denoiser that answers 0 and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        self.shown, self.timesteps, self.conditioning = latents, timesteps, conditioning
        return self.weight * latents


class Words(nn.Module):
    """Tokens are what the shards hold; the null condition is a token that they never hold."""

    NULL = -1.0

    def forward(self, field: torch.Tensor) -> Conditioning:
        return Conditioning(tokens=field.float().unsqueeze(-1))

    def null(self, batch: int) -> Conditioning:
        return Conditioning(tokens=torch.full((batch, 1, 1), self.NULL))


def make_task(of: DiffusionProcess, **changes) -> LatentDiffusionTask:
    autoencoder = AutoencoderKL(
        latent_channels=4,
        channels=[8, 8],
        layers_per_block=1,
        attention_in_middle=False,
        norm_groups=4,
        scaling_factor=1.0,
    )
    values = {
        "denoiser": Told(),
        "conditioner": Words(),
        "autoencoder": autoencoder,
        "process": of,
        "latent_shape": (4, 1, 1),
        "condition_dropout": 0.1,
        "loss_weighting": None,
        "latents": "mean",
    }
    return LatentDiffusionTask(**(values | changes))


def make_batch(task: LatentDiffusionTask, size: int, *, seed: int = 3, timestep: torch.Tensor | None = None) -> Batch:
    """What the loader hands out for the positions 0 ... size - 1, on random moments."""
    moments = torch.randn(size, 8, 1, 1, generator=torch.Generator().manual_seed(seed))
    drawn = {
        name: np.concatenate([uniforms(seed, name, place) for place in range(size)]) for name in task.draws.uniforms
    }
    if timestep is not None:
        drawn["timestep"] = (timestep.double().numpy() + 0.5) / T
    noises = {
        name: torch.from_numpy(np.stack([normals(seed, name, place, shape) for place in range(size)]))
        for name, shape in task.draws.normals.items()
    }
    return Batch(
        keys=tuple(str(place) for place in range(size)),
        positions=torch.arange(size),
        fields={"moments": moments, "tokens": torch.zeros(size, 1, dtype=torch.int64)},
        normals=noises,
        uniforms={name: torch.from_numpy(values) for name, values in drawn.items()},
        weights=torch.ones(size),
    )


@pytest.fixture(scope="module")
def many() -> Batch:
    """1e5 positions; one draw of them serves all rates."""
    return make_batch(make_task(OBJECTIVES["linear, epsilon"]), 100_000)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.15, 0.5])
def test_conditions_are_dropped_as_often_as_asked(rate: float, many: Batch) -> None:
    """Counted where the denoiser is told, within four standard deviations over 1e5 draws."""
    task = make_task(OBJECTIVES["linear, epsilon"], condition_dropout=rate)
    task.loss("denoiser", many, 0)
    dropped = int((task.denoiser.conditioning.tokens == Words.NULL).sum())
    spread = (rate * (1 - rate) * len(many)) ** 0.5
    assert abs(dropped - rate * len(many)) < 4 * spread


def test_timesteps_and_drops_are_not_related(many: Batch) -> None:
    """Neither is drawn from the other's stream: their correlation is that of chance."""
    columns = torch.stack([many.uniforms["timestep"], many.uniforms["condition_drop"]])
    assert abs(torch.corrcoef(columns)[0, 1].item()) < 4 / len(many) ** 0.5


# Weights and targets --------------------------------------------------------------------------------------------------


@every_objective
def test_min_snr_is_finite_at_every_level_and_beyond(of: DiffusionProcess) -> None:
    levels = torch.cat([of.snr(torch.arange(T)), torch.tensor([0.0, 1e-30, 1e30, torch.inf])])
    weights = min_snr(levels, 5.0, of.prediction_type)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert weights.max() <= 5.0


@every_objective
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_items_targets_and_weights_are_their_closed_forms_at_every_timestep(
    of: DiffusionProcess, gamma: float | None
) -> None:
    """Through the task, from stored moments to losses; the denoiser answers 0, so its error is the target itself."""
    task = make_task(of, loss_weighting=gamma)
    batch = make_batch(task, T, timestep=torch.arange(T))
    output = task.loss("denoiser", batch, 0)
    assert task.denoiser.timesteps.tolist() == list(range(T))
    alpha, sigma = (values.reshape(T, 1, 1, 1) for values in levels_by_hand(of))
    clean = batch.fields["moments"][:, :4].double().numpy()
    noise = batch.normals["noise"].double().numpy()
    assert np.abs(task.denoiser.shown.double().numpy() - (alpha * clean + sigma * noise)).max() < 2e-6
    wanted = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": alpha * noise - sigma * clean,
        "flow": noise - clean,
    }[of.prediction_type]
    mse = (wanted**2).mean((1, 2, 3))
    np.testing.assert_allclose(output.metrics["mse"].numpy(), mse, rtol=2e-5, atol=1e-9)
    a, s = alpha.ravel(), sigma.ravel()
    with np.errstate(divide="ignore"):
        bound = np.minimum((a / s) ** 2, 5.0)  # of the clean item's error
    weight = {"epsilon": np.minimum(5.0 * s**2 / np.maximum(a, 1e-30) ** 2, 1.0), "sample": bound}
    weight |= {"v_prediction": bound * s**2, "flow": bound * s**2}  # v: 1 / (SNR + 1) = s^2; flow: t^2
    expected = mse if gamma is None else mse * weight[of.prediction_type]
    np.testing.assert_allclose(output.losses.detach().numpy(), expected, rtol=1e-4, atol=1e-7)


@every_objective
def test_a_perfect_prediction_leads_back_at_every_timestep(of: DiffusionProcess) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, T, 3, generator=generator, dtype=torch.float64)
    alpha_bar = of.alpha_bar_at(torch.arange(T))
    noised = add_noise(clean, noise, alpha_bar)
    perfect = target(of.prediction_type, clean, noise, alpha_bar)
    clean_back, noise_back = to_clean_and_noise(of.prediction_type, perfect, noised, alpha_bar)
    torch.testing.assert_close(clean_back, clean, rtol=0, atol=1e-9)
    torch.testing.assert_close(noise_back, noise, rtol=0, atol=1e-9)


# Samples --------------------------------------------------------------------------------------------------------------

MEAN, STD = 1.5, 0.5


def best_denoiser(of: DiffusionProcess):
    """The least-squares affine fit to what training shows and asks for, at every level, by exact quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    clean, noise = (torch.from_numpy(grid.ravel()).repeat(T) for grid in np.meshgrid(MEAN + STD * nodes, nodes))
    share = torch.from_numpy((np.outer(weights, weights) / weights.sum() ** 2).ravel())
    alpha_bar = of.alpha_bar_float64.repeat_interleave(16)
    shown = of.denoiser_input(add_noise(clean, noise, alpha_bar), alpha_bar).view(T, 16)
    wanted = target(of.prediction_type, clean, noise, alpha_bar).view(T, 16)
    middle, wanted_middle = (shown * share).sum(1), (wanted * share).sum(1)
    deviation = shown - middle[:, None]
    slope = (deviation * wanted * share).sum(1) / (deviation.square() * share).sum(1)
    offset = wanted_middle - slope * middle

    def model(noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return slope[timesteps, None] * noised + offset[timesteps, None]

    return model


def sampled_mean_and_std(of: DiffusionProcess, model, settings: SamplerSettings) -> tuple[float, float]:
    """Of what a sampler makes of normal noise: its response to no noise, and to unit noise at each place alone."""
    num_draws = (settings.num_steps or T) + 1
    level = of.alpha_bar_float64[-1]
    spread = (level * STD**2 + 1 - level).sqrt()  # where the forward process ends: pure noise, or nearly so
    unit = torch.eye(num_draws + 1, num_draws, dtype=torch.float64)  # the last row draws nothing
    end = run_sampler(
        settings,
        model,
        level.sqrt() * MEAN + spread * unit[:, :1],
        process=of,
        noise_fn=lambda index: unit[:, index + 1, None],
    ).squeeze(1)
    return end[-1].item(), (end[:-1] - end[-1]).norm().item()


SAMPLERS = {
    "ddim": SamplerSettings(sampler="ddim", num_steps=T, spacing="trailing", final_alpha_bar="one"),
    "ddim, eta 1": SamplerSettings(sampler="ddim", num_steps=T, spacing="trailing", final_alpha_bar="one", eta=1.0),
    "ddpm": SamplerSettings(sampler="ddpm", num_steps=None),
    "euler": SamplerSettings(sampler="euler", num_steps=T, spacing="trailing"),
}
every_sampler = pytest.mark.parametrize("settings", SAMPLERS.values(), ids=SAMPLERS)
TOLERANCE = 0.006


@every_sampler
@every_objective
def test_samples_have_the_distribution_of_the_data(of: DiffusionProcess, settings: SamplerSettings) -> None:
    mean, std = sampled_mean_and_std(of, best_denoiser(of), settings)
    assert mean == pytest.approx(MEAN, abs=TOLERANCE)
    assert std == pytest.approx(STD, abs=TOLERANCE)


@every_sampler
@every_objective
def test_the_tolerance_catches_a_wrong_coefficient(of: DiffusionProcess, settings: SamplerSettings) -> None:
    """A prediction that is 2 % too large anywhere on the way, as a wrong factor in target or step would make it."""
    right = best_denoiser(of)
    mean, std = sampled_mean_and_std(of, lambda noised, timesteps: 1.02 * right(noised, timesteps), settings)
    assert max(abs(mean - MEAN), abs(std - STD)) > TOLERANCE
