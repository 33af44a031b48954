"""One attempt of a training run: from a config page to a word in `exit.json`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from sdtrain import build, distributed
from sdtrain.checkpoints.protocol import sweep
from sdtrain.checkpoints.remote import RemoteStore
from sdtrain.checkpoints.retention import Retention
from sdtrain.checkpoints.saver import Saved
from sdtrain.checkpoints.uploader import Uploader
from sdtrain.config.load import dump_yaml
from sdtrain.config.run import TrainingConfig
from sdtrain.data.loader import train_loader
from sdtrain.data.manifest import Manifest
from sdtrain.data.tombstones import TombstoneList
from sdtrain.errors import ExitCode
from sdtrain.nn.compilation import eagerly
from sdtrain.records import Batch, Task
from sdtrain.run_dir import RunDir, write_atomically
from sdtrain.training import environment
from sdtrain.training.admission import Admitted, admit, occupy
from sdtrain.training.compile_watch import CompileWatch
from sdtrain.training.engine import DTYPES, Engine, EngineSettings
from sdtrain.training.forensics import write_record
from sdtrain.training.fork import ancestry
from sdtrain.training.goodput import Goodput
from sdtrain.training.health import HealthSettings
from sdtrain.training.heartbeat import LEAVING, Patience
from sdtrain.training.keeper import CheckpointKeeper
from sdtrain.training.lease import Lease
from sdtrain.training.lr_schedule import learning_rate_at
from sdtrain.training.metrics import MetricsLog, Throughput
from sdtrain.training.outcome import Refused, leave_broken, leave_refused, leave_together, refuse_to_spin
from sdtrain.training.preemption import Interrupted, Preemption, Request
from sdtrain.training.progress import Progress
from sdtrain.training.reporter import Reporter
from sdtrain.training.rollback import Rollback
from sdtrain.training.stragglers import Stragglers, WorkClock
from sdtrain.training.tracking import Tracker
from sdtrain.training.trainer import Periodic, Report, Trainer, TrainerSettings
from sdtrain.training.utilisation import utilisation_here
from sdtrain.training.watchdog import Watched

log = logging.getLogger(__name__)

Resume = str | Path
"""`auto`, `never`, a checkpoint's folder, or the URL of one or of a store of them."""
Pause = Callable[[], None]
"""Called between the parts of a long event, equally often on all ranks; raises where the run must be left."""
T = TypeVar("T")
GROUP_GRACE_SECONDS = 60.0
"""How much longer collectives wait than a watchdog, which knows more about who is missing."""


@dataclass(frozen=True)
class Hooks:
    """What rooms above training do at its step boundaries, handed down as callables; all are collective.

    Attributes:
        validate: (config, task, manifest, pause) -> figures by name.
        sample: (config, task, step, pause) -> image files to show, on rank 0.
        finish: (config, run folder) -> None, after the last checkpoint: the weights export.
    """

    validate: Callable[[TrainingConfig, Task, Manifest, Pause], Mapping[str, float]] | None = None
    sample: Callable[[TrainingConfig, Task, int, Pause], list[Path]] | None = None
    finish: Callable[[TrainingConfig, RunDir], None] | None = None


def train(config: TrainingConfig, *, resume: Resume = "auto", hooks: Hooks | None = None) -> NoReturn:
    """Run one attempt, leave its outcome in the run folder and end the process; called on every rank.

    The process's exit code is DONE for a complete or deliberately stopped run, REQUEUE where the scheduler wants the
    node back, and an error's own code otherwise.
    """
    run = Attempt(config, RunDir(config.resolved_run_dir), hooks or Hooks())
    try:
        run.meet()
        code, reason = run.go(resume)
        run.beat(LEAVING)
        leave_together(run.folder, run.attempt, code, reason, run.step)
    except Refused as refused:
        run.beat(LEAVING)
        code, reason = leave_refused(run.attempt, refused), str(refused)
    except BaseException as error:
        run.beat(LEAVING)
        reason = f"{type(error).__name__}: {error}"
        code = leave_broken(run.folder, run.attempt, error, run.step, run.watched.call_roll)
    run.close(code, reason)
    # No farewells of interpreter and torch: after an error other ranks may wait in a collective that this one never
    # joins, and the threads of process groups that DeepSpeed keeps can abort a finished process while it is torn down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))


