"""A thread that asks a joined cluster's head for signs of life, and ends this process where there are none.

Without its head every call to Ray stands still, and after a minute (`RAY_gcs_rpc_server_reconnect_timeout_s`) Ray ends
the process from its C++ part, with code 1 and words of its own; where the head is frozen, it waits for ever.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from sdtrain.errors import PeerLostError, SdtrainError

_PROBE_EVERY_SECONDS = 2.0
_PROBE_SECONDS = 5.0
_PATIENCE_SECONDS = 30.0
"""A head that is started again within this time, with its state in Redis, goes on."""
_GRACE_SECONDS = 10.0
"""How long the main thread may take to say what the matter is; it may stand still in a call to Ray."""


class HeadWatch:
    """Asks every few seconds, from joining a cluster to leaving it.

    Args:
        address: The cluster's, for the message.
    """

    def __init__(self, address: str):
        self._address = address
        self._stopped = threading.Event()
        self._answered = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="ray-head-watch", daemon=True)
        self._thread.start()

    @property
    def silent_seconds(self) -> float:
        """How long ago the last answer came; within a few seconds where all is well."""
        return time.monotonic() - self._answered

    @property
    def is_silent(self) -> bool:
        """Whether an answer is overdue: calls to Ray may stand still."""
        return self.silent_seconds > _PROBE_EVERY_SECONDS + _PROBE_SECONDS

    @property
    def is_lost(self) -> bool:
        """Whether the head has been silent for too long."""
        return self.silent_seconds > _PATIENCE_SECONDS

    def answers(self) -> bool:
        """Wait out a silence; whether the head has come back from it."""
        while self.is_silent and not self.is_lost:
            time.sleep(_PROBE_EVERY_SECONDS / 4)
        return not self.is_lost

    def check(self) -> None:
        """Do nothing while the head answers, or may do so again.

        Raises:
            PeerLostError: It has been silent for too long.
        """
        if self.is_lost:
            raise self._error()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()
        self._thread.join(_PROBE_SECONDS)

    def end_process(self, error: SdtrainError | None = None) -> None:
        """End without Ray's own clean-up, which would wait for the head.

        Args:
            error: Why; None tells that the head is lost.
        """
        error = error or self._error()
        sys.stdout.flush()
        print(f"sdtrain-data: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    def _watch(self) -> None:
        from ray.exceptions import RpcError

        while not self._stopped.wait(_PROBE_EVERY_SECONDS):
            try:
                _ask()
                self._answered = time.monotonic()
            except (RpcError, AttributeError):  # the latter while Ray is being left
                if self.silent_seconds > _PATIENCE_SECONDS + _GRACE_SECONDS and not self._stopped.is_set():
                    self.end_process()

    def _error(self) -> PeerLostError:
        return PeerLostError(
            f"runner.address: {self._address!r}: the head of the Ray cluster has not answered for "
            f"{_PATIENCE_SECONDS:.0f} s: it died, stands still or cannot be reached. What is committed stands: bring "
            "the cluster back and run again"
        )


def _ask() -> None:
    """Wait for an answer of the head.

    Raises:
        ray.exceptions.RpcError: There is none.
    """
    from ray._private import worker

    connected: Any = worker.global_worker  # a type checker sees none of what joining sets
    connected.gcs_client.check_alive([], timeout=_PROBE_SECONDS)
