from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sdtrain.autoencoders.kl import PRESETS, AutoencoderKL
from sdtrain.errors import ConfigError

SMALL: dict[str, Any] = {
    "latent_channels": 4,
    "channels": [8, 16],
    "layers_per_block": 1,
    "attention_in_middle": True,
    "norm_groups": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}

# vae/config.json of stabilityai/sd-vae-ft-mse, as published: no scaling factor, so diffusers' default holds.
SD_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def small(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**(SMALL | changes))


def test_stable_diffusion_preset_has_the_published_size_and_shapes() -> None:
    with torch.device("meta"):
        autoencoder = AutoencoderKL(**PRESETS["sd"])
        assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 83_653_863
        assert autoencoder.encode(torch.empty(1, 3, 512, 512)).shape == (1, 8, 64, 64)
        assert autoencoder.decode(torch.empty(1, 4, 64, 64)).shape == (1, 3, 512, 512)
    assert autoencoder.downsample_factor == 8
    assert autoencoder.scaling_factor == 0.18215


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 2),
        ({"channels": [8, 16, 16], "quant_kernel_size": 3, "attention_in_middle": False}, 4),
        (PRESETS["tiny"], 8),
        ({"in_channels": 1, "layers_per_block": 2}, 2),
    ],
)
def test_sizes_of_other_autoencoders(changes: dict[str, Any], factor: int) -> None:
    autoencoder = small(**changes)
    assert autoencoder.downsample_factor == factor
    images = torch.rand(2, autoencoder.in_channels, 16, 24)
    moments = autoencoder.encode(images)
    assert moments.shape == (2, 8, 16 // factor, 24 // factor)
    assert autoencoder.decode(autoencoder.posterior_mean(moments)).shape == images.shape


def test_large_quant_convolutions_see_neighbours() -> None:
    """A 3x3 kernel before the latents spreads one latent pixel; a 1x1 kernel does not."""
    for kernel, touched in ((1, 1), (3, 9)):
        autoencoder = small(quant_kernel_size=kernel)
        values = torch.zeros(1, 8, 5, 5)
        values[0, :, 2, 2] = 1.0
        with torch.no_grad():
            spread = autoencoder.quant_conv(values) - autoencoder.quant_conv(torch.zeros_like(values))
        assert int((spread.abs().sum(dim=1) > 0).sum()) == touched


def test_scale_and_unscale_undo_each_other() -> None:
    autoencoder, raw = small(), torch.randn(2, 4, 3, 3)
    assert torch.equal(autoencoder.scale(raw), (raw - 0.25) * 0.5)
    torch.testing.assert_close(autoencoder.unscale(autoencoder.scale(raw)), raw)


def test_posterior_sample_has_the_moments_that_were_given() -> None:
    moments = torch.cat([torch.full((1, 1, 256, 256), 2.0), torch.full((1, 1, 256, 256), math.log(9.0))], dim=1)
    noise = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    sample = AutoencoderKL.posterior_sample(moments, noise)
    assert float(sample.mean()) == pytest.approx(2.0, abs=0.05)
    assert float(sample.std()) == pytest.approx(3.0, abs=0.05)
    assert torch.equal(AutoencoderKL.posterior_sample(moments, torch.zeros_like(noise)), moments[:, :1])


def test_stored_half_precision_moments_are_sampled_in_float32() -> None:
    """exp(20 / 2) = 22026 times noise overflows nothing, and the clamp is applied before."""
    moments = torch.cat([torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 500.0)], dim=1).half()
    sample = AutoencoderKL.posterior_sample(moments, torch.full((1, 1, 1, 1), 4.0))
    assert sample.dtype == torch.float32
    assert float(sample) == pytest.approx(4 * math.exp(10), rel=1e-6)
    assert AutoencoderKL.posterior_mean(moments).dtype == torch.float32


def test_kl_of_the_standard_normal_is_zero_and_sums_over_dimensions() -> None:
    assert torch.equal(AutoencoderKL.kl(torch.zeros(3, 2, 4, 4)), torch.zeros(3))
    mean_one = torch.cat([torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)], dim=1)
    assert float(AutoencoderKL.kl(mean_one)) == pytest.approx(16 / 2)
    variance_four = torch.cat([torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), math.log(4.0))], dim=1)
    assert float(AutoencoderKL.kl(variance_four)) == pytest.approx(0.5 * (4 - 1 - math.log(4.0)))


def test_training_call_is_encode_sample_decode() -> None:
    autoencoder, images, noise = small(), torch.rand(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    reconstructions, moments = autoencoder(images, noise)
    assert torch.equal(moments, autoencoder.encode(images))
    assert torch.equal(reconstructions, autoencoder.decode(autoencoder.posterior_sample(moments, noise)))
    reconstructions.sum().backward()
    assert [name for name, parameter in autoencoder.named_parameters() if parameter.grad is None] == []


def test_the_published_config_is_our_preset() -> None:
    with torch.device("meta"):
        published, preset = AutoencoderKL.from_diffusers_config(SD_VAE), AutoencoderKL(**PRESETS["sd"])
    assert published.diffusers_config() == preset.diffusers_config()
    config = preset.diffusers_config()
    assert {key: config[key] for key in SD_VAE if key not in ("_diffusers_version", "sample_size")} == {
        key: value for key, value in SD_VAE.items() if key not in ("_diffusers_version", "sample_size")
    }


@pytest.mark.parametrize("kernel", [1, 3])
def test_config_goes_both_ways(kernel: int) -> None:
    autoencoder = small(quant_kernel_size=kernel)
    config = autoencoder.diffusers_config()
    assert config["_class_name"] == ("AutoencoderKL" if kernel == 1 else "sdtrain.AutoencoderKL")
    again = AutoencoderKL.from_diffusers_config(config)
    assert again.diffusers_config() == config
    assert again.shift_factor == 0.25
    assert [(n, p.shape) for n, p in again.named_parameters()] == [
        (n, p.shape) for n, p in autoencoder.named_parameters()
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"channels": [8, 18]},
            "autoencoder: channels [8, 18] must be multiples of norm_groups=4; change either",
        ),
        ({"channels": []}, "autoencoder: channels [] must be multiples of norm_groups=4; change either"),
        ({"quant_kernel_size": 5}, "autoencoder: quant_kernel_size is 5; allowed: 1, 3"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        small(**changes)
    assert str(error.value) == message


def test_images_that_do_not_fit() -> None:
    with pytest.raises(ConfigError) as error:
        small().encode(torch.zeros(1, 3, 7, 8))
    assert str(error.value) == (
        "autoencoder: images are 7x8; height and width must be multiples of 2; choose another image size"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "VQModel"},
            "autoencoder config: _class_name is 'VQModel'; allowed: AutoencoderKL, sdtrain.AutoencoderKL",
        ),
        ({"use_quant_conv": False}, "autoencoder config: use_quant_conv is False; this autoencoder has only True"),
        ({"latents_mean": [0.0]}, "autoencoder config: latents_mean is [0.0]; this autoencoder has only None"),
        ({"out_channels": 4}, "autoencoder config: out_channels is 4; this autoencoder has only 3"),
    ],
)
def test_settings_that_this_autoencoder_lacks(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        AutoencoderKL.from_diffusers_config(SD_VAE | changes)
    assert str(error.value) == message
