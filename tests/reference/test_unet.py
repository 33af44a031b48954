"""Our UNet against diffusers': names, outputs and every gradient."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sdtrain.denoisers.load import load_unet, save_denoiser
from sdtrain.denoisers.unet import PRESETS, UNet
from sdtrain.denoisers.unet_config import from_diffusers
from sdtrain.nn.folders import load_strictly
from sdtrain.records import Conditioning

CROSS = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 96, 96),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "norm_num_groups": 16,
}
PIXELS = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 16,
}
VARIANTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "sd15": (UNet2DConditionModel, {**CROSS, "attention_head_dim": 8}),
    "sd2": (UNet2DConditionModel, {**CROSS, "attention_head_dim": (2, 4, 6, 6), "use_linear_projection": True}),
    "deep transformers": (
        UNet2DConditionModel,
        {**CROSS, "attention_head_dim": 4, "transformer_layers_per_block": 2, "layers_per_block": 1},
    ),
    "scale shift with context": (
        UNet2DConditionModel,
        {**CROSS, "attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift"},
    ),
    "self and cross": (
        UNet2DConditionModel,
        {
            **CROSS,
            "attention_head_dim": (8, 12, 12, 8),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
    "self": (UNet2DModel, {**PIXELS, "attention_head_dim": 16}),
    "self, one head": (UNet2DModel, {**PIXELS, "attention_head_dim": 64, "layers_per_block": 1}),
    "self, scale shift": (
        UNet2DModel,
        {**PIXELS, "attention_head_dim": 8, "resnet_time_scale_shift": "scale_shift", "norm_eps": 1e-6},
    ),
}


def errors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, float]:
    """||a - b|| / ||b|| over all tensors together, and the worst of single tensors (against 1e-6 of all at least)."""
    norms = {name: float(tensor.double().norm()) for name, tensor in theirs.items()}
    return relative({name: float((ours[name].double() - theirs[name].double()).norm()) for name in theirs}, norms)


def relative(differences: Mapping[str, float], norms: Mapping[str, float]) -> tuple[float, float]:
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total > 0
    zero_on_paper = {name for name in norms if name.endswith("to_k.bias")}  # softmax does not see a shift of all keys
    assert all(max(norms[name], differences[name]) < 1e-8 * total for name in zero_on_paper)
    single = max(d / max(norms[name], 1e-6 * total) for name, d in differences.items() if name not in zero_on_paper)
    return sum(d**2 for d in differences.values()) ** 0.5 / total, single


def inputs(in_channels: int, context_dim: int | None, *, size: int = 16) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, in_channels, size, size, generator=generator)
    tokens = None if context_dim is None else torch.randn(2, 7, context_dim, generator=generator)
    return latents, torch.tensor([3, 871]), Conditioning(tokens=tokens)


def predict(network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    if isinstance(network, UNet):
        return network(latents, timesteps, conditioning)
    if conditioning.tokens is None:
        return network(latents, timesteps).sample
    mask = conditioning.mask
    return network(latents, timesteps, encoder_hidden_states=conditioning.tokens, encoder_attention_mask=mask).sample


def outputs_and_gradients(network: nn.Module, *given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    prediction = predict(network, *given)
    weights = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(2))
    (prediction * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return prediction.detach(), gradients


def assert_parity(ours: UNet, theirs: nn.Module, given: tuple[Any, ...], *, tolerance: float = 1e-5) -> None:
    prediction, gradients = outputs_and_gradients(theirs, *given)
    assert set(gradients) == {name for name, _ in theirs.named_parameters()}
    for mode in ("none", "blocks"):
        ours.set_gradient_checkpointing(mode)
        our_prediction, our_gradients = outputs_and_gradients(ours, *given)
        assert errors({"": our_prediction}, {"": prediction})[0] < tolerance
        assert set(our_gradients) == set(gradients)
        together, single = errors(our_gradients, gradients)
        assert together < tolerance
        assert single < 2 * tolerance


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_weights_load_strictly_and_compute_the_same(variant: str, tmp_path: Path) -> None:
    class_, kwargs = VARIANTS[variant]
    torch.manual_seed(0)
    theirs = class_(**kwargs)
    theirs.save_pretrained(tmp_path)
    ours = load_unet(str(tmp_path))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert_parity(ours, theirs, inputs(kwargs["in_channels"], kwargs.get("cross_attention_dim")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_weights_open_in_diffusers(variant: str, tmp_path: Path) -> None:
    class_, kwargs = VARIANTS[variant]
    class_(**kwargs).save_pretrained(tmp_path / "theirs")
    ours = load_unet(str(tmp_path / "theirs"))
    save_denoiser(ours, tmp_path / "ours")
    theirs, report = class_.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    given = inputs(kwargs["in_channels"], kwargs.get("cross_attention_dim"))
    with torch.no_grad():
        assert errors({"": predict(ours, *given)}, {"": predict(theirs, *given)})[0] < 1e-5


def test_masked_context_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**VARIANTS["sd15"][1])
    theirs.save_pretrained(tmp_path)
    latents, timesteps, conditioning = inputs(4, 24)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    masked = Conditioning(tokens=conditioning.tokens, mask=mask)
    ours = load_unet(str(tmp_path))
    assert_parity(ours, theirs, (latents, timesteps, masked))
    with torch.no_grad():
        assert errors({"": ours(latents, timesteps, conditioning)}, {"": ours(latents, timesteps, masked)})[0] > 1e-4


def test_normed_context_is_that_of_diffusers_attention() -> None:
    """diffusers' UNet takes `cross_attention_norm` and ignores it, so its own attention is put in with the norm on."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**VARIANTS["sd15"][1], cross_attention_norm="layer_norm")
    assert not any("norm_cross" in name for name in theirs.state_dict())
    for module in theirs.modules():
        if hasattr(module, "attn2"):
            width = module.attn2.to_q.in_features
            module.attn2 = Attention(
                query_dim=width, cross_attention_dim=24, heads=8, dim_head=width // 8, cross_attention_norm="layer_norm"
            )
    for name, parameter in theirs.named_parameters():
        if "norm_cross" in name:
            nn.init.normal_(parameter)
    config = dict(UNet2DConditionModel(**VARIANTS["sd15"][1]).config) | {"_class_name": "UNet2DConditionModel"}
    arch = from_diffusers(config)
    ours = UNet(**(arch | {"cross_attention_norm": "layer_norm"}))
    load_strictly(ours, theirs.state_dict(), where=Path("theirs"))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert_parity(ours, theirs, inputs(4, 24))


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"readme"}))
def test_presets_are_diffusers_networks(preset: str) -> None:
    with torch.device("meta"):
        ours = UNet(**PRESETS[preset])
        config = ours.diffusers_config()
        class_ = {"UNet2DConditionModel": UNet2DConditionModel, "UNet2DModel": UNet2DModel}[config["_class_name"]]
        theirs = class_.from_config(config)
    shapes = [(name, tensor.shape) for name, tensor in ours.state_dict().items()]
    assert shapes == [(name, tensor.shape) for name, tensor in theirs.state_dict().items()]


