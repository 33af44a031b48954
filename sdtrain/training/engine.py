"""One trainable under DeepSpeed ZeRO-2: backward, step, EMA, working precision."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdtrain import distributed
from sdtrain.checkpoints.partitions import MasterPartitions
from sdtrain.errors import ConfigError, RequeueRequest
from sdtrain.records import Precision
from sdtrain.training.ema import ShardedEma
from sdtrain.training.health import agree, for_keeps, is_out_of_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HOST_BUCKET_SIZE = 8_000_000
"""Elements of the largest fp32 buffer that the C library does not give back to the kernel at each backward (32 MiB)."""


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


def refuse_unsupported(precision: Precision) -> None:
    """Let nothing but what DeepSpeed trains on this device pass.

    Raises:
        ConfigError: The device has no instructions for this precision.
    """
    from deepspeed.accelerator import get_accelerator

    here: Any = get_accelerator()
    if DTYPES[precision] not in here.supported_dtypes():
        fit = ", ".join(name for name, dtype in DTYPES.items() if dtype in here.supported_dtypes())
        raise ConfigError(
            f"trainer.precision = {precision}: DeepSpeed does not train in it on this device ({here.device_name()}), "
            f"which has {fit}; set trainer.precision to one of these"
        )


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What one engine needs to know; plain values, so that tests build it without a config page."""

    micro_batch_size: int
    grad_accum_steps: int
    precision: Precision = "fp32"
    reduce_precision: Literal["fp32", "working"] = "fp32"
    zero_stage: int = 2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    weight_decay_on: Literal["all", "matrices"] = "all"
    gradient_clip_norm: float | None = 1.0
    reduce_bucket_size: int = 50_000_000
    overlap_comm: bool = False
    oom_skip: bool = False
    ema_decay: float | None = 0.9999

    def deepspeed_config(self, world_size: int) -> dict[str, Any]:
        """DeepSpeed's own page; every default that can change a number is written out, since several did change.

        0.19.3 turned `bf16.check_grad_overflow` on and `gradient_clipping` from 0 to 1; buffers once took the working
        precision; `overlap_comm`, the bucket sizes and the dtype of reduction depend on stage and precision.
        """
        return {
            "train_batch_size": self.micro_batch_size * self.grad_accum_steps * world_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.grad_accum_steps,
            "managed_gradient_accumulation": True,
            "gradient_clipping": self.gradient_clip_norm or 0.0,
            "gradient_allreduce_op": "mean",
            "prescale_gradients": False,
            "gradient_predivide_factor": 1.0,
            "communication_data_type": self.precision if self.reduce_precision == "working" else "fp32",
            **self._precision_config(),
            "zero_allow_untested_optimizer": True,
            "zero_optimization": self._zero_config(),
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
            "comms_logger": {"enabled": False},
        }

    def _precision_config(self) -> dict[str, Any]:
        """Working weights in `precision`; master, moments and the sum over micro-steps in fp32; buffers as they are."""
        return {
            "bf16": {
                "enabled": self.precision == "bf16",
                "immediate_grad_update": False,
                "check_grad_overflow": True,
                "bf16_master_weights_and_grads": False,
                "bf16_optimizer_states": False,
            },
            "fp16": {
                "enabled": self.precision == "fp16",
                "auto_cast": False,
                "loss_scale": 0,  # dynamic
                "initial_scale_power": 16,
                "loss_scale_window": 1000,
                "hysteresis": 2,
                "consecutive_hysteresis": False,
                "min_loss_scale": 1,
                "fp16_master_weights_and_grads": False,
            },
            "data_types": {
                "grad_accum_dtype": "fp32",
                "param_dtype": self.precision,
                "buffer_dtype": None,
                "keep_in_fp32_modules": [],
            },
            "torch_autocast": {"enabled": False},
        }

    def _zero_config(self) -> dict[str, Any]:
        """What concerns stage 2 without offloading; `compute_grad_norm` is also what finds NaN in fp32."""
        on_gpu = torch.cuda.is_available()
        return {
            "stage": self.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": self.reduce_bucket_size if on_gpu else min(self.reduce_bucket_size, HOST_BUCKET_SIZE),
            "use_multi_rank_bucket_allreduce": True,
            "allgather_partitions": True,
            "allgather_bucket_size": self.reduce_bucket_size,
            "overlap_comm": self.overlap_comm,
            "compute_grad_norm": True,
            "ignore_unused_parameters": True,
            "round_robin_gradients": False,
            "parameter_alignment": False,
            "legacy_stage1": False,
            "zero_quantized_gradients": False,
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
        loss_scale: That this step's losses were multiplied with; None unless fp16.
    """

    applied: bool
    gradient_norm: float | Tensor
    learning_rate: float
    ema_decay: float | None
    loss_scale: float | None = None


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
        refuse_unsupported(settings.precision)
        self.settings = settings
        self.applied_steps = 0
        self._micro_steps = 0
        self._held_back = ExitStack()  # the gradient reduction, while `oom_skip` holds it back
        self._buffers: list[Tensor] = []
        self._scaler: dict[str, float] = {}
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
        if settings.precision == "fp16":  # it would raise at its least scale; `Health` decides when enough is enough
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        self.module: nn.Module = self._engine.module
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.partitions = MasterPartitions.of(self._engine.optimizer, self.module)
        if originals:
            self.partitions.load(originals)
        self.ema = (
            None if settings.ema_decay is None else ShardedEma(self.partitions.masters(), decay=settings.ema_decay)
        )

    # One step: begin, a backward per micro-step or `discard`, step, and `rewind` where it was not applied ------------

    def begin(self) -> None:
        """Start a step: training mode, and a copy of what a forward changes (statistics of BatchNorm, codebooks)."""
        self.module.train()
        self._buffers = [buffer.detach().clone() for buffer in self.module.buffers()]

    def backward(self, losses: Tensor, weights: Tensor, verdict: Tensor | None = None) -> None:
        """Backward of sum(losses * weights) / planned micro-batch size.

        DeepSpeed divides by accumulation and ranks, so the whole step is sum(losses * weights) / batch_size: a
        tombstone (weight 0) takes its own share away and changes nothing for the others.

        Args:
            losses: (batch,) with graph.
            weights: (batch,).
            verdict: 1, or NaN to let this step's gradients be none, whatever those of the losses are.

        Raises:
            StepLost: With `oom_skip`, on all ranks: `discard` the step.
            RequeueRequest: Out of memory without `oom_skip`: the other ranks wait in a reduction by now.
        """
        self._micro_steps += 1
        if self._micro_steps == 1:
            self.partitions.lend_memory()
        self._engine.set_gradient_accumulation_boundary(self._is_boundary)
        loss = (losses * weights).sum() / self.settings.micro_batch_size
        if verdict is not None:  # by way of a parameter: a loss that is NaN can have gradients of 0
            loss = loss + (verdict - 1.0) * min(self._trained, key=Tensor.numel).flatten()[0].float()
        if self.settings.oom_skip:
            self._backward_held_back(loss)
            return
        try:
            self._engine.backward(loss)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise RequeueRequest(
                f"out of memory in a backward: {error}\nThe other ranks wait for this rank's gradients, so the step "
                "cannot be thrown away; started again, the run goes on from its last checkpoint. trainer.oom_skip: "
                "true skips such steps; a smaller data.micro_batch_size or trainer.gradient_checkpointing: blocks "
                "needs less memory."
            ) from None

    def _backward_held_back(self, loss: Tensor) -> None:
        """Backward on this rank alone; the reduction follows once all ranks got through.

        In fp32 gradients add up in the parameters and one reduction ends the step, as DeepSpeed has it. In half
        precision they would add up in half precision, so each micro-step is reduced into the fp32 sum by itself.
        """
        self._hold_back()
        error = None
        try:
            self._engine.backward(loss)
        except Exception as raised:
            error = for_keeps(raised)
        agree(error)
        if self.settings.precision != "fp32":
            self._reduce()

    def discard(self) -> None:
        """Make the coming `step` a skipped one, whatever was accumulated; on all ranks, with no graph alive.

        NaN gradients go through the reduction of all ranks in place of what is missing. DeepSpeed's own check then
        skips the update and clears everything, so nothing of its inside has to be known here.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # after running out of memory its cache is in pieces
        self._hold_back()
        for parameter in self._trained:
            parameter.grad = torch.full_like(parameter, math.nan, memory_format=torch.contiguous_format)
        self._reduce()
        self._micro_steps = self.settings.grad_accum_steps

    def _hold_back(self) -> None:
        """Keep gradients on this rank until `_reduce`."""
        if not self._engine.inside_no_sync_ctxt:
            self._held_back.enter_context(self._engine.coalesce_grad_reduction())

    def _reduce(self) -> None:
        """Reduce what was held back; collective."""
        self._held_back.close()

    @property
    def _is_boundary(self) -> bool:
        return self._micro_steps == self.settings.grad_accum_steps

    def step(self, learning_rate: float) -> StepResult | None:
        """Update the weights and the EMA once all micro-steps are accumulated.

        Returns:
            What the update did; None where micro-steps are missing.
        """
        if not self._is_boundary:
            return None
        self._micro_steps = 0
        self._reduce()
        self._scaler = self.scaler_state()
        scale = self._scaler.get("cur_scale")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.set_gradient_accumulation_boundary(True)  # a reduction that was held back has reset it
        self.partitions.flatten_gradients()
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        if not self._engine.was_step_applied():
            return StepResult(False, float("inf"), learning_rate, None, scale)
        self.applied_steps += 1
        decay = None
        if self.ema is not None:
            decay = self.ema.update(self.partitions.masters(), applied_steps=self.applied_steps)
        return StepResult(True, norm, learning_rate, decay, scale)

    @torch.no_grad()
    def rewind(self, *, keeps_scale: bool) -> None:
        """Take back what a step that was not applied has left beside the weights.

        Args:
            keeps_scale: Whether the fp16 loss scale stays as lowered: right only where gradients alone overflowed.
        """
        for buffer, before in zip(self.module.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        if not keeps_scale:
            self._set_scaler(self._scaler)

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
        self._set_scaler(scaler)

    def _set_scaler(self, state: Mapping[str, float]) -> None:
        scaler = self._engine.optimizer.loss_scaler
        for name, value in state.items():
            setattr(scaler, name, type(getattr(scaler, name))(value))
