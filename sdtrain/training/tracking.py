"""Weights & Biases, a copy of what the run folder holds: absent, offline or down, training never notices."""

from __future__ import annotations

import logging
import netrc
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from sdtrain.config.run import TrainingConfig
from sdtrain.run_dir import RunDir, write_atomically
from sdtrain.training.metrics import read_metrics
from sdtrain.training.wandb_files import last_tracked_step

log = logging.getLogger(__name__)

Mode = Literal["auto", "online", "offline", "disabled"]
AlertLevel = Literal["INFO", "WARN", "ERROR"]

STEP = "train/step"
INIT_TIMEOUT_SECONDS = 30.0
FINISH_TIMEOUT_SECONDS = 60.0
FINISH_GRACE_SECONDS = 5.0
ALERT_PAUSE_SECONDS = 300.0
QUEUE_LENGTH = 1000


def has_key(environment: Mapping[str, str], home: Path) -> bool:
    """Whether a W&B key is at hand: `WANDB_API_KEY`, or the server's entry in `.netrc`."""
    if environment.get("WANDB_API_KEY"):
        return True
    server = urlparse(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(environment.get("NETRC", str(home / ".netrc"))).authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def resolve_mode(mode: Mode, environment: Mapping[str, str], home: Path) -> Literal["online", "offline", "disabled"]:
    """What `auto` means here: `WANDB_MODE` if it names a mode, else online with a key and offline without."""
    if mode != "auto":
        return mode
    wished = environment.get("WANDB_MODE")
    if wished in ("online", "offline", "disabled"):
        return wished
    return "online" if has_key(environment, home) else "offline"


def run_id(run_dir: RunDir) -> str:
    """The W&B id of a run: made here once and kept in the run folder, so that every attempt continues the same one."""
    if run_dir.wandb_id.exists():
        return run_dir.wandb_id.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(4)
    write_atomically(run_dir.wandb_id, made + "\n")
    return made


class Tracker:
    """A W&B run; rank 0 only. Whatever W&B does wrong costs one warning and ends the tracking, never the training.

    Everything after the start runs in a thread of its own: a service that hangs fills a bounded queue, whose overflow
    is dropped, and no call here waits longer than `finish`, which waits `FINISH_TIMEOUT_SECONDS` and a little.

    Attributes:
        mode: What it came to: `online`, `offline` or `disabled`.
        id: The run's W&B id; empty where nothing is tracked.
    """

    def __init__(
        self,
        run_dir: RunDir,
        *,
        project: str,
        name: str,
        mode: Mode = "auto",
        config: Mapping[str, Any] | None = None,
        past: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Start or continue the run's W&B run.

        Args:
            run_dir: The run's folder; W&B's own files go into `wandb/` inside.
            project: W&B project.
            name: Name to show.
            mode: See `resolve_mode`.
            config: The resolved configuration, as plain values.
            past: Rows of the lineage that this attempt continues (`metrics.read_metrics`). W&B has them all, but for
                what a killed attempt had not handed over yet: that is made up for first. What W&B has already is never
                logged again, also where dead attempts got further: a replayed step would stand there twice.
        """
        self.mode = resolve_mode(mode, os.environ, Path.home())
        self.id = ""
        self._logged_until = self._newest = -1
        self._run: Any = None
        self._queue: queue.Queue[Callable[[], Any] | None] = queue.Queue(maxsize=QUEUE_LENGTH)
        self._thread: threading.Thread | None = None
        self._overflowed = False
        if self.mode == "disabled":
            return
        self.id = run_id(run_dir)
        started = self._guard(lambda: _start(run_dir, self.id, project, name, self.mode, config or {}))
        if started is None:
            return
        self._run, self.mode = started
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        self._submit(lambda: self._catch_up(run_dir, past))

    @classmethod
    def start(cls, run_dir: RunDir, config: TrainingConfig) -> Tracker:
        """The tracker that a training page asks for, after whatever earlier attempts logged.

        The attempt's own `MetricsLog` is open already, so that its lineage is the one that goes on.
        """
        return cls(
            run_dir,
            project=config.tracking.project,
            name=config.name or config.resolved_run_dir.name,
            mode=config.tracking.mode,
            config=config.model_dump(mode="json"),
            past=read_metrics(run_dir.metrics),
        )

    @property
    def url(self) -> str | None:
        """Where the run can be watched; None offline."""
        return self._run.url if self._run is not None and self.mode == "online" else None

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Copy figures of `step` finished steps; a step that W&B has already is left out."""
        self._submit(lambda: self._send(step, row))

    def log_images(self, step: int, key: str, images: Sequence[Any], captions: Sequence[str] | None = None) -> None:
        """Copy images (PIL, uint8 (H, W, 3) arrays, or paths) under `key`; a replayed step is left out."""

        def send() -> None:
            import wandb

            texts = captions if captions is not None else [None] * len(images)
            shown = [
                wandb.Image(str(image) if isinstance(image, Path) else image, caption=text)
                for image, text in zip(images, texts, strict=True)
            ]
            self._send(step, {key: shown})

        self._submit(send)

    def alert(self, title: str, text: str, level: AlertLevel = "WARN") -> None:
        """Ask W&B to tell the people who watch the run, at most once in `ALERT_PAUSE_SECONDS` for each title."""
        pause = ALERT_PAUSE_SECONDS
        self._submit(lambda: self._run.alert(title=title, text=text, level=level, wait_duration=pause))

    def finish(self, exit_code: int = 0) -> None:
        """Close the run and wait, within limits, for what is still on its way."""
        if self._thread is None:
            return
        limit = FINISH_TIMEOUT_SECONDS + FINISH_GRACE_SECONDS
        end = time.monotonic() + limit
        with suppress(queue.Full):
            for act in (lambda: self._run.finish(exit_code=exit_code), None):
                self._queue.put(act, timeout=max(end - time.monotonic(), 0.0))
        self._thread.join(max(end - time.monotonic(), 0.0))
        if self._thread.is_alive():
            log.warning(
                "W&B did not finish within %.0f s and is left behind; `wandb sync` sends what its folder holds, and "
                "metrics.jsonl holds everything",
                limit,
            )
        self._thread = None

    # Inside the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (act := self._queue.get()) is not None:
            if self.mode != "disabled":
                self._guard(act)

    def _catch_up(self, run_dir: RunDir, past: Sequence[Mapping[str, Any]]) -> None:
        """Find out how far W&B's history got, and send what of this lineage is missing."""
        if self.mode == "online":
            self._logged_until = int(self._run.starting_step) - 1
        else:
            self._logged_until = last_tracked_step(run_dir.path)
        for row in past:
            self._send(row["step"], {key: value for key, value in row.items() if "/" in key})

    def _send(self, step: int, row: Mapping[str, Any]) -> None:
        """Log a row unless its step is W&B's already, also after a rollback; several rows of one step are one there."""
        if step > self._logged_until and step >= self._newest:
            self._newest = step
            self._run.log({STEP: step, **row}, step=step)

    def _submit(self, act: Callable[[], Any]) -> None:
        """Hand an act to the thread without waiting for it."""
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(act)
        except queue.Full:
            if not self._overflowed:
                log.warning("W&B does not keep up: figures are left out there, metrics.jsonl holds everything")
            self._overflowed = True

    def _guard(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:
            log.warning(
                "W&B failed (%s: %s); training goes on without it, metrics.jsonl holds everything",
                type(error).__name__,
                error,
            )
            self.mode = "disabled"
            return None


def _start(
    run_dir: RunDir, identity: str, project: str, name: str, mode: str, config: Mapping[str, Any]
) -> tuple[Any, Literal["online", "offline"]]:
    """A started W&B run and its mode: offline where the server is out of reach, to be sent later by `wandb sync`."""
    import wandb

    run_dir.path.mkdir(parents=True, exist_ok=True)

    def init(chosen: Literal["online", "offline"]) -> Any:
        return wandb.init(
            project=project,
            name=name,
            id=identity,
            resume="allow",
            mode=chosen,
            dir=str(run_dir.path),
            config=dict(config),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                init_timeout=INIT_TIMEOUT_SECONDS,
                finish_timeout=FINISH_TIMEOUT_SECONDS,
            ),
        )

    chosen: Literal["online", "offline"] = "online" if mode == "online" else "offline"
    try:
        run = init(chosen)
    except Exception as error:
        if chosen == "offline":
            raise
        log.warning(
            "W&B is out of reach (%s: %s): tracking offline, `wandb sync` sends it later", type(error).__name__, error
        )
        wandb.teardown()  # its service still holds the id of the run that did not start
        chosen, run = "offline", init("offline")
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    return run, chosen
