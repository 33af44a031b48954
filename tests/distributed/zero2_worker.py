"""Run under torchrun: train a small UNet by our engine, beside a plain fp32 AdamW that sees the whole batch."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sdtrain import distributed
from sdtrain.denoisers.unet import UNet
from sdtrain.records import Conditioning
from sdtrain.training.engine import Engine, EngineSettings, parameter_groups

BATCH, STEPS, RATE, CLIP = 8, 20, 1e-3, 0.1


def network() -> UNet:
    torch.manual_seed(0)
    unet = UNet(
        in_channels=4,
        out_channels=4,
        channels=[16, 32],
        down_blocks=["plain", "cross"],
        layers_per_block=1,
        num_heads=2,
        head_dim=None,
        context_dim=16,
        linear_projection=False,
        mid_block="cross",
        time_scale_shift="default",
        cross_attention_norm=None,
        norm_groups=8,
    )
    for parameter in unet.parameters():  # a zero-initialised output would hide wrong gradients behind it
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return unet


def batches() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, 4, 8, 8, generator=generator),
            torch.randint(0, 1000, (BATCH,), generator=generator),
            torch.randn(BATCH, 5, 16, generator=generator),
            torch.randn(BATCH, 4, 8, 8, generator=generator),
        )
        for _ in range(STEPS)
    ]


def losses_of(unet: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor], part: slice) -> Tensor:
    noised, timesteps, tokens, wanted = (each[part] for each in batch)
    return (unet(noised, timesteps, Conditioning(tokens=tokens)) - wanted).square().flatten(1).mean(1)


def reference(weight_decay_on: str) -> tuple[list[float], list[float], UNet]:
    unet = network()
    optimizer = torch.optim.AdamW(parameter_groups(unet, 0.01, weight_decay_on), lr=RATE)  # type: ignore[arg-type]
    losses, norms = [], []
    for batch in batches():
        loss = losses_of(unet, batch, slice(None)).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(unet.parameters(), CLIP)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, unet


def ours(accumulation: int, weight_decay_on: str, checkpointing: str) -> tuple[list[float], list[float], UNet]:
    place = distributed.ranks()
    micro = BATCH // place.world_size // accumulation
    unet = network()
    unet.set_gradient_checkpointing(checkpointing)  # type: ignore[arg-type]
    unet.train()
    engine = Engine(
        unet,
        EngineSettings(
            micro_batch_size=micro,
            grad_accum_steps=accumulation,
            gradient_clip_norm=CLIP,
            weight_decay_on=weight_decay_on,  # type: ignore[arg-type]
            ema_decay=0.99,
            reduce_bucket_size=5_000,
        ),
    )
    losses, norms = [], []
    for batch in batches():
        total, result = 0.0, None
        for index in range(accumulation):
            first = place.rank * (BATCH // place.world_size) + index * micro
            per_sample = losses_of(unet, batch, slice(first, first + micro))
            engine.backward(per_sample, torch.ones_like(per_sample))
            result = engine.step(RATE)
            total += float(per_sample.detach().sum())
        assert result is not None and result.applied
        losses.append(distributed.sum_over_ranks(total) / BATCH)
        norms.append(float(result.gradient_norm))
    return losses, norms, unet


def relative(mine: list[Tensor], theirs: list[Tensor]) -> float:
    a, b = torch.cat([x.flatten() for x in mine]), torch.cat([x.flatten() for x in theirs])
    return float((a - b).norm() / b.norm())


def main(output: Callable[[str], object]) -> None:
    distributed.initialize(timeout_seconds=60)
    rows = []
    for accumulation, decay_on, checkpointing in ((1, "all", "none"), (4, "matrices", "blocks")):
        mine, theirs = ours(accumulation, decay_on, checkpointing), reference(decay_on)
        start = copy.deepcopy(list(network().parameters()))
        rows.append(
            {
                "accumulation": accumulation,
                "loss": relative([torch.tensor(mine[0])], [torch.tensor(theirs[0])]),
                "norm": relative([torch.tensor(mine[1])], [torch.tensor(theirs[1])]),
                "parameters": relative([*mine[2].parameters()], [*theirs[2].parameters()]),
                "moved": relative([*theirs[2].parameters()], start),
                "clipped_steps": sum(norm > CLIP for norm in theirs[1]),
            }
        )
    if distributed.ranks().is_main:
        output(json.dumps(rows))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]).write_text)
