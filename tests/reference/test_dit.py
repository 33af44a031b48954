"""Our DiT against diffusers': names, outputs and every gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, Transformer2DModel
from torch import Tensor, nn

from sdtrain.denoisers.dit import PRESETS, DiT
from sdtrain.records import Conditioning

SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 8,
    "width": 48,
    "num_layers": 3,
    "num_heads": 3,
    "patch_size": 2,
    "sample_size": 16,
    "num_classes": 7,
    "shared_embedding": False,
    "norm_eps": 1e-5,
    "zero_init": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "one embedding per block": SMALL,
    "patches of 4": {**SMALL, "patch_size": 4, "out_channels": 4},
    "one embedding for all": {**SMALL, "shared_embedding": True, "norm_eps": 1e-6},
}


def theirs_of(arch: Mapping[str, Any]) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=arch["num_heads"],
        attention_head_dim=arch["width"] // arch["num_heads"],
        in_channels=arch["in_channels"],
        out_channels=arch["out_channels"],
        num_layers=arch["num_layers"],
        patch_size=arch["patch_size"],
        sample_size=arch["sample_size"],
        num_embeds_ada_norm=arch["num_classes"],
        norm_eps=arch["norm_eps"],
    )


def inputs(dit: DiT, *, size: int = 16) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, dit.in_channels, size, size, generator=generator)
    tokens = None if dit.context_dim is None else torch.randn(3, 7, dit.context_dim, generator=generator)
    mask = None if tokens is None else torch.tensor([[True] * 7, [True] * 3 + [False] * 4, [True] * 7])
    labels = None if dit.num_classes is None else torch.tensor([2, 0, dit.num_classes])
    return latents, torch.tensor([3, 871, 999]), Conditioning(tokens=tokens, mask=mask, labels=labels)


def predict(network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Diffusers' networks in evaluation mode: in training they drop classes at random themselves."""
    match network:
        case DiT():
            return network(latents, timesteps, conditioning)
        case Transformer2DModel():
            return network.eval()(
                latents,
                timestep=timesteps,
                class_labels=conditioning.labels,
                encoder_hidden_states=conditioning.tokens,
                encoder_attention_mask=conditioning.mask,
            ).sample
        case _:
            return network.eval()(latents, timestep=timesteps, class_labels=conditioning.labels).sample


def outputs_and_gradients(network: nn.Module, *given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    prediction = predict(network, *given)
    weights = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(2))
    (prediction * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    assert set(gradients) == {name for name, _ in network.named_parameters()}
    return prediction.detach(), gradients


def per_block(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a network of theirs whose blocks all hold our one embedding: added up."""
    merged: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        place = "emb." + name.split(".norm1.emb.")[1] if ".norm1.emb." in name else name
        merged[place] = merged[place] + gradient if place in merged else gradient
    return merged


def assert_parity(ours: DiT, theirs: nn.Module, given: tuple[Any, ...]) -> None:
    prediction, gradients = outputs_and_gradients(theirs, *given)
    if ours.emb is not None:
        gradients = per_block(gradients)
    for mode in ("none", "blocks"):
        ours.set_gradient_checkpointing(mode)
        our_prediction, our_gradients = outputs_and_gradients(ours, *given)
        assert error({"": our_prediction}, {"": prediction}) < 1e-5
        assert set(our_gradients) == set(gradients)
        assert error(our_gradients, gradients) < 1e-5
        total = sum(float(gradient.norm()) ** 2 for gradient in gradients.values()) ** 0.5
        for name, gradient in gradients.items():
            difference = float((our_gradients[name] - gradient).norm())
            if name.endswith("to_k.bias"):  # zero on paper: softmax does not see a shift of all keys
                assert max(difference, float(gradient.norm())) < 1e-6 * total, name
            else:
                assert difference < 2e-5 * max(float(gradient.norm()), 1e-6 * total), name


def error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors together."""
    norm = sum(float(tensor.norm()) ** 2 for tensor in theirs.values()) ** 0.5
    assert norm > 0
    return sum(float((ours[name] - tensor).norm()) ** 2 for name, tensor in theirs.items()) ** 0.5 / norm


def loud(network: nn.Module) -> None:
    """Weights large enough that every part of the network is heard in the output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)


def spread(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Our one embedding, written into each of their blocks."""
    spread_out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        shared = name.startswith("emb.")
        for place in [f"transformer_blocks.{i}.norm1.{name}" for i in range(num_layers)] if shared else [name]:
            spread_out[place] = tensor
    return spread_out


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_weights_compute_the_same(variant: str) -> None:
    arch = VARIANTS[variant]
    ours, theirs = DiT(**arch), theirs_of(arch)
    loud(ours)
    if not arch["shared_embedding"]:
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    theirs.load_state_dict(spread(ours.state_dict(), arch["num_layers"]) if ours.emb else ours.state_dict())
    assert_parity(ours, theirs, inputs(ours))


def test_latents_of_another_size_are_stretched_over_the_same_positions() -> None:
    ours, theirs = DiT(**SMALL), theirs_of(SMALL)
    loud(ours)
    theirs.load_state_dict(ours.state_dict())
    for size in (8, 24):
        given = inputs(ours, size=size)
        assert error({"": predict(ours, *given).detach()}, {"": predict(theirs, *given).detach()}) < 1e-5


@pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning")
def test_cross_attention_is_that_of_diffusers_block() -> None:
    """diffusers' DiT has no cross-attention, but the transformer that it was cut from does."""
    arch = {**SMALL, "context_dim": 20}
    ours = DiT(**arch)
    loud(ours)
    theirs = Transformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        patch_size=2,
        sample_size=16,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=7,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-5,
        cross_attention_dim=20,
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert_parity(ours, theirs, inputs(ours))


@pytest.mark.parametrize("preset", ["dit_small", "dit_large"])
def test_the_benchmark_presets_are_diffusers_networks(preset: str) -> None:
    with torch.device("meta"):
        ours, theirs = DiT(**PRESETS[preset]), theirs_of(PRESETS[preset])
    shapes = [(name, tensor.shape) for name, tensor in ours.state_dict().items()]
    assert shapes == [(name, tensor.shape) for name, tensor in theirs.state_dict().items()]


def test_full_width_has_the_same_outputs_and_gradients() -> None:
    """The width, heads and 256 tokens of DiT-B/2; of its twelve equal blocks two."""
    arch = {**PRESETS["dit_b_2"], "num_layers": 2, "shared_embedding": False, "zero_init": False}
    torch.manual_seed(0)
    ours = DiT(**arch)
    theirs = theirs_of({"norm_eps": 1e-6, **arch})
    theirs.load_state_dict(ours.state_dict())
    assert_parity(ours, theirs, inputs(ours, size=32))
