"""A step through our trainer and ZeRO-2 engine beside the same step as a bare loop: one process, alternating.

    python -m benchmarks.trainer_overhead --batch-sizes 8 16 --pairs 7

Three take turns. The bare loop is what one would write by hand for one device: forward, backward, clipping by the
global norm, torch's fused AdamW, a foreach EMA. The engine adds what ZeRO-2 does on one rank: buckets, partitions, its
own norm. The trainer adds the agreement of ranks, the health of losses, figures and the schedule. All take the same
steps on equal weights, which is asserted first.

ZeRO-2's part is a constant per parameter, whatever the batch: it is printed as such, and the ratios are those of the
batch sizes asked for. On a CPU only ratios mean anything; all figures are medians over rounds in which each takes one
step, which a machine whose speed drifts does not shift.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import torch
from torch import Tensor, nn

from sdtrain import distributed
from sdtrain.denoisers.unet import PRESETS, UNet
from sdtrain.records import Batch, Conditioning, DrawSpec, LossOutput, Trainable
from sdtrain.training.ema import decay_at
from sdtrain.training.engine import Engine, EngineSettings
from sdtrain.training.trainer import Trainer, TrainerSettings

SMALL = {**PRESETS["sd15"], "channels": (64, 128, 256, 256)}
RATE, CLIP, DECAY, WEIGHT_DECAY = 1e-4, 1.0, 0.9999, 0.01
MAX_ERROR = 1e-5


def losses_of(unet: nn.Module, fields: Mapping[str, Tensor]) -> Tensor:
    """(batch,) squared errors of a prediction."""
    dtype = next(unet.parameters()).dtype
    conditioning = Conditioning(tokens=fields["tokens"].to(dtype))
    prediction = unet(fields["noised"].to(dtype), fields["timesteps"], conditioning).float()
    return (prediction - fields["noise"]).square().flatten(1).mean(1)


class Denoising:
    """The task of the trainer's side; it holds nothing but the network."""

    def __init__(self, unet: nn.Module) -> None:
        self.trainables: Mapping[str, Trainable] = {"denoiser": Trainable(unet)}
        self.frozen: Mapping[str, nn.Module] = {}
        self.draws = DrawSpec()
        self.unet = unet

    def is_active(self, name: str, step: int) -> bool:
        """Always."""
        return True

    def loss(self, name: str, batch: Batch, step: int) -> LossOutput:
        """Losses, and the figure that a run logs beside them."""
        losses = losses_of(self.unet, batch.fields)
        return LossOutput(losses=losses, weights=batch.weights, metrics={"mse": losses.detach()})

    def validate(self, batch: Batch) -> Mapping[str, Tensor]:
        """Not asked for here."""
        raise NotImplementedError

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        """Not asked for here."""
        raise NotImplementedError


