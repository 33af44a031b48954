"""Run under torchrun: real ZeRO-2 on all ranks, beside a plain fp32 AdamW that sees the whole batch.

Both leave a trace: for every step the loss, the norm, and for every parameter the gradient that AdamW was handed
(reduced and clipped), the weights and their average.

    torchrun --nproc-per-node 2 -m tests.distributed.zero2_worker REPORT.json short|long|compiled
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdtrain import distributed
from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.denoisers.unet import UNet
from sdtrain.nn.compilation import compile_blocks
from sdtrain.records import Conditioning, Precision
from sdtrain.training.engine import DTYPES, Engine, EngineSettings, parameter_groups
from tests.engines import fp16_on_cpu

BATCH, STEPS, RATE, CLIP, DECAY, TINY, LARGE = 8, 20, 1e-3, 0.1, 0.99, 5_000, 50_000_000
EPS = 1e-5
"""Of AdamW. At 1e-8 it makes a whole step of a gradient that is nothing but rounding: plain AdamW then differs from
plain AdamW by 1e-4 after 20 steps, when only the order changes in which the samples of a batch are added up."""
Tensors = dict[str, Tensor]
Modules = dict[str, nn.Module]
Batch = tuple[Tensor, ...]

# What is trained ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class World:
    """Trainables that are updated one after the other in every step, from losses that may reach all of them."""

    build: Callable[[], Modules]
    losses: Callable[[Modules, str, Batch], Tensor]
    batches: list[Batch]


def denoiser() -> Modules:
    torch.manual_seed(0)
    unet = UNet(
        in_channels=4,
        out_channels=4,
        channels=[8, 16],
        down_blocks=["plain", "cross"],
        layers_per_block=1,
        num_heads=2,
        context_dim=8,
        norm_groups=4,
        zero_init=False,  # a zero output would hide wrong gradients behind it
    )
    return {"denoiser": unet}


def denoising(modules: Modules, name: str, batch: Batch) -> Tensor:
    noised, timesteps, tokens, wanted = batch
    dtype = next(modules[name].parameters()).dtype
    made = modules[name](noised.to(dtype), timesteps, Conditioning(tokens=tokens.to(dtype)))
    return (made.float() - wanted).square().flatten(1).mean(1)


def coder_and_judge() -> Modules:
    torch.manual_seed(0)
    coder = AutoencoderKL(
        latent_channels=2,
        channels=[4, 8],
        layers_per_block=1,
        attention_in_middle=False,
        norm_groups=2,
        scaling_factor=1.0,
    )
    judge = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(),
        nn.Conv2d(8, 1, 1),
    )  # fmt: skip
    return {"autoencoder": coder, "discriminator": judge}


def adversarial(modules: Modules, name: str, batch: Batch) -> Tensor:
    """Both losses reach the parameters of both networks: nothing is detached. Nothing has a kink either."""
    (images, noise), coder, judge = batch, modules["autoencoder"], modules["discriminator"]
    assert isinstance(coder, AutoencoderKL)
    moments = coder.encode(images)
    made = coder.decode(coder.posterior_sample(moments, noise))
    if name == "autoencoder":
        error, opinion = (made - images).square().flatten(1).mean(1), judge(made).flatten(1).mean(1)
        return error + 1e-3 * coder.kl(moments) - 0.1 * opinion
    return (F.softplus(-judge(images)) + 0.5 * F.softplus(judge(made))).flatten(1).mean(1)


def draw(*shapes: tuple[int, ...]) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(BATCH, *shape, generator=generator) for shape in shapes) for _ in range(STEPS)]


WORLDS = {
    "denoiser": World(denoiser, denoising, [
        (noised, (1000 * place.abs()).clamp(max=999).long(), tokens, wanted)
        for noised, place, tokens, wanted in draw((4, 8, 8), (), (5, 8), (4, 8, 8))
    ]),
    "autoencoder and discriminator": World(coder_and_judge, adversarial, draw((3, 8, 8), (2, 4, 4))),
}  # fmt: skip


# How it is trained ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One combination of what a page can set."""

    world: str = "denoiser"
    steps: int = STEPS
    accumulation: int = 1
    clip: float | None = CLIP
    weight_decay_on: Literal["all", "matrices"] = "all"
    bucket: int = TINY
    overlap: bool = False
    checkpointing: Literal["none", "blocks"] = "none"
    oom_skip: bool = False
    compiled: Literal["no", "aot_eager", "inductor"] = "no"
    precision: Precision = "fp32"
    reduce_precision: Literal["fp32", "working"] = "fp32"

    def settings(self) -> EngineSettings:
        return EngineSettings(
            micro_batch_size=BATCH // distributed.ranks().world_size // self.accumulation,
            grad_accum_steps=self.accumulation,
            eps=EPS,
            precision=self.precision,
            reduce_precision=self.reduce_precision,
            weight_decay_on=self.weight_decay_on,
            gradient_clip_norm=self.clip,
            reduce_bucket_size=self.bucket,
            overlap_comm=self.overlap,
            oom_skip=self.oom_skip,
            ema_decay=DECAY,
        )


