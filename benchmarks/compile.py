"""How long the first step takes when a network's blocks are compiled one by one, and when it is compiled as a whole.

    python -m benchmarks.compile
    python -m benchmarks.compile --network dit --ways eager blocks whole

Each way is a process of its own on one rank, with the real engine (ZeRO-2) on equal weights and batches, and with
nothing in inductor's caches. `blocks` is what `trainer.compile: true` does, `whole` is DeepSpeed's `engine.compile()`,
`whole-plain-layout` the same without inductor's layout optimisation, which spoils gradients of convolutions on CPUs.
A way whose gradients are not those of `eager` is no faster way; gradients are read off AdamW's first moment after the
first step, which is (1 - beta1) of them, just as the optimiser saw them. Importing the compiler is not counted.

On a CPU only ratios mean anything.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdtrain import distributed
from sdtrain.denoisers.dit import DiT
from sdtrain.denoisers.unet import UNet
from sdtrain.nn.compilation import compile_blocks
from sdtrain.records import Conditioning
from sdtrain.training.engine import Engine, EngineSettings

WAYS = ("eager", "blocks", "whole", "whole-plain-layout")
BETA1, RATE = 0.9, 1e-4
CONTEXT, TOKENS = 64, 16
RIGHT = 1e-4
TARGET = 1 / 3


def dit(layers: int) -> nn.Module:
    """Equal blocks."""
    return DiT(
        in_channels=4, out_channels=4, width=128, num_layers=layers, num_heads=4, sample_size=16, context_dim=CONTEXT
    )


def unet(layers: int) -> nn.Module:
    """On each of two levels `layers` residual blocks and transformers down, and one more up."""
    return UNet(
        in_channels=4,
        out_channels=4,
        channels=[32, 32],
        down_blocks=["cross", "cross"],
        layers_per_block=layers,
        num_heads=4,
        context_dim=CONTEXT,
        norm_groups=8,
    )


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"dit": dit, "unet": unet}


def build(name: str, layers: int) -> nn.Module:
    """The same weights in every process; none of them zero, which would hide wrong gradients behind it."""
    torch.manual_seed(0)
    network = NETWORKS[name](layers)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


def batch(size: int) -> dict[str, Tensor]:
    """The same data in every process."""
    generator = torch.Generator().manual_seed(1)
    fields = {name: torch.randn(size, 4, 16, 16, generator=generator) for name in ("noised", "noise")}
    fields["tokens"] = torch.randn(size, TOKENS, CONTEXT, generator=generator)
    fields["timesteps"] = torch.randint(0, 1000, (size,), generator=generator)
    return {name: tensor.to(distributed.device()) for name, tensor in fields.items()}


# One process, one way -------------------------------------------------------------------------------------------------


def compiled(engine: Engine, way: str) -> Callable[..., Tensor]:
    """What a step calls, compiled as `way` says once it first runs."""
    importlib.import_module("torch._inductor.compile_fx")  # takes seconds that belong to no way
    inductor = importlib.import_module("torch._inductor.config")
    if way == "blocks":
        compile_blocks(engine.module)
    if way.startswith("whole"):
        inductor.layout_optimization = way == "whole"
        engine._engine.compile()
        return engine._engine
    return engine.module


def run(name: str, layers: int, way: str, size: int, steps: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures of one way, and the gradients of its first step by parameter."""
    from torch._dynamo.utils import counters

    distributed.initialize(timeout_seconds=3600)
    settings = EngineSettings(
        micro_batch_size=size, grad_accum_steps=1, betas=(BETA1, 0.999), gradient_clip_norm=None, ema_decay=None
    )
    engine = Engine(build(name, layers).to(distributed.device()), settings)
    call, fields, weights = compiled(engine, way), batch(size), torch.ones(size, device=distributed.device())

    def step() -> tuple[float, float]:
        started = time.perf_counter()
        engine.begin()
        prediction = call(fields["noised"], fields["timesteps"], Conditioning(tokens=fields["tokens"]))
        losses = (prediction - fields["noise"]).square().flatten(1).mean(1)
        engine.backward(losses, weights)
        engine.step(RATE)
        loss = float(losses.mean())  # a CPU-GPU sync point
        return time.perf_counter() - started, loss

    first_seconds, first_loss = step()
    gradients = moments(engine)
    rest = [step()[0] for _ in range(steps)]
    facts = {
        "first_step_seconds": first_seconds,
        "step_seconds": statistics.median(rest),
        "loss": first_loss,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
    }
    distributed.shutdown()
    return facts, gradients


