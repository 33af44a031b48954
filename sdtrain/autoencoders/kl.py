"""The KL autoencoder of latent diffusion, under the parameter names of diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sdtrain.errors import ConfigError
from sdtrain.nn.attention import SelfAttention2d
from sdtrain.nn.blocks import BlockSettings, MidLevel, Signals
from sdtrain.nn.resnet import Downsample2d, ResnetBlock2d, Upsample2d

DIFFUSERS_CLASS = "AutoencoderKL"
OWN_CLASS = "sdtrain.AutoencoderKL"


class AutoencoderKL(nn.Module):
    """Encodes images to the mean and log-variance of a Gaussian over latents, and decodes latents to images.

    Args:
        in_channels: Channels of the images.
        latent_channels: Channels of the latents.
        channels: Channels of each level, from full resolution down; each level after the first halves it.
        layers_per_block: Residual blocks of each level of the encoder; the decoder has one more.
        attention_in_middle: Self-attention at the lowest resolution of encoder and decoder.
        norm_groups: Groups of every group normalisation.
        scaling_factor: 1 / standard deviation of the raw latents; part of the saved config, so that no one retypes it.
        shift_factor: Mean of the raw latents.
        quant_kernel_size: 1 or 3, of the convolutions between encoder, latents and decoder.

    Raises:
        ConfigError: Channels and groups do not fit, or another kernel size.

    Source: Rombach et al. 2022, arXiv:2112.10752, appendix G.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        latent_channels: int,
        channels: Sequence[int],
        layers_per_block: int,
        attention_in_middle: bool,
        norm_groups: int = 32,
        scaling_factor: float,
        shift_factor: float = 0.0,
        quant_kernel_size: int = 1,
    ) -> None:
        super().__init__()
        uneven = [width for width in channels if width % norm_groups]
        if not channels or uneven:
            raise ConfigError(
                f"autoencoder: channels {list(channels)} must be multiples of norm_groups={norm_groups}; change either"
            )
        if quant_kernel_size not in (1, 3):
            raise ConfigError(f"autoencoder: quant_kernel_size is {quant_kernel_size}; allowed: 1, 3")
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.channels = tuple(channels)
        self.layers_per_block = layers_per_block
        self.attention_in_middle = attention_in_middle
        self.norm_groups = norm_groups
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self.quant_kernel_size = quant_kernel_size
        settings = BlockSettings(norm_groups=norm_groups, norm_eps=1e-6, num_heads=1)
        shape = (settings, self.channels, layers_per_block, attention_in_middle)
        padding = quant_kernel_size // 2
        self.encoder = Encoder(*shape, in_channels=in_channels, out_channels=2 * latent_channels)
        self.decoder = Decoder(*shape, in_channels=latent_channels, out_channels=in_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, quant_kernel_size, padding=padding)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, quant_kernel_size, padding=padding)

    @property
    def downsample_factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.channels) - 1)

    def encode(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch moments latent_height latent_width"]:
        """Moments of the posterior: means, then log-variances, along the channels.

        Args:
            images: In [-1, 1]; height and width are multiples of `downsample_factor`.

        Raises:
            ConfigError: Images of another size.
        """
        height, width = images.shape[2:]
        if height % self.downsample_factor or width % self.downsample_factor:
            raise ConfigError(
                f"autoencoder: images are {height}x{width}; height and width must be multiples of "
                f"{self.downsample_factor}; choose another image size"
            )
        return self.quant_conv(self.encoder(images))  # (B, 2 * latent_channels, H / f, W / f)

    def decode(
        self, raw_latents: Float[Tensor, "batch latent_channels latent_height latent_width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images, about in [-1, 1], from raw latents; see `unscale`."""
        return self.decoder(self.post_quant_conv(raw_latents))  # (B, in_channels, f * h, f * w)

    def forward(
        self, images: Float[Tensor, "batch channels height width"], noise: Float[Tensor, "batch latent h w"]
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch moments h w"]]:
        """Reconstructions from posterior samples, and the moments; what training needs in one call."""
        moments = self.encode(images)
        return self.decode(self.posterior_sample(moments, noise).to(images.dtype)), moments

    def repeated_blocks(self) -> list[nn.Module]:
        """The residual blocks and attentions: compiled in place, they cover nearly all of the work."""
        return [m for m in self.modules() if isinstance(m, ResnetBlock2d | SelfAttention2d)]

    @staticmethod
    def posterior_mean(moments: Float[Tensor, "batch moments h w"]) -> Float[Tensor, "batch latent h w"]:
        """The mean: the first half of the channels, in float32."""
        return moments.float().chunk(2, dim=1)[0]

    @staticmethod
    def posterior_sample(
        moments: Float[Tensor, "batch moments h w"], noise: Float[Tensor, "batch latent h w"]
    ) -> Float[Tensor, "batch latent h w"]:
        """mean + exp(log-variance / 2) * noise, in float32 whatever the moments were stored in.

        Args:
            moments: Of `encode`.
            noise: Standard normal.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise

    @staticmethod
    def kl(moments: Float[Tensor, "batch moments h w"]) -> Float[Tensor, " batch"]:
        """KL divergence of the posterior from the standard normal, in nats, summed over all dimensions.

        Source: Kingma & Welling 2014, arXiv:1312.6114, appendix B.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30.0, 20.0)
        return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(dim=1)  # (B,)

    def scale(self, raw_latents: Tensor) -> Tensor:
        """Latents of unit variance, as the denoiser sees them, from raw ones."""
        return (raw_latents - self.shift_factor) * self.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """Raw latents, as `decode` takes them, from scaled ones."""
        return latents / self.scaling_factor + self.shift_factor

    def diffusers_config(self) -> dict[str, Any]:
        """The content of `config.json`; with 3x3 convolutions around the latents, which diffusers lacks, our own."""
        if self.quant_kernel_size != 1:
            return {
                "_class_name": OWN_CLASS,
                "in_channels": self.in_channels,
                "latent_channels": self.latent_channels,
                "channels": list(self.channels),
                "layers_per_block": self.layers_per_block,
                "attention_in_middle": self.attention_in_middle,
                "norm_groups": self.norm_groups,
                "scaling_factor": self.scaling_factor,
                "shift_factor": self.shift_factor,
                "quant_kernel_size": self.quant_kernel_size,
            }
        return {
            "_class_name": DIFFUSERS_CLASS,
            **_FIXED,
            "in_channels": self.in_channels,
            "out_channels": self.in_channels,
            "latent_channels": self.latent_channels,
            "block_out_channels": list(self.channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(self.channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(self.channels),
            "layers_per_block": self.layers_per_block,
            "mid_block_add_attention": self.attention_in_middle,
            "norm_num_groups": self.norm_groups,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor or None,
        }

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> AutoencoderKL:
        """A fresh autoencoder of the shape that a `config.json` describes.

        Raises:
            ConfigError: A class or a setting that this autoencoder does not have.
        """
        class_name = config.get("_class_name")
        if class_name == OWN_CLASS:
            return cls(**{key: value for key, value in config.items() if not key.startswith("_")})
        if class_name != DIFFUSERS_CLASS:
            raise ConfigError(
                f"autoencoder config: _class_name is {class_name!r}; allowed: {DIFFUSERS_CLASS}, {OWN_CLASS}"
            )
        _refuse_other_settings(config)
        return cls(
            in_channels=config.get("in_channels", 3),
            latent_channels=config.get("latent_channels", 4),
            channels=config["block_out_channels"],
            layers_per_block=config.get("layers_per_block", 1),
            attention_in_middle=config.get("mid_block_add_attention", True),
            norm_groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor", 0.18215),
            shift_factor=config.get("shift_factor") or 0.0,
        )


class Encoder(nn.Module):
    """Images to the values that become the moments.

    Args:
        settings: What all levels have in common.
        channels: Channels of each level, from full resolution down.
        num_layers: Residual blocks of each level.
        attention: Self-attention in the middle.
        in_channels: Channels of the images.
        out_channels: Channels of the result.
    """

    def __init__(
        self,
        settings: BlockSettings,
        channels: Sequence[int],
        num_layers: int,
        attention: bool,
        *,
        in_channels: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderLevel(settings, channels[max(i - 1, 0)], width, num_layers, downsample=i + 1 < len(channels))
            for i, width in enumerate(channels)
        )
        self.mid_block = MidLevel(settings, kind="self" if attention else "plain", channels=channels[-1])
        self.conv_norm_out = nn.GroupNorm(settings.norm_groups, channels[-1], eps=settings.norm_eps)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out h w"]:
        """Values at the lowest resolution."""
        features = self.conv_in(images)
        for level in self.down_blocks:
            features = level(features)  # (B, channels[i], H / 2^i, W / 2^i), then halved
        features = self.mid_block(features, Signals())
        return self.conv_out(F.silu(self.conv_norm_out(features)))


class Decoder(nn.Module):
    """Latents to images; see `Encoder` for the arguments, channels from full resolution down here too."""

    def __init__(
        self,
        settings: BlockSettings,
        channels: Sequence[int],
        num_layers: int,
        attention: bool,
        *,
        in_channels: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        widths = list(reversed(channels))
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            DecoderLevel(settings, widths[max(i - 1, 0)], width, num_layers + 1, upsample=i + 1 < len(widths))
            for i, width in enumerate(widths)
        )
        self.mid_block = MidLevel(settings, kind="self" if attention else "plain", channels=widths[0])
        self.conv_norm_out = nn.GroupNorm(settings.norm_groups, widths[-1], eps=settings.norm_eps)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, latents: Float[Tensor, "batch latent h w"]) -> Float[Tensor, "batch out height width"]:
        """Images at full resolution."""
        features = self.mid_block(self.conv_in(latents), Signals())
        for level in self.up_blocks:
            features = level(features)  # (B, channels[-1-i], ...), then doubled
        return self.conv_out(F.silu(self.conv_norm_out(features)))


class EncoderLevel(nn.Module):
    """Residual blocks at one resolution, then a step down, padded right and bottom only."""

    def __init__(
        self, settings: BlockSettings, in_channels: int, out_channels: int, num_layers: int, *, downsample: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(settings.resnet(widths[i], out_channels) for i in range(num_layers))
        self.downsamplers = (
            nn.ModuleList([Downsample2d(channels=out_channels, asymmetric=True)]) if downsample else None
        )

    def forward(self, features: Float[Tensor, "batch in_c height width"]) -> Float[Tensor, "batch out_c h w"]:
        """Features for the next level."""
        for resnet in self.resnets:
            features = resnet(features)
        return features if self.downsamplers is None else self.downsamplers[0](features)


class DecoderLevel(nn.Module):
    """Residual blocks at one resolution, then a step up."""

    def __init__(
        self, settings: BlockSettings, in_channels: int, out_channels: int, num_layers: int, *, upsample: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(settings.resnet(widths[i], out_channels) for i in range(num_layers))
        self.upsamplers = nn.ModuleList([Upsample2d(channels=out_channels)]) if upsample else None

    def forward(self, features: Float[Tensor, "batch in_c h w"]) -> Float[Tensor, "batch out_c height width"]:
        """Features for the next level."""
        for resnet in self.resnets:
            features = resnet(features)
        return features if self.upsamplers is None else self.upsamplers[0](features)


# Settings of diffusers' class of which this autoencoder has only one value.
_FIXED: dict[str, Any] = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}


def _refuse_other_settings(config: Mapping[str, Any]) -> None:
    levels = len(config["block_out_channels"])
    allowed = _FIXED | {
        "out_channels": config.get("in_channels", 3),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latents_mean": None,
        "latents_std": None,
    }
    for key, value in allowed.items():
        found = config.get(key, value)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ConfigError(f"autoencoder config: {key} is {found!r}; this autoencoder has only {value!r}")


# Constructor arguments by name: Stable Diffusion's, and a small one of the same downsampling for tests and demos, whose
# scaling factor is to be measured on its training split.
PRESETS: dict[str, dict[str, Any]] = {
    "sd": {
        "latent_channels": 4,
        "channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "attention_in_middle": True,
        "scaling_factor": 0.18215,
    },
    "tiny": {
        "latent_channels": 4,
        "channels": [16, 32, 64, 64],
        "layers_per_block": 1,
        "attention_in_middle": False,
        "norm_groups": 8,
        "scaling_factor": 1.0,
    },
}
