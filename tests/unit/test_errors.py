"""Exit codes are a contract with launchers and batch scripts."""

from __future__ import annotations

import pytest

from sdtrain import errors
from sdtrain.errors import ExitCode, SdtrainError

CODES = {
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.CheckpointError: 4,
    errors.DivergedError: 5,
    errors.PeerLostError: 6,
    errors.NoProgressError: 7,
    errors.StorageError: 8,
    errors.PreflightError: 9,
    errors.RequeueRequest: 85,
}


@pytest.mark.parametrize(("error", "code"), CODES.items(), ids=lambda item: getattr(item, "__name__", str(item)))
def test_every_error_has_its_code(error: type[SdtrainError], code: int) -> None:
    assert int(error.exit_code) == code
    assert str(error("what happened")) == "what happened"
    assert issubclass(error, SdtrainError)


def test_no_error_is_forgotten() -> None:
    kinds = {one for one in SdtrainError.__subclasses__() if one.__module__ == errors.__name__}
    assert kinds == set(CODES)


def test_codes_are_distinct_and_complete() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "BUG": 1,
        "CONFIG": 2,
        "DATA": 3,
        "CHECKPOINT": 4,
        "DIVERGED": 5,
        "HANG": 6,
        "NO_PROGRESS": 7,
        "STORAGE": 8,
        "PREFLIGHT": 9,
        "REQUEUE": 85,
    }


def test_an_error_without_a_code_is_a_bug() -> None:
    assert SdtrainError.exit_code is ExitCode.BUG
