from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sdtrain.denoisers.dit import PRESETS, DiT
from sdtrain.errors import ConfigError
from sdtrain.records import Conditioning
from sdtrain.tasks.parts import count_flops

SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "width": 24,
    "num_layers": 3,
    "num_heads": 2,
    "patch_size": 2,
    "sample_size": 8,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "unconditional": SMALL,
    "classes": {**SMALL, "num_classes": 5},
    "classes in every block": {**SMALL, "num_classes": 5, "shared_embedding": False},
    "cross-attention": {**SMALL, "context_dim": 12},
    "tokens in adaLN": {**SMALL, "context_dim": 12, "context": "adaln"},
}


def build(**changes: Any) -> DiT:
    torch.manual_seed(0)
    return DiT(**{**SMALL, "zero_init": False, **changes})


def inputs(dit: DiT, *, size: int = 8) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, dit.in_channels, size, size, generator=generator)
    tokens = None if dit.context_dim is None else torch.randn(2, 5, dit.context_dim, generator=generator)
    labels = None if dit.num_classes is None else torch.tensor([3, dit.num_classes])
    return latents, torch.tensor([0, 300]), Conditioning(tokens=tokens, labels=labels)


def count(**arguments: Any) -> tuple[int, int]:
    with torch.device("meta"):
        dit = DiT(**arguments)
    assert len(dit.state_dict()) == len(list(dit.parameters())), "positions are no weights"
    return sum(parameter.numel() for parameter in dit.parameters()), len(dit.state_dict())


@pytest.mark.parametrize(
    ("preset", "parameters", "tensors"),
    [
        ("dit_s_2", 32_858_896, 179),
        ("dit_b_2", 130_303_504, 179),
        ("dit_l_2", 457_824_272, 347),
        ("dit_xl_2", 674_816_272, 403),
        ("dit_small", 34_373_168, 120),
        ("dit_large", 147_476_784, 234),
        ("dit_celeba_hq", 129_927_952, 178),
    ],
)
def test_presets_have_their_number_of_parameters(preset: str, parameters: int, tensors: int) -> None:
    assert count(**PRESETS[preset]) == (parameters, tensors)


def test_every_preset_is_counted() -> None:
    (marks,) = test_presets_have_their_number_of_parameters.pytestmark
    assert {row[0] for row in marks.args[1]} == set(PRESETS)


@pytest.mark.parametrize(
    ("preset", "millions"), [("dit_s_2", 33), ("dit_b_2", 130), ("dit_l_2", 458), ("dit_xl_2", 675)]
)
def test_sizes_are_the_paper_s_with_its_variances(preset: str, millions: int) -> None:
    """Table 4 of arXiv:2212.09748, whose networks predict eight channels."""
    assert round(count(**{**PRESETS[preset], "out_channels": 8})[0] / 1e6) == millions


@pytest.mark.parametrize(
    ("preset", "size", "billions"),
    [
        ("dit_s_2", 32, 6.06),
        ("dit_b_2", 32, 23.01),
        ("dit_l_2", 32, 80.71),
        ("dit_xl_2", 32, 118.64),
        ("dit_xl_2", 64, 524.60),
    ],
)
def test_the_work_is_the_paper_s(preset: str, size: int, billions: float) -> None:
    """Tables 4 and 6 of arXiv:2212.09748 count a multiplication with its addition as one."""
    with torch.device("meta"):
        dit = DiT(**{**PRESETS[preset], "out_channels": 8})
        given = (torch.empty(1, 4, size, size), torch.zeros(1, dtype=torch.int64), Conditioning())
    assert count_flops(dit, *given) / 2e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("preset", ["dit_xl_2", "dit_large", "dit_celeba_hq"])
def test_presets_run(preset: str) -> None:
    """On the meta device: shapes of every layer fit, at full width, without computing."""
    with torch.device("meta"):
        dit = DiT(**PRESETS[preset])
        latents = torch.empty(2, dit.in_channels, 64, 64)
        assert dit(latents, torch.empty(2), Conditioning()).shape == latents.shape


# The start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_network_predicts_zero_and_its_blocks_change_nothing(variant: str) -> None:
    dit = DiT(**VARIANTS[variant])
    given = inputs(dit)
    assert torch.equal(dit(*given), torch.zeros(2, 4, 8, 8))
    tokens, context = torch.randn(2, 16, 24), given[2].tokens
    for block in dit.repeated_blocks():
        attended = context if variant == "cross-attention" else None
        assert torch.equal(block(tokens, torch.randn(2, 24), attended), tokens)


