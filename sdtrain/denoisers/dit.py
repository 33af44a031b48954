"""The diffusion transformer (DiT), under the parameter names of diffusers' DiTTransformer2DModel."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Num
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdtrain.errors import ConfigError
from sdtrain.nn.attention import Attention, FeedForward
from sdtrain.nn.embeddings import TimestepEmbedding, grid_embedding
from sdtrain.nn.initialization import zero_
from sdtrain.records import Conditioning

ContextUse = Literal["cross_attention", "adaln"]


class ClassEmbedding(nn.Module):
    """A learned vector for each class, and one more for none."""

    def __init__(self, *, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Int64[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        """Look up each item's class; `num_classes` is none."""
        return self.embedding_table(labels)


class TokensEmbedding(nn.Module):
    """The mean of the conditioning's tokens through a two-layer perceptron."""

    def __init__(self, *, token_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(token_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(
        self, tokens: Float[Tensor, "batch length token_width"], mask: Bool[Tensor, "batch length"] | None
    ) -> Float[Tensor, "batch width"]:
        """Embed each item's tokens, of which only those in the mask count."""
        kept = torch.ones_like(tokens[..., :1]) if mask is None else mask[..., None].to(tokens.dtype)
        mean = (tokens * kept).sum(1) / kept.sum(1).clamp(min=1)  # (B, token_width)
        return self.linear_2(F.silu(self.linear_1(mean)))


class SignalEmbedding(nn.Module):
    """What modulates every block: the timestep, and the conditions that are told in one vector.

    Args:
        width: Width of the result, the transformer's own.
        sinusoid_width: Width of the timestep's sinusoids.
        num_classes: Classes that are told apart; None has none.
        token_width: Width of the tokens whose mean is embedded; None embeds none.
    """

    def __init__(self, *, width: int, sinusoid_width: int, num_classes: int | None, token_width: int | None) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(
            sinusoid_width=sinusoid_width, hidden_width=width, out_width=width, includes_slowest=True
        )
        self.class_embedder = None if num_classes is None else ClassEmbedding(num_classes=num_classes, width=width)
        self.text_embedder = None if token_width is None else TokensEmbedding(token_width=token_width, width=width)

    def forward(self, timesteps: Num[Tensor, " batch"], conditioning: Conditioning) -> Float[Tensor, "batch width"]:
        """The sum of all that is told."""
        embedding = self.timestep_embedder(timesteps)  # (B, width)
        if self.class_embedder is not None:
            labels = conditioning.labels
            if labels is None:
                labels = torch.full_like(timesteps, self.class_embedder.num_classes, dtype=torch.int64)
            embedding = embedding + self.class_embedder(labels)
        if self.text_embedder is not None:
            assert conditioning.tokens is not None, "inputs are checked"
            embedding = embedding + self.text_embedder(conditioning.tokens, conditioning.mask)
        return embedding if conditioning.vector is None else embedding + conditioning.vector


class AdaptiveNorm(nn.Module):
    """adaLN-Zero: what each block makes of the signals; holds the block's own embedding where it has one.

    Args:
        width: Width of signals and tokens.
        emb: The block's own embedding of the signals, which `DiT` runs; None where all blocks share one.

    Source: Peebles & Xie 2023, arXiv:2212.09748, section 3.2.
    """

    def __init__(self, *, width: int, emb: SignalEmbedding | None) -> None:
        super().__init__()
        self.emb = emb
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, embedding: Float[Tensor, "batch width"]) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the feed-forward layer; (batch, 1, width) each."""
        return self.linear(F.silu(embedding))[:, None].chunk(6, dim=-1)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention where there is a context, and feed-forward; adaLN-Zero around first and last.

    Args:
        width: Width of the tokens.
        num_heads: Heads of every attention.
        context_dim: Width of the context; None leaves cross-attention out.
        dropout: See `DiT`.
        norm_eps: Epsilon of the normalisations before cross-attention and feed-forward.
        emb: See `AdaptiveNorm`.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        context_dim: int | None,
        dropout: float,
        norm_eps: float,
        emb: SignalEmbedding | None,
    ) -> None:
        super().__init__()
        self.width = width
        self.norm_eps = norm_eps
        self.norm1 = AdaptiveNorm(width=width, emb=emb)
        self.attn1 = Attention(width=width, num_heads=num_heads, bias=True, dropout=dropout)
        self.attn2 = (
            None
            if context_dim is None
            else Attention(width=width, num_heads=num_heads, context_dim=context_dim, bias=True, dropout=dropout)
        )
        self.ff = FeedForward(width=width, activation="gelu_tanh", dropout=dropout)

    def forward(
        self,
        tokens: Float[Tensor, "batch length width"],
        embedding: Float[Tensor, "batch width"],
        context: Float[Tensor, "batch context context_width"] | None = None,
        mask: Bool[Tensor, "batch context"] | None = None,
    ) -> Float[Tensor, "batch length width"]:
        """Tokens after one round of looking at each other and at the context."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1(embedding)  # (B, 1, width) each
        tokens = tokens + gate * self.attn1(_layer_norm(tokens, 1e-6) * (1 + scale) + shift)
        if self.attn2 is not None:
            tokens = tokens + self.attn2(_layer_norm(tokens, self.norm_eps), context, mask)
        return tokens + ff_gate * self.ff(_layer_norm(tokens, self.norm_eps) * (1 + ff_scale) + ff_shift)


def _layer_norm(tokens: Tensor, eps: float) -> Tensor:
    """Every token to mean 0 and variance 1; what is learned about it comes from adaLN."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=eps)


class PatchEmbedding(nn.Module):
    """Latents to a token per patch, with the patch's fixed place added.

    Args:
        in_channels: Channels of the latents.
        width: Width of the tokens.
        patch_size: Height and width of a patch.
        base: Patches along either side of the latents whose patches are 1 apart.
    """

    pos_embed: Tensor

    def __init__(self, *, in_channels: int, width: int, patch_size: int, base: int) -> None:
        super().__init__()
        self.base = base
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.register_buffer("pos_embed", grid_embedding(base, base, channels=width, base=base), persistent=False)

    def forward(
        self, latents: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch patches token_width"], tuple[int, int]]:
        """Tokens row by row, and the number of rows and columns."""
        features = self.proj(latents)  # (B, token_width, rows, columns)
        rows, columns = features.shape[2:]
        places = self.pos_embed
        if (rows, columns) != (self.base, self.base):
            places = grid_embedding(rows, columns, channels=features.shape[1], base=self.base, device=places.device)
        # Left transposed, the tokens of all blocks would be: slow, and on CPUs inductor (torch 2.13) normalises several
        # transposed rows in a buffer for one, so that compiled blocks silently get wrong gradients.
        patches = features.flatten(2).transpose(1, 2).contiguous()
        tokens = patches + places  # in float32, as the places stay in any precision
        return tokens.to(features.dtype), (rows, columns)


class DiT(nn.Module):
    """Predicts noise, clean latents or velocity from noised latents, a timestep and a conditioning.

    A plain transformer over the patches of the latents; timestep and conditions modulate every block (adaLN-Zero), and
    the conditioning's tokens may be attended to.

    Args:
        in_channels: Channels of the latents, plus those of `Conditioning.spatial` where it is used.
        out_channels: Channels of the prediction; published networks also predict variances, in as many channels again.
        width: Width of the tokens; a multiple of `num_heads` and of 4.
        num_layers: Transformer blocks.
        num_heads: Heads of every attention.
        patch_size: Height and width of the latents' patches.
        sample_size: Height and width of the latents whose patches are 1 apart in the fixed positions; latents of other
            sizes are stretched over the same extent.
        sinusoid_width: Width of the timestep's sinusoids, before two layers of the transformer's width; even.
        num_classes: Classes that `Conditioning.labels` tells apart; without labels, items are of none of them.
        context_dim: Width of the conditioning's tokens; None where there are none.
        context: Every block attends to the tokens (`cross_attention`), or their mean modulates the blocks (`adaln`).
        shared_embedding: One embedding of timestep and conditions for all blocks, as published; or one for each block
            and the first block's for the output, as diffusers builds it.
        dropout: Probability of dropping channels after attentions and within feed-forward layers, while training.
        norm_eps: Epsilon of the normalisations before cross-attention and feed-forward; the others' is 1e-6.
        zero_init: Start as the paper: adaLN, output and cross-attention's output are zero, so that the fresh network
            predicts exactly zero and each block starts as the identity.

    Raises:
        ConfigError: Arguments that do not fit each other.

    Source: Peebles & Xie 2023, arXiv:2212.09748; cross-attention between self-attention and feed-forward: Chen et al.
        2023 (PixArt), arXiv:2310.00426. As in diffusers, the slowest of the timestep's sinusoids is 1/10000, which the
        authors' code does not reach.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        width: int,
        num_layers: int,
        num_heads: int,
        patch_size: int = 2,
        sample_size: int = 32,
        sinusoid_width: int = 256,
        num_classes: int | None = None,
        context_dim: int | None = None,
        context: ContextUse = "cross_attention",
        shared_embedding: bool = True,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        _check_arguments(width, num_heads, patch_size, sample_size, sinusoid_width)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.width = width
        self.patch_size = patch_size
        self.context_dim = context_dim
        self.num_classes = num_classes
        self.recompute = False
        self.arch: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "width": width,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "patch_size": patch_size,
            "sample_size": sample_size,
            "sinusoid_width": sinusoid_width,
            "num_classes": num_classes,
            "context_dim": context_dim,
            "context": context,
            "shared_embedding": shared_embedding,
            "dropout": dropout,
            "norm_eps": norm_eps,
        }
        attended = context_dim if context == "cross_attention" else None
        self._attends = attended is not None

        def embedding() -> SignalEmbedding:
            token_width = context_dim if context == "adaln" else None
            return SignalEmbedding(
                width=width, sinusoid_width=sinusoid_width, num_classes=num_classes, token_width=token_width
            )

        self.pos_embed = PatchEmbedding(
            in_channels=in_channels, width=width, patch_size=patch_size, base=sample_size // patch_size
        )
        self.emb = embedding() if shared_embedding else None
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(
                width=width,
                num_heads=num_heads,
                context_dim=attended,
                dropout=dropout,
                norm_eps=norm_eps,
                emb=None if shared_embedding else embedding(),
            )
            for _ in range(num_layers)
        )
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, patch_size * patch_size * out_channels)
        _initialize(self, zero_init=zero_init)

    def forward(
        self,
        latents: Float[Tensor, "batch channels height width"],
        timesteps: Num[Tensor, " batch"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Predict, for each item, what the process's `prediction_type` asks for.

        Args:
            latents: Noised, in the precision of the weights; height and width divisible by the patch size.
            timesteps: Integers in [0, num_train_timesteps), or fractions.
            conditioning: `tokens` (with or without `mask`) where `context_dim` is set, `labels` where there are
                classes, `vector` added to the time embedding, `spatial` concatenated to the latents.

        Raises:
            ConfigError: Latents or conditioning of a shape that this network cannot take.
        """
        self._check_inputs(latents, conditioning)
        if conditioning.spatial is not None:
            latents = torch.cat([latents, conditioning.spatial], dim=1)  # (B, in_channels, H, W)
        embeddings = self._embeddings(timesteps, conditioning)  # (B, width) for each block
        context = (conditioning.tokens, conditioning.mask) if self._attends else (None, None)
        tokens, grid = self.pos_embed(latents)  # (B, rows * columns, width)
        for block, embedding in zip(self._blocks, embeddings, strict=True):
            if self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, embedding, *context, use_reentrant=False)
            else:
                tokens = block(tokens, embedding, *context)  # (B, rows * columns, width)
        shift, scale = self.proj_out_1(F.silu(embeddings[0]))[:, None].chunk(2, dim=-1)  # (B, 1, width) each
        tokens = self.proj_out_2(_layer_norm(tokens, 1e-6) * (1 + scale) + shift)  # (B, rows * columns, p * p * C)
        return self._to_image(tokens, grid)

    def set_gradient_checkpointing(self, mode: Literal["none", "blocks"]) -> None:
        """Keep all activations, or only the inputs of every block and compute the rest again in the backward pass."""
        self.recompute = mode == "blocks"

    def repeated_blocks(self) -> list[nn.Module]:
        """The transformer blocks, all of one shape: compiled in place, they cover nearly all of the work."""
        return [*self._blocks]

    @property
    def _blocks(self) -> list[DiTBlock]:
        return [block for block in self.transformer_blocks if isinstance(block, DiTBlock)]

    def _embeddings(self, timesteps: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """What modulates each block; the first also modulates the output."""
        if self.emb is not None:
            return [self.emb(timesteps, conditioning)] * len(self._blocks)
        return [block.norm1.emb(timesteps, conditioning) for block in self._blocks if block.norm1.emb is not None]

    def _to_image(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Put the patches back where they came from."""
        size = self.patch_size
        patches = tokens.unflatten(2, (size, size, self.out_channels)).unflatten(1, grid)  # (B, rows, columns, p, p, C)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, rows * p, columns * p)

    def _check_inputs(self, latents: Tensor, conditioning: Conditioning) -> None:
        spatial, tokens, vector = conditioning.spatial, conditioning.tokens, conditioning.vector
        arriving = latents.shape[1] + (0 if spatial is None else spatial.shape[1])
        if arriving != self.in_channels:
            raise ConfigError(
                f"DiT: latents and spatial conditioning have {arriving} channels together, the network takes "
                f"{self.in_channels}; set in_channels to what the autoencoder and the conditioner give"
            )
        if latents.shape[2] % self.patch_size or latents.shape[3] % self.patch_size:
            raise ConfigError(
                f"DiT: latents are {latents.shape[2]}x{latents.shape[3]}; height and width must be multiples of "
                f"patch_size={self.patch_size}; choose another image size or patch size"
            )
        token_width = None if tokens is None else tokens.shape[-1]
        if token_width != self.context_dim:
            raise ConfigError(
                f"DiT: the conditioning's tokens are {token_width} wide, the network's context_dim is "
                f"{self.context_dim}; use a conditioner of that width or set context_dim"
            )
        if conditioning.labels is not None and self.num_classes is None:
            raise ConfigError("DiT: the conditioning tells classes, the network has none; set num_classes")
        if vector is not None and vector.shape[-1] != self.width:
            raise ConfigError(
                f"DiT: the conditioning's vector is {vector.shape[-1]} wide, the time embedding {self.width}; "
                "they are added, so project the vector to that width"
            )


def _check_arguments(width: int, num_heads: int, patch_size: int, sample_size: int, sinusoid_width: int) -> None:
    if width % num_heads or width % 4:
        raise ConfigError(
            f"DiT: width={width} must be a multiple of num_heads={num_heads} and of 4 (sines and cosines of two "
            "coordinates); change either"
        )
    if sample_size % patch_size:
        raise ConfigError(f"DiT: sample_size={sample_size} is no multiple of patch_size={patch_size}; change either")
    if sinusoid_width % 2:
        raise ConfigError(
            f"DiT: sinusoid_width={sinusoid_width} is odd; half of it are cosines, half are sines: make it even"
        )


@torch.no_grad()
def _initialize(network: DiT, *, zero_init: bool) -> None:
    """The authors' initial values: Xavier for linear layers and patches, small normals for embeddings, zeros.

    Source: `DiT.initialize_weights` of the authors' code; zero cross-attention: PixArt's.
    """
    for module in network.modules():
        match module:
            case nn.Linear():
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            case nn.Conv2d():
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a linear layer on a patch's pixels
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            case nn.Embedding():
                nn.init.normal_(module.weight, std=0.02)
    for module in network.modules():
        if isinstance(module, TimestepEmbedding | TokensEmbedding):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
    if zero_init:
        zero_(network.proj_out_1, network.proj_out_2)
        for module in network.modules():
            if isinstance(module, DiTBlock):
                zero_(module.norm1.linear)
                if module.attn2 is not None:
                    zero_(module.attn2.to_out[0])


def _size(width: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    """A size of the paper at patch 2, for classes of ImageNet and latents of 256 px."""
    shape = {"width": width, "num_layers": num_layers, "num_heads": num_heads, "patch_size": 2, "sample_size": 32}
    return {"in_channels": 4, "out_channels": 4, **shape, "num_classes": 1000}


def _benchmark(width: int, num_layers: int, num_heads: int, dropout: float) -> dict[str, Any]:
    """A network of the UNet-against-DiT benchmark: diffusers' transformer with 1000 classes that nobody tells it."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "patch_size": 4,
        "sample_size": 64,
        "num_classes": 1000,
        "shared_embedding": False,
        "dropout": dropout,
        "norm_eps": 1e-5,
    }


# Constructor arguments by name. The paper's sizes come without its second half of output channels, the variances.
PRESETS: dict[str, dict[str, Any]] = {
    "dit_s_2": _size(384, 12, 6),
    "dit_b_2": _size(768, 12, 12),
    "dit_l_2": _size(1024, 24, 16),
    "dit_xl_2": _size(1152, 28, 16),
    "dit_small": _benchmark(512, 6, 8, 0.1),
    "dit_large": _benchmark(768, 12, 12, 0.2),
    "dit_celeba_hq": {**_size(768, 12, 12), "num_classes": None, "sinusoid_width": 768},
}
