from __future__ import annotations

from typing import Any

import pytest
import torch

from sdtrain.denoisers.dit import PRESETS, DiT
from sdtrain.denoisers.dit_config import fits_diffusers, from_diffusers, to_diffusers, to_diffusers_weights
from sdtrain.errors import ConfigError

# transformer/config.json of facebook/DiT-XL-2-256, as published.
PUBLISHED: dict[str, Any] = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
    "use_linear_projection": False,
}
SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "width": 24,
    "num_layers": 3,
    "num_heads": 2,
    "patch_size": 2,
    "sample_size": 8,
    "zero_init": False,
}


def test_the_published_config_is_the_paper_s_network() -> None:
    arch, _ = from_diffusers(PUBLISHED, {})
    paper = {**PRESETS["dit_xl_2"], "out_channels": 8, "shared_embedding": False}
    assert arch == {**paper, "dropout": 0.0, "norm_eps": 1e-5}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("num_classes", [None, 7])
def test_networks_go_both_ways(shared: bool, num_classes: int | None) -> None:
    dit = DiT(**SMALL, shared_embedding=shared, num_classes=num_classes)
    state, config = dit.state_dict(), to_diffusers(dit.arch)
    assert config["_class_name"] == "DiTTransformer2DModel"
    weights = to_diffusers_weights(dit.arch, state)
    assert not any(name.startswith("emb.") for name in weights)
    assert all(f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight" in weights for i in range(3))
    arch, back = from_diffusers(config, weights)
    assert DiT(**arch).arch == dit.arch
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_copies_are_copies() -> None:
    """safetensors refuses tensors that share their memory."""
    dit = DiT(**SMALL, num_classes=7)
    weights = to_diffusers_weights(dit.arch, dit.state_dict())
    assert len({tensor.data_ptr() for tensor in weights.values()}) == len(weights)


def test_one_embedding_that_differs_keeps_all_of_them() -> None:
    dit = DiT(**SMALL, num_classes=7)
    weights = to_diffusers_weights(dit.arch, dit.state_dict())
    weights["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"][0] += 1
    arch, back = from_diffusers(to_diffusers(dit.arch), weights)
    assert (arch["shared_embedding"], arch["num_classes"]) == (False, 7)
    assert back.keys() == weights.keys()


@pytest.mark.parametrize(
    "changes",
    [{"context_dim": 12}, {"context_dim": 12, "context": "adaln"}, {"sinusoid_width": 24}],
)
def test_networks_that_diffusers_lacks_carry_our_class_name(changes: dict[str, Any]) -> None:
    dit = DiT(**SMALL, **changes)
    config, state = to_diffusers(dit.arch), dit.state_dict()
    assert not fits_diffusers(dit.arch)
    assert config == {"_class_name": "sdtrain.DiT", **dit.arch}
    assert to_diffusers_weights(dit.arch, state).keys() == state.keys()
    arch, back = from_diffusers(config, state)
    assert (arch, back.keys()) == (dit.arch, state.keys())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "SD3Transformer2DModel"},
            "DiT config: _class_name is 'SD3Transformer2DModel'; allowed: DiTTransformer2DModel, Transformer2DModel, "
            "sdtrain.DiT",
        ),
        (
            {"num_layers": None, "patch_size": None},
            "DiT config: num_layers, patch_size missing; a config.json that diffusers wrote has them",
        ),
        (
            {"norm_type": "ada_norm_single"},
            "DiT config: norm_type is 'ada_norm_single'; this DiT has only 'ada_norm_zero'",
        ),
        ({"activation_fn": "geglu"}, "DiT config: activation_fn is 'geglu'; this DiT has only 'gelu-approximate'"),
        (
            {"cross_attention_dim": 768},
            "DiT config: cross_attention_dim is 768; this DiT does not have that setting, only without it",
        ),
    ],
)
def test_configs_that_are_none_of_ours(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_diffusers(PUBLISHED | changes, {})
    assert str(error.value) == message