@dataclass
class Trace:
    """What happened to one trainable, step by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)
    parameters: list[Tensors] = field(default_factory=list)
    averages: list[Tensors] = field(default_factory=list)
    loss_scales: list[float] = field(default_factory=list)


def parameters_of(module: nn.Module) -> Tensors:
    return {name: one.detach().float().clone() for name, one in module.named_parameters()}


@functools.cache
def plain(world_name: str, clip: float | None, weight_decay_on: Literal["all", "matrices"]) -> dict[str, Trace]:
    """One process, the whole batch at once, torch's own AdamW and clipping, an average written out."""
    world = WORLDS[world_name]
    modules = world.build()
    optimizers = {
        name: torch.optim.AdamW(parameter_groups(module, 0.01, weight_decay_on), lr=RATE, eps=EPS)
        for name, module in modules.items()
    }
    traces = {name: Trace(averages=[parameters_of(module)]) for name, module in modules.items()}
    for step, (batch, (name, optimizer)) in enumerate(itertools.product(world.batches, optimizers.items())):
        module, trace = modules[name], traces[name]
        for each in modules.values():
            each.zero_grad(set_to_none=True)
        loss = world.losses(modules, name, batch).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), float("inf") if clip is None else clip)
        optimizer.step()
        applied = step // len(modules) + 1
        decay = min(DECAY, (1 + applied) / (10 + applied))
        average, now = trace.averages[-1], parameters_of(module)
        trace.losses.append(loss.item())
        trace.norms.append(norm.item())
        trace.gradients.append(
            {key: one.grad.clone() for key, one in module.named_parameters() if one.grad is not None}
        )
        trace.parameters.append(now)
        trace.averages.append({key: decay * average[key] + (1 - decay) * now[key] for key in now})
    for trace in traces.values():
        del trace.averages[0]
    return traces


