from __future__ import annotations

import math

import pytest
import torch

from sdtrain.nn.attention import Attention, FeedForward, SelfAttention2d, Transformer2d, TransformerBlock, attend


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_attend_is_the_softmax_of_the_paper() -> None:
    query, key, value = rand(2, 5, 12, seed=1), rand(2, 7, 12, seed=2), rand(2, 7, 12, seed=3)
    expected = torch.empty(2, 5, 12)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        scores = torch.einsum("bqd,bkd->bqk", query[..., part], key[..., part]) / math.sqrt(4)
        expected[..., part] = torch.einsum("bqk,bkd->bqd", scores.softmax(-1), value[..., part])
    torch.testing.assert_close(attend(query, key, value, num_heads=3), expected)


def test_masked_keys_are_as_if_they_were_not_there() -> None:
    query, key, value = rand(2, 5, 8, seed=1), rand(2, 7, 8, seed=2), rand(2, 7, 8, seed=3)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, :3] = True
    masked = attend(query, key, value, num_heads=2, mask=mask)
    torch.testing.assert_close(masked, attend(query, key[:, :3], value[:, :3], num_heads=2))


def test_mask_belongs_to_its_item() -> None:
    query, key, value = rand(2, 5, 8, seed=1), rand(2, 7, 8, seed=2), rand(2, 7, 8, seed=3)
    mask = torch.tensor([[True] * 7, [True] * 2 + [False] * 5])
    masked = attend(query, key, value, num_heads=2, mask=mask)
    torch.testing.assert_close(masked[:1], attend(query[:1], key[:1], value[:1], num_heads=2))
    torch.testing.assert_close(masked[1:], attend(query[1:], key[1:, :2], value[1:, :2], num_heads=2))


def test_self_attention_treats_all_tokens_alike() -> None:
    attention, tokens = Attention(width=8, num_heads=2), rand(1, 6, 8)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(attention(tokens[:, order]), attention(tokens)[:, order])


def test_order_of_the_context_does_not_matter() -> None:
    attention, tokens, context = Attention(width=8, num_heads=2, context_dim=5), rand(1, 6, 8), rand(1, 4, 5)
    torch.testing.assert_close(attention(tokens, context.flip(1)), attention(tokens, context))


def test_normalized_context_forgets_its_scale_and_offset() -> None:
    attention = Attention(width=8, num_heads=2, context_dim=5, normalize_context=True)
    tokens, context = rand(1, 6, 8), rand(1, 4, 5)
    torch.testing.assert_close(attention(tokens, context * 3 + 2), attention(tokens, context), rtol=1e-3, atol=1e-4)
    plain = Attention(width=8, num_heads=2, context_dim=5)
    assert not torch.allclose(plain(tokens, context * 3 + 2), plain(tokens, context), atol=1e-2)


def test_spatial_self_attention_keeps_pixels_in_place() -> None:
    attention = SelfAttention2d(channels=8, num_heads=2, norm_groups=4, norm_eps=1e-5)
    features = rand(2, 8, 3, 5)
    torch.testing.assert_close(attention(features.flip(3)), attention(features).flip(3))
    torch.nn.init.zeros_(attention.to_out[0].weight)
    torch.nn.init.zeros_(attention.to_out[0].bias)
    assert torch.equal(attention(features), features)


@pytest.mark.parametrize(("activation", "inner"), [("geglu", 8 * 16), ("gelu", 4 * 16)])
def test_feed_forward_widens_fourfold(activation: str, inner: int) -> None:
    layer = FeedForward(width=16, activation=activation)
    assert layer.net[0].proj.out_features == inner
    assert layer.net[2].in_features == 64
    tokens = rand(2, 3, 16)
    hidden = layer.net[0].proj(tokens)
    if activation == "geglu":
        hidden = hidden[..., :64] * torch.nn.functional.gelu(hidden[..., 64:])
    else:
        hidden = torch.nn.functional.gelu(hidden)
    torch.testing.assert_close(layer(tokens), layer.net[2](hidden))


def test_transformer_block_listens_to_its_context() -> None:
    block = TransformerBlock(width=8, num_heads=2, context_dim=5, feed_forward="geglu", normalize_context=False)
    tokens = rand(1, 6, 8)
    assert not torch.allclose(block(tokens, rand(1, 4, 5, seed=1)), block(tokens, rand(1, 4, 5, seed=2)))


def test_linear_and_convolutional_projections_are_the_same_arithmetic() -> None:
    def build(linear: bool) -> Transformer2d:
        return Transformer2d(
            channels=8,
            num_heads=2,
            num_layers=2,
            context_dim=5,
            linear_projection=linear,
            norm_groups=4,
            feed_forward="geglu",
            normalize_context=False,
        )

    convolutional, linear = build(False), build(True)
    shapes = {name: tensor.shape for name, tensor in linear.state_dict().items()}
    linear.load_state_dict({name: tensor.view(shapes[name]) for name, tensor in convolutional.state_dict().items()})
    features, context = rand(2, 8, 3, 5), rand(2, 4, 5)
    torch.testing.assert_close(linear(features, context), convolutional(features, context))
