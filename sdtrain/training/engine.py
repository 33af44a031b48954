"""One trainable under DeepSpeed ZeRO-2: backward, step, EMA, working precision."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdtrain import distributed
from sdtrain.checkpoints.partitions import MasterPartitions
from sdtrain.records import Precision
from sdtrain.training.ema import ShardedEma

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def import_deepspeed() -> Any:
    """DeepSpeed, told to use the CPU where there is no accelerator, and without its JIT-built shared-memory op.

    The op takes 20 s to build at start and needs a compiler; gloo does its work.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # DeepSpeed calls collectives by names that torch has since deprecated; a user can do nothing about it.
    warnings.filterwarnings("ignore", message=".*is deprecated.*", category=FutureWarning, module="torch.distributed")
    if not torch.cuda.is_available():
        __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What one engine needs to know; plain values, so that tests build it without a config page."""

    micro_batch_size: int
    grad_accum_steps: int
    precision: Precision = "fp32"
    zero_stage: int = 2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    weight_decay_on: Literal["all", "matrices"] = "all"
    gradient_clip_norm: float | None = 1.0
    reduce_bucket_size: int = 50_000_000
    overlap_comm: bool = False
    ema_decay: float | None = 0.9999

    def deepspeed_config(self, world_size: int) -> dict[str, Any]:
        """DeepSpeed's own page. Everything whose default has changed between releases is written out."""
        return {
            "train_batch_size": self.micro_batch_size * self.grad_accum_steps * world_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.grad_accum_steps,
            "gradient_clipping": self.gradient_clip_norm or 0.0,
            "bf16": {"enabled": self.precision == "bf16", "check_grad_overflow": True},
            "fp16": {"enabled": self.precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.zero_stage,
                "overlap_comm": self.overlap_comm,
                "reduce_bucket_size": self.reduce_bucket_size,
                "allgather_bucket_size": self.reduce_bucket_size,
                "contiguous_gradients": True,
                "round_robin_gradients": False,
                "parameter_alignment": False,
            },
            "steps_per_print": 2**31,
            "comms_logger": {"enabled": False},
        }


def parameter_groups(module: nn.Module, weight_decay: float, on: Literal["all", "matrices"]) -> list[dict[str, Any]]:
    """Groups for the optimiser: `matrices` exempts biases, norms and other vectors from weight decay."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if on == "all":
        return [{"params": trained, "weight_decay": weight_decay}]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimiser step did.

    Attributes:
        applied: False where DeepSpeed skipped the step on all ranks because a gradient was not finite.
        gradient_norm: Global norm before clipping; inf for a skipped step.
        learning_rate: Rate of this step.
        ema_decay: Decay that the average moved with, None without an EMA or for a skipped step.
    """

    applied: bool
    gradient_norm: float | Tensor
    learning_rate: float
    ema_decay: float | None


class Engine:
    """One trainable's DeepSpeed engine with its master partitions and EMA.

    Attributes:
        module: The trained network, in its working precision.
        partitions: This rank's fp32 master and moments.
        ema: The average over `partitions`, or None.
        applied_steps: Updates really applied; LR and EMA follow this, never DeepSpeed's own counter, which also
            counts skipped steps.
    """

    def __init__(self, module: nn.Module, settings: EngineSettings) -> None:
        deepspeed = import_deepspeed()
        self.settings = settings
        self.applied_steps = 0
        optimizer = torch.optim.AdamW(
            parameter_groups(module, settings.weight_decay, settings.weight_decay_on),
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        originals = {}
        if settings.precision != "fp32":  # DeepSpeed casts first and takes its master from what is left
            originals = {name: one.detach().clone() for name, one in module.named_parameters() if one.requires_grad}
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=settings.deepspeed_config(distributed.ranks().world_size),
            dist_init_required=False,
        )
        self.module: nn.Module = self._engine.module
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.partitions = MasterPartitions.of(self._engine.optimizer, self.module)
        if originals:
            self.partitions.load(originals)
        self.ema = (
            None if settings.ema_decay is None else ShardedEma(self.partitions.masters(), decay=settings.ema_decay)
        )

    def backward(self, losses: Tensor, weights: Tensor) -> None:
        """Backward of sum(losses * weights) / planned micro-batch size.

        DeepSpeed divides by accumulation and ranks, so the whole step is sum(losses * weights) / batch_size: a
        tombstone (weight 0) takes its own share away and changes nothing for the others.
        """
        self._engine.backward((losses * weights).sum() / self.settings.micro_batch_size)

    def step(self, learning_rate: float) -> StepResult | None:
        """Count one micro-step; at the accumulation boundary update the weights and the EMA.

        Returns:
            None between boundaries, else what the update did.
        """
        is_boundary = self._engine.is_gradient_accumulation_boundary()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        if not is_boundary:
            return None
        norm = self._engine.get_global_grad_norm()
        if not self._engine.was_step_applied():
            return StepResult(applied=False, gradient_norm=float("inf"), learning_rate=learning_rate, ema_decay=None)
        self.applied_steps += 1
        decay = None
        if self.ema is not None:
            decay = self.ema.update(self.partitions.masters(), applied_steps=self.applied_steps)
        return StepResult(applied=True, gradient_norm=norm, learning_rate=learning_rate, ema_decay=decay)

    @property
    def loss_scale(self) -> float:
        """The fp16 loss scale; 1.0 in other precisions."""
        return float(self._engine.optimizer.loss_scale)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Run the network on its average; collective. Without an EMA the weights stay as they are."""
        if self.ema is None:
            yield
            return
        with self.partitions.working_weights_from(self.ema.shards):
            yield

    @contextmanager
    def alone(self, others: list[Engine]) -> Iterator[None]:
        """Freeze the other engines: ZeRO-2 fails when one loss reaches the parameters of two engines."""
        frozen = [parameter for other in others for parameter in other._trained]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    # What a checkpoint holds of this engine -----------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """This rank's master, moments and EMA by the names of the checkpoint format."""
        return self.partitions.tensors(None if self.ema is None else self.ema.shards)

    def scaler_state(self) -> dict[str, float]:
        """The dynamic loss scaler's counters; empty unless fp16."""
        if self.settings.precision != "fp16":
            return {}
        scaler = self._engine.optimizer.loss_scaler
        return {
            name: float(getattr(scaler, name))
            for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        }

    def restore(self, read: dict[str, Tensor], *, applied_steps: int, scaler: dict[str, float]) -> None:
        """Take over a checkpoint's state for this rank's spans."""
        self.partitions.restore(read, applied_steps=applied_steps)
        self.applied_steps = applied_steps
        if self.ema is not None:
            self.ema.restore([read[f"group{index}/ema"] for index in range(len(self.ema.shards))])
        for name, value in scaler.items():
            kind = type(getattr(self._engine.optimizer.loss_scaler, name))
            setattr(self._engine.optimizer.loss_scaler, name, kind(value))