class Watched:
    """An engine whose AdamW is asked, in the moment that it steps, for the gradients it was handed."""

    def __init__(self, module: nn.Module, settings: EngineSettings) -> None:
        self.engine = Engine(module, settings)
        self.trace = Trace()
        self.skipped = 0
        self._handed: list[Tensor] = []
        self.engine._engine.optimizer.optimizer.register_step_pre_hook(self._keep)

    def _keep(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._handed += [one.grad.clone() for group in optimizer.param_groups for one in group["params"]]

    def step(self, loss: float) -> bool:
        """Step and write down what came of it; False where the step was skipped."""
        self._handed.clear()
        result = self.engine.step(RATE)
        assert result is not None, "all micro-steps are accumulated"
        if not result.applied:
            self.engine.rewind(keeps_scale=True)
            self.skipped += 1
            return False
        assert self.engine.ema is not None
        self.trace.losses.append(loss)
        self.trace.norms.append(float(result.gradient_norm))
        self.trace.loss_scales.append(result.loss_scale or 1.0)
        self.trace.gradients.append(self._whole(self._handed))
        self.trace.parameters.append(self._whole(self.engine.partitions.masters()))
        self.trace.averages.append(self._whole(self.engine.ema.shards))
        return True

    def _whole(self, spans: list[Tensor]) -> Tensors:
        """Every parameter's tensor, from all ranks' spans of the flat vectors."""
        named, partitions = {}, self.engine.partitions
        for group, mine, (start, stop) in zip(partitions.layout.groups, spans, partitions.spans, strict=True):
            flat = torch.zeros(group.numel)
            flat[start:stop] = mine[: stop - start]
            torch.distributed.all_reduce(flat)
            for slot in group.slots:
                named[slot.name] = flat[slot.offset : slot.offset + slot.numel].view(slot.shape)
        return named


def prepare(modules: Modules, row: Row) -> None:
    for module in modules.values():
        if isinstance(module, UNet):
            module.set_gradient_checkpointing(row.checkpointing)
        if row.compiled != "no":
            torch.compiler.set_default_backend(row.compiled)
            assert compile_blocks(module) > 0


def part_of(batch: Batch, rank: int, micro_step: int, row: Row) -> Batch:
    """A rank's micro-batch of the whole batch."""
    size = BATCH // distributed.ranks().world_size // row.accumulation
    first = (rank * row.accumulation + micro_step) * size
    return tuple(each[first : first + size] for each in batch)


def accumulate(
    world: World, modules: Modules, watched: Watched, name: str, batch: Batch, row: Row, factor: float = 1.0
) -> float:
    """This rank's micro-steps, with losses times `factor`; returns the mean loss of the whole batch."""
    watched.engine.begin()
    total = 0.0
    for micro_step in range(row.accumulation):
        losses = factor * world.losses(modules, name, part_of(batch, distributed.ranks().rank, micro_step, row))
        verdict = torch.tensor(1.0) if micro_step == row.accumulation - 1 else None
        watched.engine.backward(losses, torch.ones_like(losses), verdict)
        total += float(losses.detach().sum())
    return distributed.sum_over_ranks(total) / BATCH


def zero2(row: Row) -> dict[str, Watched]:
    """All ranks, each its part of the batch, by our engine; a step that overflows is taken again."""
    world = WORLDS[row.world]
    modules = world.build()
    prepare(modules, row)
    engines = {name: Watched(module, row.settings()) for name, module in modules.items()}
    for batch, (name, watched) in itertools.product(world.batches[: row.steps], engines.items()):
        with watched.engine.alone([other.engine for other in engines.values() if other is not watched]):
            while not watched.step(accumulate(world, modules, watched, name, batch, row)):
                assert watched.skipped < 20
    return engines


# How far they are apart -----------------------------------------------------------------------------------------------


def apart(mine: Tensors, theirs: Tensors) -> tuple[float, float, str]:
    """||a - b|| / ||b|| over all tensors together; and of the worst single one, with its name.

    A gradient that is zero on paper has no relative error: a tensor's norm counts as 1e-6 of the whole at least.
    """
    assert mine.keys() == theirs.keys()
    whole = float(torch.stack([one.norm() for one in theirs.values()]).norm())
    differences = {name: float((mine[name] - one).norm()) for name, one in theirs.items()}
    singles = {name: differences[name] / max(float(one.norm()), 1e-6 * whole) for name, one in theirs.items()}
    worst = max(singles, key=lambda name: singles[name])
    return float(torch.tensor(list(differences.values())).norm()) / whole, singles[worst], worst


def worst_step(mine: list[Tensors], theirs: list[Tensors]) -> tuple[float, float, str]:
    """The largest of all steps: overall, and of a single tensor."""
    found = [apart(a, b) for a, b in zip(mine, theirs, strict=True)]
    single, name = max((single, name) for _, single, name in found)
    return max(overall for overall, _, _ in found), single, name


def furthest(mine: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))


def compare(row: Row, name: str, watched: Watched) -> dict[str, Any]:
    """One line of the table: the largest error of any step."""
    mine, theirs = watched.trace, plain(row.world, row.clip, row.weight_decay_on)[name]
    start = parameters_of(WORLDS[row.world].build()[name])
    gradient, single, single_name = worst_step(mine.gradients, theirs.gradients[: row.steps])
    return asdict(row) | {
        "trainable": name,
        "loss": furthest(mine.losses, theirs.losses[: row.steps]),
        "norm": furthest(mine.norms, theirs.norms[: row.steps]),
        "gradient": gradient,
        "first_gradient": apart(mine.gradients[0], theirs.gradients[0])[0],
        "worst_gradient": single,
        "worst_gradient_of": single_name,
        "parameters": worst_step(mine.parameters, theirs.parameters[: row.steps])[0],
        "ema": worst_step(mine.averages, theirs.averages[: row.steps])[0],
        "moved": apart(theirs.parameters[row.steps - 1], start)[0],
        "clipped_steps": sum(row.clip is not None and norm > row.clip for norm in theirs.norms[: row.steps]),
        "skipped_steps": watched.skipped,
    }


def half_precision_sum(row: Row, watched: Watched) -> float:
    """Error of the first gradient against the fp32 sum of what all micro-steps of all ranks have in half precision."""
    world, scale = WORLDS[row.world], watched.trace.loss_scales[0]
    modules, ranks = world.build(), distributed.ranks().world_size
    modules["denoiser"].to(DTYPES[row.precision])
    total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for rank, micro_step in itertools.product(range(ranks), range(row.accumulation)):
        modules["denoiser"].zero_grad()
        losses = world.losses(modules, "denoiser", part_of(world.batches[0], rank, micro_step, row))
        (losses.sum() / len(losses) / row.accumulation * scale).backward()
        for name, parameter in modules["denoiser"].named_parameters():
            assert parameter.grad is not None
            total[name] = total[name] + parameter.grad.float() / ranks / scale
    norm = float(torch.stack([one.norm() for one in total.values()]).norm())
    shrink = min(1.0, CLIP / (norm + 1e-6))
    return apart(watched.trace.gradients[0], {name: one * shrink for name, one in total.items()})[0]