class BareLoop:
    """One step by hand."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.parameters: list[Tensor] = list(unet.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=WEIGHT_DECAY, fused=True)
        self.average = [parameter.detach().float().clone() for parameter in self.parameters]
        self.steps = 0

    def step(self, fields: Mapping[str, Tensor]) -> None:
        """Forward, backward, clip, update, average."""
        losses_of(self.unet, fields).mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay_at(self.steps, DECAY))


@dataclass(frozen=True)
class Side:
    """One that takes steps, on its own weights."""

    unet: nn.Module
    step: Callable[[Batch], object]


def samples(batch_size: int, size: int) -> Iterator[tuple[int, int, Batch]]:
    """Random batches without end; making one costs nothing beside a step."""
    step = 0
    while True:
        generator = torch.Generator().manual_seed(step)
        fields = {name: torch.randn(batch_size, 4, size, size, generator=generator) for name in ("noised", "noise")}
        fields["tokens"] = torch.randn(batch_size, 77, 768, generator=generator)
        fields["timesteps"] = torch.randint(0, 1000, (batch_size,), generator=generator)
        positions = torch.arange(step * batch_size, (step + 1) * batch_size)
        keys = tuple(map(str, positions.tolist()))
        yield step, 0, Batch(keys, positions, fields, {}, {}, torch.ones(batch_size))
        step += 1


def relative_difference(ours: nn.Module, theirs: nn.Module, start: nn.Module) -> float:
    """||ours - theirs|| over the way that theirs has come."""
    flat = [torch.cat([one.detach().flatten() for one in module.parameters()]) for module in (ours, theirs, start)]
    return float((flat[0] - flat[1]).norm() / (flat[1] - flat[2]).norm())


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one step, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def processor() -> str:
    """The CPU as the kernel names it; its architecture where the kernel does not."""
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def sides_of(start: nn.Module, batch_size: int, latent_size: int, device: torch.device) -> dict[str, Side]:
    """Bare loop, engine and trainer, each on its own copy of the weights."""
    copies = {name: copy.deepcopy(start).to(device).train() for name in ("bare", "engine", "trainer")}
    settings = EngineSettings(
        micro_batch_size=batch_size,
        grad_accum_steps=1,
        weight_decay=WEIGHT_DECAY,
        gradient_clip_norm=CLIP,
        ema_decay=DECAY,
    )
    bare, engine = BareLoop(copies["bare"]), Engine(copies["engine"], settings)
    trainer = Trainer(
        task=Denoising(copies["trainer"]),
        engines={"denoiser": Engine(copies["trainer"], settings)},
        settings=TrainerSettings(max_steps=10**9, batch_size=batch_size, grad_accum_steps=1, seed=0),
        batches=samples(batch_size, latent_size),
        learning_rate=lambda name, applied_steps: RATE,
        leaves_after=lambda step: True,
    )

    def engine_step(batch: Batch) -> None:
        engine.begin()
        engine.backward(losses_of(copies["engine"], batch.fields), batch.weights)
        engine.step(RATE)

    return {
        "bare": Side(copies["bare"], lambda batch: bare.step(batch.fields)),
        "engine": Side(copies["engine"], engine_step),
        "trainer": Side(copies["trainer"], lambda batch: trainer.fit()),
    }


def compare(start: nn.Module, batch_size: int, latent_size: int, pairs: int, device: torch.device) -> dict[str, object]:
    """What one batch size costs each of them; the first round warms up, and asserts that all took the same step."""
    sides = sides_of(start, batch_size, latent_size, device)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    stream = samples(batch_size, latent_size)
    names = list(sides)
    differences: dict[str, float] = {}
    for turn in range(pairs + 1):
        batch = next(stream)[2].to(device)
        for name in names[turn % 3 :] + names[: turn % 3]:  # who goes first changes as well
            seconds[name].append(timed(partial(sides[name].step, batch), device))
        if turn == 0:
            bare = sides["bare"].unet
            differences = {name: relative_difference(sides[name].unet, bare, start) for name in names[1:]}
            assert max(differences.values()) < MAX_ERROR, f"they do not take the same step: {differences}"
    rounds = {name: taken[1:] for name, taken in seconds.items()}
    added = statistics.median(mine - base for mine, base in zip(rounds["engine"], rounds["bare"], strict=True))
    parameters = sum(parameter.numel() for parameter in start.parameters())
    return {
        "work": f"{batch_size} latents of edge {latent_size}",
        "difference_of_the_first_step": differences,
        "seconds": {name: statistics.median(taken) for name, taken in rounds.items()},
        "trainer_over_bare": ratio(rounds["trainer"], rounds["bare"]),
        "trainer_over_engine": ratio(rounds["trainer"], rounds["engine"]),
        "engine_over_bare": ratio(rounds["engine"], rounds["bare"]),
        "engine_adds_ms_per_million_parameters": 1e9 * added / parameters,
    }


def ratio(mine: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Of steps of the same round."""
    ratios = [one / other for one, other in zip(mine, base, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "rounds": len(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    distributed.initialize(timeout_seconds=600)
    device = distributed.device()
    torch.manual_seed(0)
    start = UNet(**SMALL).to(device)
    for parameter in start.parameters():  # a zero-initialised output would leave nothing to learn behind it
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    print(
        json.dumps(
            {
                "parameters": sum(parameter.numel() for parameter in start.parameters()),
                "precision": "fp32",
                "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
                "threads": torch.get_num_threads(),
                "versions": {name: version(name) for name in ("torch", "deepspeed")},
                "sizes": [
                    compare(start, batch_size, arguments.latent_size, arguments.pairs, device)
                    for batch_size in arguments.batch_sizes
                ],
            },
            indent=2,
        )
    )
    distributed.shutdown()


if __name__ == "__main__":
    main()
