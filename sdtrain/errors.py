"""Errors a user can cause or meet, each with the exit code that the process ends with."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a finished process says to its launcher; documented in README."""

    DONE = 0
    BUG = 1
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    DIVERGED = 5
    HANG = 6
    NO_PROGRESS = 7
    STORAGE = 8
    PREFLIGHT = 9
    REQUEUE = 85


class SdtrainError(Exception):
    """Base of every error that is shown as one clear message instead of a traceback."""

    exit_code: ExitCode = ExitCode.BUG


class ConfigError(SdtrainError):
    """A configuration, flag or combination that cannot run."""

    exit_code = ExitCode.CONFIG


class DataError(SdtrainError):
    """Metadata, shards or manifests that are missing, damaged or do not fit."""

    exit_code = ExitCode.DATA


class CheckpointError(SdtrainError):
    """Checkpoints are present but none is valid, or one does not fit this run."""

    exit_code = ExitCode.CHECKPOINT


class DivergedError(SdtrainError):
    """Training produced non-finite losses or gradients beyond the skip budget."""

    exit_code = ExitCode.DIVERGED


class PeerLostError(SdtrainError):
    """A rank hangs or is gone."""

    exit_code = ExitCode.HANG


class NoProgressError(SdtrainError):
    """Restarted again and again without a new checkpoint."""

    exit_code = ExitCode.NO_PROGRESS


class StorageError(SdtrainError):
    """The disk is full or refuses writes."""

    exit_code = ExitCode.STORAGE


class PreflightError(SdtrainError):
    """A check before the start failed: ranks, packages, devices or paths."""

    exit_code = ExitCode.PREFLIGHT


class RequeueRequest(SdtrainError):
    """The job saved its state and asks to be started again."""

    exit_code = ExitCode.REQUEUE