def overflow_of_one_rank(row: Row, watched: Watched) -> list[dict[str, Any]]:
    """Two steps in which rank 1 alone overflows, and one in which no rank does."""
    world, engine = WORLDS[row.world], watched.engine
    scale, applied_steps = engine.loss_scale, engine.applied_steps
    results = []
    for factor in (1e30, 1e30, 1.0):
        before = copy.deepcopy(engine.tensors())
        here = factor if distributed.ranks().rank == 1 else 1.0
        loss = accumulate(world, {"denoiser": engine.module}, watched, "denoiser", world.batches[0], row, here)
        results.append({
            "applied": watched.step(loss),
            "applied_steps": engine.applied_steps - applied_steps,
            "scale": engine.loss_scale / scale,
            "moved": any(not torch.equal(one, before[name]) for name, one in engine.tensors().items()),
        })  # fmt: skip
    return results


# What is reported -----------------------------------------------------------------------------------------------------

_OTHER: dict[str, Any] = {"clip": None, "weight_decay_on": "matrices"}
SHORT = [
    Row(),
    Row(steps=10, accumulation=4, bucket=LARGE, overlap=True, checkpointing="blocks", **_OTHER),
    Row(steps=5, overlap=True, checkpointing="blocks"),
    Row(steps=5, bucket=LARGE, oom_skip=True, **_OTHER),
    Row(steps=5, accumulation=4, bucket=LARGE, checkpointing="blocks", oom_skip=True),
    Row(steps=5, accumulation=4, overlap=True, oom_skip=True, **_OTHER),
    Row(steps=3, overlap=True, compiled="aot_eager"),
    Row(world="autoencoder and discriminator", steps=10, accumulation=2),
]
"""Of any two settings every pair of values; and the compiler without the generation of code, which takes minutes."""


def every(**values: tuple[Any, ...]) -> list[Row]:
    """Every combination of these values."""
    return [Row(**dict(zip(values, each, strict=True))) for each in itertools.product(*values.values())]


_BOTH = (False, True)
_VALUES = {"accumulation": (1, 4), "clip": (CLIP, None), "overlap": _BOTH}
LONG = [
    *every(**_VALUES, bucket=(TINY, LARGE), checkpointing=("none", "blocks"), oom_skip=_BOTH),
    *every(**_VALUES, world=("autoencoder and discriminator",)),
]
COMPILED = [
    Row(compiled="inductor", overlap=True),
    Row(compiled="inductor", accumulation=4, oom_skip=True, **_OTHER),
    Row(compiled="inductor", accumulation=4, overlap=True, checkpointing="blocks"),
    Row(compiled="inductor", bucket=LARGE, oom_skip=True, checkpointing="blocks", **_OTHER),
]
HALF = [
    Row(precision="bf16"),
    Row(precision="bf16", steps=1, accumulation=4),
    Row(precision="bf16", steps=1, accumulation=4, oom_skip=True),
    Row(precision="bf16", steps=1, accumulation=4, reduce_precision="working"),
    Row(precision="fp16"),
    Row(precision="fp16", steps=1, accumulation=4),
]


def report(form: str) -> dict[str, Any]:
    rows, half = [], []
    for row in {"short": SHORT, "long": LONG, "compiled": COMPILED}[form]:
        started = time.perf_counter()
        rows += [compare(row, name, watched) for name, watched in zero2(row).items()]
        rows[-1]["seconds"] = time.perf_counter() - started
    for row in HALF if form == "short" else []:
        with fp16_on_cpu():
            watched = zero2(row)["denoiser"]
            line = compare(row, "denoiser", watched) | {"sum": half_precision_sum(row, watched)}
            if row.precision == "fp16" and row.steps > 1:
                line["overflows"] = distributed.gather_objects(overflow_of_one_rank(row, watched))
            half.append(line)
    return {"rows": rows, "half": half}


def main(path: Path, form: str) -> None:
    distributed.initialize(timeout_seconds=120)
    found = report(form)
    if distributed.ranks().is_main:
        path.write_text(json.dumps(found))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
