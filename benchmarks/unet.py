"""Our UNet beside diffusers' on the same work: one process, shared parameters, alternating forward-backward passes.

    make bench
    python -m benchmarks.unet --preset sd15 --latent-size 64 --batch-size 1 --pairs 5

Parity is asserted first: a faster network with other gradients is no peer. On a CPU only the ratio means anything; it
is the median over the pairs, which a machine whose speed drifts does not shift.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from sdtrain.denoisers.unet import PRESETS, UNet
from sdtrain.records import Conditioning

SMALL = {**PRESETS["sd15"], "channels": (64, 128, 256, 256)}
MAX_ERROR = 1e-4


def share_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    """Let `theirs` use the very Parameter objects of `ours`: two copies of 860M with gradients would not fit."""
    modules = dict(theirs.named_modules())
    for name, parameter in ours.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(modules[owner], leaf, parameter)


def gradients(network: nn.Module) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds of one forward-backward, and its output."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    output = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=["small", *sorted(PRESETS)])
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compile the blocks of ours, the whole of theirs")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)

    ours = UNet(**(SMALL if arguments.preset == "small" else PRESETS[arguments.preset])).to(device).train()
    for parameter in ours.parameters():  # a zero-initialised output would hide wrong gradients behind it
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(ours.diffusers_config())
    share_parameters(ours, theirs)
    theirs.train()

    size, batch = arguments.latent_size, arguments.batch_size
    noised = torch.randn(batch, ours.in_channels, size, size, device=device)
    timesteps = torch.randint(0, 1000, (batch,), device=device)
    tokens = torch.randn(batch, 77, ours.context_dim or 1, device=device)

    def run_ours() -> Tensor:
        output = ours(noised.to(dtype_now), timesteps, Conditioning(tokens=tokens.to(dtype_now)))
        output.float().square().mean().backward()
        return output.detach()

    def run_theirs() -> Tensor:
        output = theirs(noised.to(dtype_now), timesteps, tokens.to(dtype_now)).sample
        output.float().square().mean().backward()
        return output.detach()

    dtype_now = torch.float32
    mine, my_gradients = run_ours(), gradients(ours)
    ours.zero_grad()
    peer, peer_gradients = run_theirs(), gradients(ours)
    ours.zero_grad()
    errors = {"output": relative(mine, peer), "gradients": relative(my_gradients, peer_gradients)}
    assert max(errors.values()) < MAX_ERROR, f"no parity, no benchmark: {errors}"

    dtype_now = dtype
    ours.to(dtype)
    if device.type == "cuda":
        ours.to(memory_format=torch.channels_last)
    if arguments.compile:
        torch._dynamo.config.recompile_limit = 64  # a UNet's blocks have some 15 shapes
        for block in ours.repeated_blocks():
            block.compile()
        theirs.compile()
    rows = []
    for pair in range(arguments.pairs + 1):
        ours.zero_grad(set_to_none=False)
        first, _ = timed(run_ours, device)
        second, _ = timed(run_theirs, device)
        if pair > 0:  # the first pair warms up
            rows.append((first, second))
    ratios = [second / first for first, second in rows]
    print(
        json.dumps(
            {
                "work": f"{arguments.preset}, {batch} x {size}x{size} latents, {dtype}, compile={arguments.compile}",
                "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
                "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
                "parity": errors,
                "ours_images_per_second": batch / statistics.median(first for first, _ in rows),
                "diffusers_images_per_second": batch / statistics.median(second for _, second in rows),
                "ours_over_diffusers": {
                    "median": statistics.median(ratios),
                    "min": min(ratios),
                    "max": max(ratios),
                    "pairs": len(ratios),
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