def moments(engine: Engine) -> dict[str, Tensor]:
    """AdamW's first moment of every parameter, on the one rank that holds all of them."""
    held = engine.tensors()
    return {
        slot.name: held[f"group{index}/exp_avg"][slot.offset : slot.offset + slot.numel].clone()
        for index, group in enumerate(engine.partitions.layout.groups)
        for slot in group.slots
    }


# All ways -------------------------------------------------------------------------------------------------------------


def measure(name: str, way: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one way in a process of its own, with empty caches."""
    caches = folder / f"{name}-{way}-cache"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(caches), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    options = ["--layers", str(arguments.layers[name]), "--batch-size", str(arguments.batch_size)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compile", "--network", name, "--ways", way, *options]
    subprocess.run([*command, "--steps", str(arguments.steps), "--leave", str(folder)], env=environment, check=True)
    facts = json.loads((folder / f"{name}-{way}.json").read_text())
    print(f"{name} {way}: first step {facts['first_step_seconds']:.1f} s", file=sys.stderr, flush=True)
    return facts


def compare(theirs: Mapping[str, Tensor], eager: Mapping[str, Tensor]) -> dict[str, Any]:
    """||a - b|| / ||b|| over all gradients, and how many single ones are wrong, zeros among them.

    Some gradients are zero on paper (of `to_k.bias`) and rounding in practice: of them, only size is looked at.
    """
    norm = torch.cat(list(eager.values())).norm()
    noise = 1e-6 * norm
    wrong = set()
    for name, wanted in eager.items():
        allowed = RIGHT * wanted.norm() if wanted.norm() > noise else noise
        if (theirs[name] - wanted).norm() > allowed:
            wrong.add(name)
    difference = torch.cat([theirs[name] - wanted for name, wanted in eager.items()]).norm()
    return {
        "gradient_error": float(difference / norm),
        "gradients": len(eager),
        "wrong_gradients": len(wrong),
        "of_them_zero": sum(not theirs[name].any() for name in wrong),
    }


def report(name: str, facts: Mapping[str, dict[str, Any]]) -> None:
    """A table for people."""
    print(f"\n{name}: {facts['eager']['parameters'] / 1e6:.1f}M parameters, one rank, ZeRO-2, fp32")
    print(f"{'way':<20}{'first step s':>14}{'later ms':>10}{'graphs':>8}{'breaks':>8}{'error':>10}{'wrong':>10}")
    for way, row in facts.items():
        wrong = f"{row['wrong_gradients']}/{row['gradients']}"
        print(
            f"{way:<20}{row['first_step_seconds']:>14.1f}{row['step_seconds'] * 1e3:>10.0f}{row['graphs']:>8}"
            f"{row['graph_breaks']:>8}{row['gradient_error']:>10.1e}{wrong:>10}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, help="blocks of the DiT, residual blocks on each level of the UNet")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="timed steps after the first")
    parser.add_argument("--leave", type=Path, help=argparse.SUPPRESS)  # of the one way that this process is for
    arguments = parser.parse_args()
    if arguments.leave is not None:
        (name,), (way,) = arguments.network, arguments.ways
        facts, gradients = run(name, arguments.layers, way, arguments.batch_size, arguments.steps)
        save_file(gradients, arguments.leave / f"{name}-{way}.safetensors")
        (arguments.leave / f"{name}-{way}.json").write_text(json.dumps(facts))
        return
    arguments.layers = {"dit": arguments.layers or 24, "unet": arguments.layers or 8}
    ways = ["eager", *(way for way in arguments.ways if way != "eager")]
    results: dict[str, Any] = {}
    for name in arguments.network:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            facts = {way: measure(name, way, arguments, folder) for way in ways}
            eager = load_file(folder / f"{name}-eager.safetensors")
            for way in ways:
                facts[way] |= compare(load_file(folder / f"{name}-{way}.safetensors"), eager)
        report(name, facts)
        results[name] = {"layers": arguments.layers[name], "ways": facts}
        if "blocks" in facts and "whole" in facts:
            results[name]["blocks_over_whole"] = (
                facts["blocks"]["first_step_seconds"] / facts["whole"]["first_step_seconds"]
            )
    import deepspeed

    print(
        json.dumps(
            {
                "work": f"{arguments.batch_size} latents of 4x16x16, {TOKENS} tokens, fp32",
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
                "threads": torch.get_num_threads(),
                "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
                "target_blocks_over_whole": TARGET,
                "networks": results,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
