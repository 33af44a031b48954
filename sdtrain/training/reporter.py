"""Where a report goes: metrics.jsonl, W&B, and the progress line. Rank 0 only; the other ranks' reporter is silent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from sdtrain import distributed
from sdtrain.errors import ExitCode
from sdtrain.training.compile_watch import CompileWatch
from sdtrain.training.goodput import SECONDS, USEFUL, Goodput, useful_seconds
from sdtrain.training.metrics import MetricsLog, SpikeWatch, Throughput, joined_pairs
from sdtrain.training.progress import Progress
from sdtrain.training.stragglers import Stragglers
from sdtrain.training.tracking import AlertLevel, Tracker
from sdtrain.training.trainer import Report
from sdtrain.training.utilisation import Utilisation

GIB = 2**30
MAX_RECOMPILES_TOLD = 3


def memory_gib() -> float:
    """Peak memory of this rank: of the accelerator where there is one, of the process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return psutil.Process().memory_info().rss / GIB


@dataclass
class Reporter:
    """Turns reports into figures under fixed names, once, for all who show them.

    Attributes:
        metrics: The run's own record; None on all ranks but 0.
        tracker: W&B; None on all ranks but 0.
        progress: The line that a person watches; None on all ranks but 0.
        throughput: Speed over the last reports.
        max_steps: Steps of the whole run.
        batch_size: Global batch size.
        stragglers: Who slows the others down; asked on all ranks.
        goodput: Of the run so far; None leaves the figure out.
        utilisation: From speed to MFU; None where the devices' peak or the network's FLOPs are not known.
        compiles: What was compiled; None where nothing is.
    """

    metrics: MetricsLog | None
    tracker: Tracker | None
    progress: Progress | None
    throughput: Throughput
    max_steps: int
    batch_size: int
    stragglers: Stragglers | None = None
    goodput: Goodput | None = None
    utilisation: Utilisation | None = None
    compiles: CompileWatch | None = None
    _spikes: dict[str, SpikeWatch] = field(default_factory=dict, init=False)
    _told_first_step: bool = field(default=False, init=False)

    def report(self, report: Report) -> None:
        """Log one report of the loop; called on all ranks, rank 0 writes."""
        self.throughput.add(images=report.images, seconds=report.seconds, data_wait_seconds=report.data_wait_seconds)
        memory = distributed.max_over_ranks(memory_gib())
        ranks = {} if self.stragglers is None else self.stragglers.figures(report.seconds)
        compiled, recompiled = ({}, []) if self.compiles is None else self.compiles.figures()
        if self.metrics is None:
            return
        figures = self._figures(report) | {"train/memory_gib": memory} | ranks | compiled
        self.log(report.step, figures)
        self._watch(report, figures)
        self._tell_compiled(compiled, recompiled)
        if self.progress is not None:
            self.progress.update(
                step=report.step,
                loss=figures.get("train/loss", float("nan")),
                learning_rate=figures.get("train/learning_rate", 0.0),
                images_per_second=figures["train/images_per_second"],
                data_wait_share=figures["train/data_wait_share"],
                memory_gib=memory,
                eta_seconds=figures["train/eta_seconds"],
            )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures of `step` finished steps; rank 0 only."""
        if self.metrics is not None:
            self.metrics.log(step, figures)
        if self.tracker is not None:
            self.tracker.log(step, figures)

    def show(self, step: int, name: str, files: list[Path]) -> None:
        """Show image files, such as a sample grid; rank 0 only."""
        if self.tracker is not None and files:
            self.tracker.log_images(step, name, files)

    def alert(self, title: str, text: str, level: AlertLevel = "WARN") -> None:
        """Tell whoever watches the run that something needs a look; rank 0 only."""
        if self.tracker is not None:
            self.tracker.alert(title, text, level)

    def stop(self, code: ExitCode, reason: str) -> None:
        """Tell why the attempt ends unless it is complete, then finish the tracker and the progress line."""
        if (code, reason) != (ExitCode.DONE, "complete"):
            is_planned = code in (ExitCode.DONE, ExitCode.REQUEUE)
            self.alert(f"run stopped: {code.name.lower()}", reason, "INFO" if is_planned else "ERROR")
        if self.tracker is not None:
            self.tracker.finish(int(code))
        if self.progress is not None:
            self.progress.close()

    def _figures(self, report: Report) -> dict[str, float]:
        """Names of all figures; with one trainable its name is left out (`train/loss`)."""
        means = joined_pairs(report.means)
        names = {key.split("/")[0] for key in means}
        single = len(names) == 1

        def named(trainable: str, figure: str) -> str:
            return f"train/{figure}" if single else f"train/{trainable}/{figure}"

        figures = {named(*key.split("/", 1)): value for key, value in means.items()}
        for trainable, result in report.results.items():
            figures[named(trainable, "gradient_norm")] = float(result.gradient_norm)
            figures[named(trainable, "learning_rate")] = result.learning_rate
            if result.ema_decay is not None:
                figures[named(trainable, "ema_decay")] = result.ema_decay
            if result.loss_scale is not None:
                figures[named(trainable, "loss_scale")] = result.loss_scale
        left = (self.max_steps - report.step) * self.batch_size
        steps = report.images // self.batch_size
        useful = useful_seconds(
            seconds=report.seconds,
            data_wait_seconds=report.data_wait_seconds,
            steps=steps,
            skipped=report.skipped,
        )
        if self.goodput is not None:
            figures["train/goodput"] = self.goodput.add(useful)
        if self.utilisation is not None:
            figures["train/mfu"] = self.utilisation.share(self.throughput.images_per_second)
        return figures | {
            SECONDS: report.seconds,
            USEFUL: useful,
            "train/steps_covered": float(steps),
            "train/samples_seen": float(report.samples_seen),
            "train/images_per_second": self.throughput.images_per_second,
            "train/data_wait_share": self.throughput.data_wait_share,
            "train/eta_seconds": self.throughput.eta_seconds(left),
            "train/skipped_steps": float(report.skipped),
            **{f"train/skipped/{cause.replace(' ', '_')}": float(times) for cause, times in report.causes.items()},
            **({"train/rollbacks": float(report.rollbacks)} if report.rollbacks else {}),
        }

    def _tell_compiled(self, figures: Mapping[str, float], recompiled: Sequence[str]) -> None:
        """Say once what the first step cost, and warn of every graph that was compiled after warm-up."""
        lines = []
        if figures and not self._told_first_step:
            self._told_first_step = True
            lines.append(
                "first step: {compile/first_step_seconds:.1f} s; compiled so far: {compile/graphs:.0f} graphs in "
                "{compile/seconds:.1f} s, {compile/graph_breaks:.0f} graph breaks".format_map(figures)
            )
        if recompiled:
            shown = recompiled[:MAX_RECOMPILES_TOLD]
            rest = [f"and {len(recompiled) - len(shown)} more"] if len(recompiled) > len(shown) else []
            lines.append("\n  ".join(["compiled again after warm-up, which every rank waits for:", *shown, *rest]))
            self.alert("recompiled", lines[-1])
        if self.progress is not None:
            for line in lines:
                self.progress.say(line)

    def _watch(self, report: Report, figures: Mapping[str, float]) -> None:
        """Alert where a loss stands out, or where steps were skipped."""
        for name, value in figures.items():
            if not name.endswith("/loss"):
                continue
            times = self._spikes.setdefault(name, SpikeWatch()).see(value)
            if times is not None:
                said = f"{times:.1f} times the median of the last reports" if math.isfinite(times) else "not finite"
                self.alert("loss spike", f"{name} is {value:.4g} at step {report.step}: {said}")
        if report.skipped:
            text = f"{report.skipped} updates before step {report.step} were skipped: gradients were not finite"
            self.alert("skipped steps", text)
