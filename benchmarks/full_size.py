"""One real ZeRO-2 optimiser step of the SD 1.x UNet in bf16, with fp32 master, moments, gradients and EMA.

    make full-size
    python -m benchmarks.full_size --steps 2

Needs about 22 GB of memory on a machine without an accelerator. Everything is what a run uses: the engine, the
latent-diffusion loss at 64x64 latents, gradient checkpointing, the EMA over the master partition. Data is random.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import torch
from torch import nn

from sdtrain import distributed
from sdtrain.denoisers.unet import PRESETS, UNet
from sdtrain.diffusion.process import DiffusionProcess, add_noise
from sdtrain.records import Conditioning
from sdtrain.training.engine import Engine, EngineSettings

GB = 1e9


def peak_rss_gb() -> float:
    """Highest resident memory of this process so far, in 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def build_unet(dtype: torch.dtype) -> UNet:
    """The network made in its working precision: an fp32 copy would cost 3.4 GB that nobody uses."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return UNet(**PRESETS["sd15"])
    finally:
        torch.set_default_dtype(before)


def train_step(
    engine: Engine, unet: UNet, process: DiffusionProcess, generator: torch.Generator
) -> tuple[float, float]:
    """One forward, backward, clipped AdamW step and EMA update on one sample; returns loss and gradient norm."""
    clean = torch.randn(1, 4, 64, 64, generator=generator)
    noise = torch.randn(1, 4, 64, 64, generator=generator)
    timesteps = torch.randint(0, 1000, (1,), generator=generator)
    tokens = torch.randn(1, 77, 768, generator=generator)
    device = distributed.device()
    noised = add_noise(clean, noise, process.alpha_bar_at(timesteps))
    conditioning = Conditioning(tokens=tokens.to(device, torch.bfloat16))
    prediction = unet(noised.to(device, torch.bfloat16), timesteps.to(device), conditioning).float()
    losses = (prediction - noise.to(device)).square().flatten(1).mean(1)
    engine.backward(losses, torch.ones_like(losses))
    result = engine.step(1e-4)
    assert result is not None and result.applied, "the step must be applied"
    return float(losses.detach()), float(result.gradient_norm)


def print_parts(engine: Engine, module: nn.Module) -> None:
    """What each part takes; the rest of the peak is activations, buckets, and the interpreter with its libraries."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    held = engine.tensors()

    def of(kind: str) -> float:
        return sum(t.numel() * t.element_size() for name, t in held.items() if name.endswith("/" + kind)) / GB

    place = "accelerator memory" if torch.cuda.is_available() else "RAM"
    for name, gigabytes in (
        ("working weights, bf16", weights / GB),
        ("master weights, fp32", of("master")),
        ("Adam first moment, fp32", of("exp_avg")),
        ("Adam second moment, fp32", of("exp_avg_sq")),
        (f"EMA, fp32, in {place}", of("ema")),
        ("gradients, fp32 (during a step)", of("master")),
    ):
        print(f"  {name:34} {gigabytes:6.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1)
    arguments = parser.parse_args()
    distributed.initialize(timeout_seconds=1800)
    torch.manual_seed(0)
    unet = build_unet(torch.bfloat16)
    unet.set_gradient_checkpointing("blocks")
    unet.train()
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    print(f"parameters: {parameters:,}", flush=True)
    settings = EngineSettings(micro_batch_size=1, grad_accum_steps=1, precision="bf16", ema_decay=0.9999)
    engine = Engine(unet, settings)
    print(f"after building: {peak_rss_gb():.2f} GB peak RSS", flush=True)
    process = DiffusionProcess(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        prediction_type="epsilon",
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(arguments.steps):
        started = time.perf_counter()
        loss, norm = train_step(engine, unet, process, generator)
        print(f"loss: {loss:.4f}, gradient norm: {norm:.3f}")
        print(f"step: {time.perf_counter() - started:.1f} s", flush=True)
    print_parts(engine, unet)
    print(f"peak RSS: {peak_rss_gb():.2f} GB")
    distributed.shutdown()


if __name__ == "__main__":
    main()
