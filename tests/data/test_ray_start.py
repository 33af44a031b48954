"""A private Ray that cannot start ends with one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sdtrain.errors import ExitCode

START = """
import sys
from data_pipeline.ray_start import start_private
from sdtrain.errors import SdtrainError
try:
    start_private(1, None)
except SdtrainError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_ray_that_cannot_start_is_one_message_and_code_6(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)  # no socket can have so long a path
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", START]
    environment = {**os.environ, "RAY_TMPDIR": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.HANG, done.stderr
    assert done.stdout.startswith("Ray did not start on this machine: ")
    assert "AF_UNIX path length cannot exceed 107 bytes" in done.stdout
    assert f"Its logs are under {folder / 'ray'}. What is committed stands: start the same command" in done.stdout