def test_a_zero_start_still_learns() -> None:
    """Gradients reach the output at once, its modulation and the blocks' gates a step later, all else after that."""
    dit = DiT(**VARIANTS["cross-attention"])
    optimizer = torch.optim.SGD(dit.parameters(), lr=0.1)
    moved: list[set[str]] = []
    for _ in range(3):
        optimizer.zero_grad()
        dit(*inputs(dit)).sub(1).square().mean().backward()
        moved.append({name for name, p in dit.named_parameters() if float(p.grad.norm()) > 0})
        optimizer.step()
    assert moved[0] == {"proj_out_2.weight", "proj_out_2.bias"}
    assert {"proj_out_1.weight", "transformer_blocks.0.norm1.linear.weight"} <= moved[1]
    assert {"emb.timestep_embedder.linear_1.weight", "transformer_blocks.0.attn2.to_q.weight"} <= moved[2]


def test_layers_start_as_in_the_authors_code() -> None:
    dit = build(width=64, num_heads=4, num_classes=100, context_dim=48)
    block = dit.transformer_blocks[0]
    query, patches = block.attn1.to_q.requires_grad_(False), dit.pos_embed.proj.requires_grad_(False)
    bound = math.sqrt(6 / (64 + 64))
    assert 0.98 * bound < float(query.weight.abs().max()) <= bound
    bound = math.sqrt(6 / (64 + 4 * 2 * 2))
    assert 0.98 * bound < float(patches.weight.abs().max()) <= bound
    assert not query.bias.any() and not patches.bias.any()
    for weight in (dit.emb.timestep_embedder.linear_2.weight, dit.emb.class_embedder.embedding_table.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert block.norm1.linear.weight.any(), "zero_init is off"


# What is told ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_matters(variant: str) -> None:
    dit = build(**VARIANTS[variant])
    dit(*inputs(dit)).square().sum().backward()
    assert [name for name, parameter in dit.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("variant", ["cross-attention", "tokens in adaLN"])
def test_tokens_are_heard_and_masked_ones_are_not(variant: str) -> None:
    dit = build(**VARIANTS[variant])
    latents, timesteps, conditioning = inputs(dit)
    tokens = conditioning.tokens
    assert tokens is not None
    changed = torch.cat([tokens[:, :4], tokens[:, 4:] + 3], dim=1)
    mask = torch.tensor([[True] * 4 + [False]] * 2)
    with torch.no_grad():
        plain, other = (dit(latents, timesteps, Conditioning(tokens=one)) for one in (tokens, changed))
        masked, short = (
            dit(latents, timesteps, one)
            for one in (Conditioning(tokens=changed, mask=mask), Conditioning(tokens=tokens[:, :4]))
        )
    assert not torch.allclose(plain, other, atol=1e-4)
    torch.testing.assert_close(masked, short, rtol=1e-4, atol=1e-5)


def test_an_item_without_a_label_is_of_no_class() -> None:
    dit = build(num_classes=5)
    latents, timesteps, _ = inputs(dit)
    with torch.no_grad():
        none = dit(latents, timesteps, Conditioning())
        assert torch.equal(none, dit(latents, timesteps, Conditioning(labels=torch.tensor([5, 5]))))
        assert not torch.allclose(none, dit(latents, timesteps, Conditioning(labels=torch.tensor([0, 0]))), atol=1e-5)


def test_vector_is_added_to_the_time_embedding() -> None:
    dit = build()
    latents, timesteps, _ = inputs(dit)
    vector = torch.randn(2, 24)
    seen: list[Tensor] = []
    dit.transformer_blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    dit(latents, timesteps, Conditioning())
    dit(latents, timesteps, Conditioning(vector=vector))
    torch.testing.assert_close(seen[1], seen[0] + vector)


def test_spatial_conditioning_is_concatenated_behind_the_latents() -> None:
    dit = build(in_channels=7)
    latents, timesteps, conditioning = inputs(dit)
    assert torch.equal(
        dit(latents[:, :4], timesteps, Conditioning(spatial=latents[:, 4:])), dit(latents, timesteps, conditioning)
    )


def test_prediction_depends_on_the_timestep_and_not_on_the_other_items() -> None:
    dit = build()
    latents, timesteps, conditioning = inputs(dit)
    with torch.no_grad():
        both = dit(latents, timesteps, conditioning)
        assert not torch.allclose(both, dit(latents, timesteps + 50, conditioning), atol=1e-4)
        torch.testing.assert_close(both[1:], dit(latents[1:], timesteps[1:], conditioning), rtol=1e-4, atol=1e-5)


# Patches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_patches_go_back_to_where_they_came_from(size: tuple[int, int]) -> None:
    """An output layer that copies the patches' pixels gives the latents back, squares or not."""
    dit = build(width=16, num_layers=1)
    kept = torch.eye(16).unflatten(0, (2, 2, 4)).permute(2, 0, 1, 3)  # (C, p, p, token) in the order of the output
    with torch.no_grad():
        dit.pos_embed.proj.weight.copy_(kept.permute(3, 0, 1, 2))
        dit.pos_embed.proj.bias.zero_()
    dit.pos_embed.pos_embed.zero_()
    latents = torch.randn(2, 4, *size)
    tokens, grid = dit.pos_embed(latents)
    if size != (8, 8):
        tokens = dit.pos_embed.proj(latents).flatten(2).transpose(1, 2)
    assert grid == (size[0] // 2, size[1] // 2)
    assert torch.equal(dit._to_image(tokens, grid), latents)


def test_places_of_a_patch_tell_its_row_from_its_column() -> None:
    dit = build()
    flat = torch.zeros(1, 4, 4, 12)
    tokens, _ = dit.pos_embed(flat)
    places = (tokens - dit.pos_embed.proj.bias)[0].unflatten(0, (2, 6))  # (rows, columns, width)
    assert len({tuple(place.tolist()) for place in places.flatten(0, 1).detach()}) == 12
    torch.testing.assert_close(places[0, :, :12], places[1, :, :12])  # the first half tells the column
    torch.testing.assert_close(places[:, 0, 12:], places[:, 3, 12:])  # the second half the row


# How it runs ----------------------------------------------------------------------------------------------------------


def test_bf16_stays_bf16_with_places_in_float32() -> None:
    """As DeepSpeed has it: weights in bf16, buffers as they were."""
    dit = build()
    places = dit.pos_embed.pos_embed.clone()
    dit.to(torch.bfloat16)
    dit.pos_embed.pos_embed = places
    latents, timesteps, conditioning = inputs(dit)
    for size in (8, 4):
        assert dit(latents[..., :size].bfloat16(), timesteps, conditioning).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_no_value_even_with_dropout(variant: str) -> None:
    dit = build(**{**VARIANTS[variant], "dropout": 0.3})
    values = {}
    for mode in ("none", "blocks"):
        dit.set_gradient_checkpointing(mode)
        dit.zero_grad()
        torch.manual_seed(3)
        prediction = dit(*inputs(dit))
        prediction.square().sum().backward()
        values[mode] = [prediction.detach(), *(p.grad for p in dit.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(values["none"], values["blocks"], strict=True))


def test_gradient_checkpointing_keeps_fewer_tensors() -> None:
    dit, kept = build(), {}
    for mode in ("none", "blocks"):
        dit.set_gradient_checkpointing(mode)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            dit(*inputs(dit))
        kept[mode] = sum(sizes)
    assert kept["blocks"] < 0.5 * kept["none"]


def test_dropout_is_for_training_alone() -> None:
    dit = build(context_dim=12, dropout=0.3)
    given = inputs(dit)
    with torch.no_grad():
        assert not torch.equal(dit(*given), dit(*given))
        dit.eval()
        assert torch.equal(dit(*given), build(context_dim=12)(*given))


def test_repeated_blocks_are_equal_and_hold_nearly_all_parameters() -> None:
    with torch.device("meta"):
        dit = DiT(**PRESETS["dit_b_2"])
    blocks = dit.repeated_blocks()
    shapes = [[(name, p.shape) for name, p in block.named_parameters()] for block in blocks]
    assert len(blocks) == 12 and all(shape == shapes[0] for shape in shapes)
    assert sum(p.numel() for block in blocks for p in block.parameters()) > 0.97 * 130_303_504


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 5},
            "DiT: width=24 must be a multiple of num_heads=5 and of 4 (sines and cosines of two coordinates); change "
            "either",
        ),
        ({"width": 22}, "DiT: width=22 must be a multiple of num_heads=2 and of 4"),
        ({"patch_size": 3}, "DiT: sample_size=8 is no multiple of patch_size=3; change either"),
        (
            {"sinusoid_width": 9},
            "DiT: sinusoid_width=9 is odd; half of it are cosines, half are sines: make it even",
        ),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(**changes)
    assert str(error.value).startswith(message)


def test_inputs_that_do_not_fit() -> None:
    dit = build(context_dim=12)
    latents, timesteps, conditioning = inputs(dit)
    tokens = conditioning.tokens

    def refusal(latents: Tensor, conditioning: Conditioning) -> str:
        with pytest.raises(ConfigError) as error:
            dit(latents, timesteps, conditioning)
        return str(error.value)

    assert refusal(latents[:, :3], conditioning) == (
        "DiT: latents and spatial conditioning have 3 channels together, the network takes 4; set in_channels to what "
        "the autoencoder and the conditioner give"
    )
    assert refusal(latents[:, :, :7], conditioning) == (
        "DiT: latents are 7x8; height and width must be multiples of patch_size=2; choose another image size or patch "
        "size"
    )
    assert refusal(latents, Conditioning()) == (
        "DiT: the conditioning's tokens are None wide, the network's context_dim is 12; use a conditioner of that "
        "width or set context_dim"
    )
    assert refusal(latents, Conditioning(tokens=tokens, labels=torch.tensor([0, 1]))) == (
        "DiT: the conditioning tells classes, the network has none; set num_classes"
    )
    assert refusal(latents, Conditioning(tokens=tokens, vector=torch.zeros(2, 3))) == (
        "DiT: the conditioning's vector is 3 wide, the time embedding 24; they are added, so project the vector to "
        "that width"
    )