@contextmanager
def averaged(engines: Mapping[str, Engine]) -> Iterator[None]:
    """Run every network on its EMA weights for a while, and eagerly: other shapes would compile anew; collective."""
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        for engine in engines.values():
            stack.enter_context(engine.ema_weights())
        yield


class Attempt:
    """One start of a run, from an empty or a half-trained folder to its end."""

    def __init__(self, config: TrainingConfig, folder: RunDir, hooks: Hooks) -> None:
        trainer, place = config.trainer, distributed.ranks()
        self.config = config
        self.folder = folder
        self.hooks = hooks
        self.attempt = folder.new_attempt()
        self.watched = Watched(
            folder,
            rank=place.rank,
            world_size=place.world_size,
            patience=Patience(step_seconds=trainer.step_timeout_seconds, long_seconds=trainer.timeout_seconds),
            attempt=self.attempt,
        )
        self.work = WorkClock(on_device=torch.cuda.is_available())
        self.preemption = Preemption(folder.path, watch_files=place.is_main, max_hours=trainer.max_hours)
        self.lease = Lease(folder.lease, self.attempt, on_wait=lambda: self.beat("build"))
        self.keeper: CheckpointKeeper | None = None
        self.unreadable = TombstoneList(folder.tombstones)
        self.reporter: Reporter | None = None
        self.trainer: Trainer | None = None
        self.batches: Generator[tuple[int, int, Batch]] | None = None
        self.compiles: CompileWatch | None = None

    @property
    def step(self) -> int:
        """Finished steps."""
        return 0 if self.trainer is None else self.trainer.step

    def beat(self, phase: str, step: int | None = None, micro_step: int = 0) -> None:
        """Tell the watchdog where this rank is; at the same places on all ranks."""
        self.watched.heartbeat.beat(phase, step, micro_step)
        self.work.beat(phase)
        if self.compiles is not None:
            self.compiles.beat(phase, step)

    def meet(self) -> None:
        """Join the other ranks, which may never come, and agree on this attempt's name."""
        self.preemption.install()
        self.beat("rendezvous")
        distributed.initialize(timeout_seconds=self.config.trainer.timeout_seconds + GROUP_GRACE_SECONDS)
        self.attempt = distributed.broadcast_object(self.attempt)
        self.watched.heartbeat.name_attempt(self.attempt)
        self.watched.introduce(distributed.gather_objects(self.watched.peer))

    def go(self, resume: Resume) -> tuple[ExitCode, str]:
        """Build everything, resume, train, finish."""
        config = self.config
        occupy(self.folder, self.lease)
        admitted = admit(config, self.folder, resume, attempt=self.attempt, beat=self.beat)
        task, checkpoint, source, start = admitted.task, admitted.checkpoint, admitted.source, admitted.step
        self._begin(admitted, resume)
        engines = self._engines(task, admitted.grad_accum_steps)
        distributed.set_timeout(config.trainer.timeout_seconds + GROUP_GRACE_SECONDS)
        keeper = self.keeper = self._keeper(admitted.identity, engines)
        self.beat("restore")
        if checkpoint is not None:
            keeper.restore(checkpoint)
        elif source is not None and config.init_from is not None:
            keeper.fork(source, config.init_from.load)
        keeper.reserve()
        self.compiles = CompileWatch() if build.compile_networks(task, config) else None
        self._write_down()
        self.reporter = self._reporter(task, start, admitted.max_steps)
        self.trainer = self._trainer(admitted, engines, keeper)
        keeper.before_save = self._before_save
        is_told = distributed.max_over_ranks(self.preemption.poll()) >= Request.REQUEUE  # while it was built
        complete = not is_told and self.trainer.fit()
        self.beat("save")
        keeper.finish(self.trainer.step)
        self.beat("export")
        if complete and self.hooks.finish is not None:
            self.hooks.finish(config, self.folder)
        return self._verdict(complete)

    def close(self, code: ExitCode, reason: str) -> None:
        """Give signals and terminal back, end the data workers, and tell who watches why the run stops."""
        self.preemption.uninstall()
        if self.batches is not None:
            self.batches.close()
        if self.reporter is not None:
            self.reporter.stop(code, reason)
        self.watched.close()
        if self.keeper is not None:  # a run that is to be started again uploads the rest then
            self.keeper.close(wait_for_uploads=code == ExitCode.DONE)
        self.lease.release()

    def _verdict(self, complete: bool) -> tuple[ExitCode, str]:
        if complete:
            return ExitCode.DONE, "complete"
        requests = distributed.gather_objects((int(self.preemption.request), self.preemption.reason))
        request, reason = max(requests)
        if distributed.ranks().is_main:
            self.preemption.acknowledge()
        if request == Request.REQUEUE:
            return ExitCode.REQUEUE, f"{reason}: saved at step {self.step}, start again to go on"
        return ExitCode.DONE, f"{reason}: saved and stopped at step {self.step}"

    def _engines(self, task: Task, accumulation: int) -> dict[str, Engine]:
        """One engine per trainable; frozen networks are placed and cast."""
        config, device = self.config, distributed.device()
        dtype = DTYPES[config.trainer.precision]
        for name, module in task.frozen.items():
            module.to(device=device, dtype=torch.float32 if name == "autoencoder" else dtype)
        engines = {}
        for name, trainable in task.trainables.items():
            settings = EngineSettings(
                micro_batch_size=config.data.micro_batch_size,
                grad_accum_steps=accumulation,
                precision=trainable.precision or config.trainer.precision,
                reduce_precision=config.trainer.reduce_precision,
                zero_stage=config.trainer.zero_stage,
                betas=config.optimizer.betas,
                eps=config.optimizer.eps,
                weight_decay=config.optimizer.weight_decay,
                weight_decay_on=config.optimizer.weight_decay_on,
                gradient_clip_norm=config.optimizer.gradient_clip_norm,
                reduce_bucket_size=config.trainer.reduce_bucket_size,
                overlap_comm=config.trainer.overlap_comm,
                oom_skip=config.trainer.oom_skip,
                ema_decay=None if config.ema is None else config.ema.decay,
            )
            engines[name] = Engine(trainable.module, settings)
        return engines

    def _keeper(self, identity: Mapping[str, Any], engines: Mapping[str, Engine]) -> CheckpointKeeper:
        config = self.config
        retention = Retention(**config.checkpoint.model_dump(include={each.name for each in fields(Retention)}))
        return CheckpointKeeper(
            run=self.folder,
            attempt=self.attempt,
            engines=engines,
            batch_size=config.data.batch_size,
            config_text=dump_yaml(config),
            identity=identity,
            environment=environment.describe(),
            retention=retention,
            asynchronous=config.checkpoint.asynchronous,
            uploader=self._uploader(retention),
            on_saved=self._report_save,
        )

    def _uploader(self, retention: Retention) -> Uploader | None:
        """Who copies checkpoints to a store; an unusable URL is refused on all ranks, the work is rank 0's."""
        wanted = self.config.checkpoint
        if wanted.upload_to is None:
            return None
        store = RemoteStore(wanted.upload_to)
        if not distributed.ranks().is_main:
            return None
        return Uploader(self.folder, store, retention=retention if wanted.upload_keep == "same" else None)

    def _report_save(self, saved: Saved) -> None:
        """A figure of how long training stood still for a save, beside those of the step that it was committed at."""
        if self.reporter is not None:
            self.reporter.log(self.step, {"train/checkpoint_stall_seconds": saved.stall_seconds})
            if saved.path is None:
                self.reporter.alert(
                    "checkpoint not saved", f"step {saved.step}: training goes on, see the log", "ERROR"
                )

    def _begin(self, admitted: Admitted, resume: Resume) -> None:
        """Touch the folder for the first time, unless this would end like the last starts; who says where knows it."""
        checkpoint, source, start = admitted.checkpoint, admitted.source, admitted.step
        page = hashlib.sha256(dump_yaml(self.config).encode()).hexdigest()
        if resume == "auto":
            refuse_to_spin(self.folder, step=start, config_sha256=page)
        if distributed.ranks().is_main:
            self.folder.path.mkdir(parents=True, exist_ok=True)
        occupy(self.folder, self.lease, begins=True)
        if not distributed.ranks().is_main:
            return
        self.folder.clear_exit(but=self.attempt)
        sweep(self.folder.checkpoints)
        resumed = None if checkpoint is None else checkpoint.path.name
        world_size = distributed.ranks().world_size
        facts = {"resumed_from": resumed, "step": start, "world_size": world_size, "config_sha256": page}
        begins = f"resumes from {resumed}" if resumed else "starts afresh"
        if source is not None and self.config.init_from is not None:
            facts["forked_from"] = ancestry(source, self.config.init_from.load)
            begins = f"starts with {self.config.init_from.load} of {source.path}"
        masked = ""
        if admitted.takedown.sha256 is not None:
            facts["takedown_sha256"] = admitted.takedown.sha256
            masked = f"; {len(admitted.takedown.keys)} samples are taken down and will not be read"
        self.folder.log("start", attempt=self.attempt, **facts)
        print(f"attempt {self.attempt}: {begins}, step {start}{masked}", flush=True)

    def _write_down(self) -> None:
        """Leave the resolved page and the surroundings in the run folder."""
        if distributed.ranks().is_main:
            write_atomically(self.folder.config, dump_yaml(self.config))
            write_atomically(self.folder.environment, json.dumps(environment.describe(), indent=2) + "\n")

    def _reporter(self, task: Task, start: int, max_steps: int) -> Reporter:
        config, main = self.config, distributed.ranks().is_main
        precision, world_size = config.trainer.precision, distributed.ranks().world_size
        return Reporter(
            metrics=MetricsLog(self.folder, attempt=self.attempt, resumed_step=start) if main else None,
            tracker=Tracker.start(self.folder, config) if main else None,
            progress=Progress(total_steps=max_steps, start_step=start) if main else None,
            throughput=Throughput(),
            max_steps=max_steps,
            batch_size=config.data.batch_size,
            stragglers=Stragglers(self.work, [peer.host for peer in self.watched.peers]),
            goodput=Goodput.of(self.folder) if main else None,
            utilisation=utilisation_here(lambda: build.forward_flops(task), precision=precision, world_size=world_size),
            compiles=self.compiles,
        )

    def _trainer(self, admitted: Admitted, engines: Mapping[str, Engine], keeper: CheckpointKeeper) -> Trainer:
        config, reporter = self.config, self.reporter
        task, manifest, max_steps = admitted.task, admitted.manifest, admitted.max_steps
        assert reporter is not None

        def batches_after(step: int) -> Iterator[tuple[int, int, Batch]]:
            return self._batches_after(step, task, manifest, max_steps, keeper.positions.skipped_steps)

        def on_restart(step: int) -> None:
            if reporter.metrics is not None:
                reporter.metrics = MetricsLog(self.folder, attempt=self.attempt, resumed_step=step)
                reporter.goodput = Goodput.of(self.folder)

        return Trainer(
            task=task,
            engines=engines,
            settings=TrainerSettings(
                max_steps=max_steps,
                batch_size=config.data.batch_size,
                grad_accum_steps=admitted.grad_accum_steps,
                seed=config.seed,
                log_every_steps=config.trainer.log_every_steps,
                max_bad_fraction=config.data.max_bad_fraction,
                health=HealthSettings(**config.health.model_dump()),
            ),
            batches=batches_after(admitted.step),
            learning_rate=lambda name, applied: self._learning_rate(
                task, name, applied - keeper.inherited_steps.get(name, 0), max_steps
            ),
            start_step=admitted.step,
            health=keeper.health,
            rollbacks=keeper.positions.rollbacks,
            events=self._events(task, manifest, engines, keeper),
            on_report=self._report,
            on_unreadable=self.unreadable.note,
            beat=self.beat,
            leaves_after=lambda step: self._leaves_after(step, keeper),
            on_sick=partial(write_record, self.folder.sick, self.attempt),
            roll_back=Rollback(keeper=keeper, batches_after=batches_after, on_restart=on_restart),
        )

    def _batches_after(
        self, step: int, task: Task, manifest: Manifest, max_steps: int, skipped_steps: int
    ) -> Iterator[tuple[int, int, Batch]]:
        """The batches behind `step` finished steps; those that were read ahead before are given up."""
        config, place = self.config, distributed.ranks()
        if self.batches is not None:
            self.batches.close()
        loader = train_loader(
            build.build_dataset(config, manifest, task.draws),
            start_step=step,
            max_steps=max_steps,
            batch_size=config.data.batch_size,
            micro_batch_size=config.data.micro_batch_size,
            world_size=place.world_size,
            rank=place.rank,
            num_workers=config.data.num_workers,
            prefetch=config.data.prefetch,
            skipped_steps=skipped_steps,
        )
        self.batches = loader if self.compiles is None else self.compiles.over(loader)
        return self.batches

    def _report(self, report: Report) -> None:
        assert self.reporter is not None
        self.watched.check()
        self.reporter.report(report)
        self.unreadable.write()

    def _before_save(self) -> Mapping[str, Any]:
        """Let `metrics.jsonl` reach as far as the coming checkpoint; returns what the loop knows of its steps."""
        assert self.trainer is not None
        self.trainer.report_rest()
        self.beat("save", self.step)
        return self.trainer.health_state()

    def _learning_rate(self, task: Task, name: str, applied: int, max_steps: int) -> float:
        optimizer = self.config.optimizer
        peak = task.trainables[name].learning_rate or optimizer.learning_rate
        return learning_rate_at(
            applied,
            lr_schedule=optimizer.lr_schedule,
            peak=peak,
            warmup_steps=optimizer.warmup_steps,
            warmup_start=optimizer.warmup_start_lr,
            final_fraction=optimizer.final_lr_fraction,
            total_steps=max_steps,
        )

    def _leaves_after(self, step: int, keeper: CheckpointKeeper) -> bool:
        """Answer requests together, and commit a save that all ranks have written; one all-reduce tells both.

        The strongest request of any rank is what all ranks do. A rank that still writes counts for less than any
        request, since what a request leads to waits for the writing anyway.
        """
        self.beat("agree", step)
        writing = Request.NONE + 0.5 if keeper.is_writing else Request.NONE
        request = distributed.max_over_ranks(max(writing, self.preemption.poll()))
        self.beat("save")
        if request == Request.NONE:
            keeper.join()
        if request == Request.SAVE:
            keeper.save(step)
            keeper.join()
            if distributed.ranks().is_main:
                self.preemption.acknowledge(Request.SAVE)
        return request >= Request.STOP

    def _unless_told(self, phase: str, step: int, event: Callable[[Pause], T]) -> T | None:
        """Run an event that pauses between its parts, and leave it on all ranks once one of them is told to leave.

        Nothing of an event that was left is kept, and it is not made up for: the next one comes at its own step.
        """

        def pause() -> None:
            self.beat(phase)
            if distributed.max_over_ranks(self.preemption.poll()) >= Request.STOP:
                raise Interrupted

        self.beat(phase, step)
        try:
            return event(pause)
        except Interrupted:
            if distributed.ranks().is_main:
                self.folder.log("interrupted", attempt=self.attempt, phase=phase, step=step)
                print(f"{phase} of step {step} was left: the run was told to stop", flush=True)
            return None

    def _events(
        self, task: Task, manifest: Manifest, engines: Mapping[str, Engine], keeper: CheckpointKeeper
    ) -> list[Periodic]:
        """Validation and grids on the EMA weights, then the save."""
        config, hooks, reporter = self.config, self.hooks, self.reporter
        assert reporter is not None
        events: list[Periodic] = []
        if config.validation is not None and hooks.validate is not None:
            validate = hooks.validate

            def run_validation(step: int) -> None:
                with averaged(engines):
                    figures = self._unless_told(
                        "validation", step, lambda pause: validate(config, task, manifest, pause)
                    )
                if figures is not None:
                    reporter.log(step, figures)
                    keeper.note(step, figures)

            events.append(Periodic(config.validation.every_steps, run_validation))
        if config.samples is not None and hooks.sample is not None:
            sample = hooks.sample

            def run_samples(step: int) -> None:
                with averaged(engines):
                    files = self._unless_told("samples", step, lambda pause: sample(config, task, step, pause))
                reporter.show(step, "samples", files or [])

            events.append(Periodic(config.samples.every_steps, run_samples))

        def save(step: int) -> None:
            self.beat("save", step)
            keeper.save(step)

        return [*events, Periodic(config.checkpoint.every_steps, save)]