class GradientErrors:
    """Compares gradients as they arrive and frees them, so that two sets of 860M never exist."""

    def __init__(self, theirs: dict[str, Tensor]) -> None:
        self.theirs = theirs
        self.differences: dict[str, float] = {}

    def watch(self, network: nn.Module) -> list[Any]:
        def compare(name: str, parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            self.differences[name] = float(parameter.grad.sub_(self.theirs[name]).norm())
            parameter.grad = None

        return [
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: compare(name, p))
            for name, parameter in network.named_parameters()
        ]

    def worst(self) -> tuple[float, float]:
        assert set(self.differences) == set(self.theirs)
        return relative(self.differences, {name: float(tensor.norm()) for name, tensor in self.theirs.items()})


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Threads that tests side by side must not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("all_cores")
def test_full_width_stable_diffusion_has_the_same_outputs_and_gradients() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        ours = UNet(**PRESETS["sd15"])
    theirs = UNet2DConditionModel.from_config(ours.diffusers_config())
    ours.load_state_dict(theirs.state_dict(keep_vars=True), assign=True)
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    latents, timesteps, conditioning = inputs(4, 768)
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))

    prediction = predict(theirs, latents, timesteps, conditioning)
    (prediction * weights).sum().backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        gradients[name], parameter.grad = parameter.grad, None

    for mode in ("none", "blocks"):
        ours.set_gradient_checkpointing(mode)
        comparison = GradientErrors(gradients)
        hooks = comparison.watch(ours)
        our_prediction = ours(latents, timesteps, conditioning)
        (our_prediction * weights).sum().backward()
        for hook in hooks:
            hook.remove()
        together, single = comparison.worst()
        output_error = errors({"": our_prediction.detach()}, {"": prediction.detach()})[0]
        print(f"checkpointing {mode}: output {output_error:.1e}, gradients {together:.1e}, worst tensor {single:.1e}")
        assert output_error < 1e-4
        assert together < 1e-4
        assert single < 1e-4
