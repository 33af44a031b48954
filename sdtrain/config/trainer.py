"""Section `trainer`: how long and how the steps are run."""

from __future__ import annotations

from typing import Literal

from sdtrain.config.base import PositiveFloat, PositiveInt, Section

Precision = Literal["fp32", "bf16", "fp16"]
CompileMode = Literal["default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"]
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class TrainerConfig(Section):
    """The training loop; exactly one of `max_steps` and `max_epochs`.

    Attributes:
        max_steps: Optimiser steps of the whole run.
        max_epochs: Passes over the training split; the steps follow from its size.
        precision: Working precision of the denoiser and of what it is told; master weights, moments, EMA and the sum
            of gradients over micro-steps are fp32 always, and so are autoencoders, trained or not.
        reduce_precision: In which gradients are summed over the ranks: fp32, or the `working` precision, which moves
            half as much between nodes and rounds once per rank.
        zero_stage: DeepSpeed's partitioning; only stage 2 is checkpointed by sdtrain.
        compile: Compile the repeated blocks in place; minutes at the start, about a quarter faster on a GPU.
        compile_mode: Of torch.compile; `max-autotune-no-cudagraphs` also times several kernels for every product at
            the start. `reduce-overhead` and `max-autotune` are refused: their CUDA graphs overwrite what is still read.
        gradient_checkpointing: `blocks` recomputes them in the backward: far less memory, a quarter slower.
        reduce_bucket_size: Elements in one gradient reduction; on a CPU at most 8,000,000.
        overlap_comm: Reduce gradients while the backward goes on.
        oom_skip: Throw a step away also where a rank runs out of memory in its backward. Gradients are then reduced
            after each backward instead of during it, and stand whole on every rank until then; false ends such an
            attempt, and the next one resumes. In the forward it is always thrown away.
        log_every_steps: Steps between two rows of metrics.jsonl.
        timeout_seconds: How long a rank may stand still outside of its steps (start, first step, validation, saving)
            before the run counts as hung. Collectives wait a minute longer, so that the watchdog names the culprit.
        hang_timeout_seconds: How long a rank may stand still within a step; null takes a third of timeout_seconds.
        max_hours: Wall clock of one start: when it is reached the run saves and asks to be started again; null sets
            no limit. Leave the scheduler's own limit some minutes above it.
    """

    max_steps: PositiveInt | None = None
    max_epochs: PositiveInt | None = None
    precision: Precision
    reduce_precision: Literal["fp32", "working"] = "fp32"
    zero_stage: Literal[2] = 2
    compile: bool = False
    compile_mode: CompileMode = "default"
    gradient_checkpointing: Literal["none", "blocks"] = "none"
    reduce_bucket_size: PositiveInt = 50_000_000
    overlap_comm: bool = False
    oom_skip: bool = False
    log_every_steps: PositiveInt = 10
    timeout_seconds: PositiveFloat = 1800.0
    hang_timeout_seconds: PositiveFloat | None = None
    max_hours: PositiveFloat | None = None

    @property
    def step_timeout_seconds(self) -> float:
        """How long a rank may stand still within a step."""
        return self.hang_timeout_seconds or self.timeout_seconds / 3
