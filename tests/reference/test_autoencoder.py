"""Our KL autoencoder against diffusers': names, moments, images, gradients and the posterior."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdtrain.autoencoders.kl import PRESETS, AutoencoderKL
from sdtrain.autoencoders.load import load_autoencoder, save_autoencoder

VARIANTS: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (16, 32, 48, 48), "layers_per_block": 2, "norm_num_groups": 8},
    "f4, no attention": {
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
        "latent_channels": 8,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    },
}


def diffusers_autoencoder(kwargs: Mapping[str, Any]) -> diffusers.AutoencoderKL:
    levels = len(kwargs["block_out_channels"])
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **kwargs
    )


def error(ours: Tensor, theirs: Tensor) -> float:
    assert float(theirs.norm()) > 0
    return float((ours - theirs).norm() / theirs.norm())


def gradient_errors(ours: nn.Module, theirs: nn.Module) -> tuple[float, float]:
    """||a - b|| / ||b|| over all gradients, and the worst of single ones; `to_k.bias` is zero on paper."""
    pairs = {
        name: (mine.grad, other.grad)
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True)
    }
    norms = {name: float(b.norm()) for name, (_, b) in pairs.items() if b is not None}
    assert set(norms) == set(pairs)
    differences = {name: float((a - b).norm()) for name, (a, b) in pairs.items()}
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    single = max(d / max(norms[n], 1e-6 * total) for n, d in differences.items() if not n.endswith("to_k.bias"))
    return sum(d**2 for d in differences.values()) ** 0.5 / total, single


def run_both_ways(network: Any, images: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Moments and images; leaves gradients of a random projection of both."""
    if isinstance(network, AutoencoderKL):
        moments, decoded = network.encode(images), network.decode(latents)
    else:
        moments, decoded = network.encode(images).latent_dist.parameters, network.decode(latents).sample
    generator = torch.Generator().manual_seed(3)
    projected = (moments * torch.randn(moments.shape, generator=generator)).sum()
    (projected + (decoded * torch.randn(decoded.shape, generator=generator)).sum()).backward()
    return moments.detach(), decoded.detach()


def assert_parity(ours: AutoencoderKL, theirs: Any, *, size: int, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    side = size // ours.downsample_factor
    latents = torch.randn(2, ours.latent_channels, side, side, generator=generator)
    moments, decoded = run_both_ways(theirs, images, latents)
    our_moments, our_decoded = run_both_ways(ours, images, latents)
    assert our_moments.shape == (2, 2 * ours.latent_channels, side, side)
    assert error(our_moments, moments) < tolerance
    assert error(our_decoded, decoded) < tolerance
    together, single = gradient_errors(ours, theirs)
    print(f"gradients {together:.1e}, worst tensor {single:.1e}")
    assert together < tolerance
    assert single < 3 * tolerance


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_weights_load_strictly_and_compute_the_same(variant: str, tmp_path: Path) -> None:
    theirs = diffusers_autoencoder(VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    ours = load_autoencoder(str(tmp_path))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.scaling_factor == theirs.config["scaling_factor"]
    assert ours.shift_factor == (theirs.config["shift_factor"] or 0.0)
    assert_parity(ours, theirs, size=32, tolerance=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_weights_open_in_diffusers(variant: str, tmp_path: Path) -> None:
    diffusers_autoencoder(VARIANTS[variant]).save_pretrained(tmp_path / "theirs")
    ours = load_autoencoder(str(tmp_path / "theirs"))
    save_autoencoder(ours, tmp_path / "ours")
    theirs, report = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert theirs.config["scaling_factor"] == ours.scaling_factor
    assert_parity(ours, theirs, size=32, tolerance=1e-5)


def test_weights_with_the_attention_names_of_old_load_as_they_do_in_diffusers(tmp_path: Path) -> None:
    theirs = diffusers_autoencoder(VARIANTS["sd"])
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(path).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in renamed
    save_file(renamed, path, metadata={"format": "pt"})
    ours, reopened = load_autoencoder(str(tmp_path)), diffusers.AutoencoderKL.from_pretrained(tmp_path)
    for name, tensor in reopened.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_encoding_passes_the_quant_convolution() -> None:
    """The published system left it out; the moments then are other ones."""
    autoencoder = AutoencoderKL(**PRESETS["tiny"])
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(autoencoder.encode(images), autoencoder.quant_conv(autoencoder.encoder(images)))
        assert error(autoencoder.encode(images), autoencoder.encoder(images)) > 0.1


def test_posterior_is_diffusers_gaussian() -> None:
    moments = torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(0)) * 40  # beyond the clamps
    noise = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    theirs = DiagonalGaussianDistribution(moments)
    ours = AutoencoderKL.posterior_sample(moments, noise)
    torch.testing.assert_close(ours, theirs.mean + theirs.std * noise)
    torch.testing.assert_close(AutoencoderKL.posterior_mean(moments), theirs.mode())
    torch.testing.assert_close(AutoencoderKL.kl(moments), theirs.kl())


@pytest.mark.heavy
def test_full_width_has_the_same_outputs_and_gradients() -> None:
    ours = AutoencoderKL(**PRESETS["sd"])
    theirs = diffusers.AutoencoderKL.from_config(ours.diffusers_config())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert_parity(ours, theirs, size=64, tolerance=1e-4)
