"""The command line: typed exits, one message instead of a traceback, help without heavy imports."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sdtrain import cli
from sdtrain.errors import CheckpointError, DivergedError, ExitCode, RequeueRequest, SdtrainError

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "configs/sd15/tiny/train.yaml"
SAMPLE = ROOT / "configs/sd15/tiny/sample.yaml"
DATA = ROOT / "configs/sd15/tiny/data.yaml"
COMMANDS = ["train", "sample", "export", "inspect", "evaluate", "report"]
CONFIG_COMMANDS = ["show", "check", "diff", "schema"]


def call(*arguments: str | Path) -> int:
    """Run in this process; the exit code."""
    try:
        cli.main([str(one) for one in arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def process(*arguments: str | Path, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """Run in a process of its own, as a shell would; `prelude` is executed before."""
    code = f"{prelude}\nfrom sdtrain.cli import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def provide(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Put a stand-in where a command imports its body from: these tests are about the command line alone."""
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    package, _, last = name.rpartition(".")
    monkeypatch.setattr(importlib.import_module(package), last, module, raising=False)


def provide_training(monkeypatch: pytest.MonkeyPatch, train: Callable[..., None]) -> None:
    """A stand-in for the trainer and for everything that it is handed."""
    provide(monkeypatch, "sdtrain.training.run", train=train, Hooks=SimpleNamespace)
    provide(monkeypatch, "sdtrain.evaluation.during_training", validate="validate", sample="sample")
    provide(monkeypatch, "sdtrain.export.after_training", export_weights="export")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """What `train` was called with."""
    calls: list[tuple[Any, Any, Any]] = []

    def train(config: Any, *, resume: Any, hooks: Any) -> None:
        calls.append((config, resume, hooks))

    provide_training(monkeypatch, train)
    return calls


# Help -----------------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_imports_little() -> None:
    prelude = (
        "import atexit, sys\n"
        "heavy = ('torch', 'numpy', 'pydantic', 'ruamel.yaml', 'rich', 'deepspeed')\n"
        "atexit.register(lambda: print('heavy:', [name for name in heavy if name in sys.modules]))"
    )
    done = process("--help", prelude=prelude)
    assert done.returncode == 0
    assert all(f"\n  {command} " in done.stdout for command in [*COMMANDS, "config"])
    assert "Exit codes: 0 done, 1 bug, 2 config, 3 data, 4 no valid checkpoint" in done.stdout
    assert done.stdout.endswith("heavy: []\n")


@pytest.mark.parametrize("command", [*COMMANDS, *(f"config {name}" for name in CONFIG_COMMANDS)])
def test_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*command.split(), "--help") == 0
    assert f"Example: sdtrain {command} " in capsys.readouterr().out


def test_examples_name_pages_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in [*COMMANDS, *(f"config {name}" for name in CONFIG_COMMANDS)]:
        call(*command.split(), "--help")
        for word in capsys.readouterr().out.split():
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), word


# Exit codes -----------------------------------------------------------------------------------------------------------


def test_config_error_is_one_message_and_exit_2() -> None:
    done = process("config", "check", TRAIN, "optimizer.learning_rat=1", "seed=x")
    assert done.returncode == ExitCode.CONFIG
    assert done.stdout == ""
    assert done.stderr == (
        f"sdtrain: {TRAIN}: 2 mistakes\n"
        '  seed = "x" (command line): must be a whole number\n'
        "  optimizer.learning_rat = 1 (command line): unknown key; did you mean optimizer.learning_rate?\n"
        "All keys of this kind of page: sdtrain config schema training\n"
    )


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["train"], ["train", "a.yaml", "--nonsense"], ["export", "runs/x"]]
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    done = process(*arguments)
    assert done.returncode == 2
    assert "Usage: sdtrain" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [CheckpointError, DivergedError, RequeueRequest])
def test_errors_of_a_run_keep_their_codes(
    error: type[SdtrainError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(config: Any) -> None:
        raise error("what happened")

    provide(monkeypatch, "sdtrain.evaluation.sampling", sample=sample)
    assert call("sample", SAMPLE) == int(error.exit_code)
    assert capsys.readouterr().err == "sdtrain: what happened\n"


def failing(statement: str) -> str:
    return (
        "import sys, types\n"
        "room = types.ModuleType('sdtrain.evaluation.sampling')\n"
        f"def sample(config): {statement}\n"
        "room.sample = sample\n"
        "sys.modules['sdtrain.evaluation.sampling'] = room"
    )


def test_interrupt_exits_130_without_traceback() -> None:
    done = process("sample", SAMPLE, prelude=failing("raise KeyboardInterrupt"))
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_a_bug_shows_its_traceback_and_exits_1() -> None:
    done = process("sample", SAMPLE, prelude=failing("return 1 / 0"))
    assert done.returncode == ExitCode.BUG
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdtrain", "config", "check", str(TRAIN)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout == f"{TRAIN}: a valid training page; it runs with: sdtrain train {TRAIN}\n"


# train ----------------------------------------------------------------------------------------------------------------


def test_train_hands_over_page_overrides_resume_and_hooks(trained: list[tuple[Any, Any, Any]], tmp_path: Path) -> None:
    assert call("train", TRAIN) == 0
    assert call("train", TRAIN, "seed=7", "trainer.max_steps=2", "--resume", "never") == 0
    checkpoint = tmp_path / "step-00000002"
    checkpoint.mkdir()
    assert call("train", TRAIN, "--resume", checkpoint) == 0
    assert [(config.seed, config.trainer.max_steps, resume) for config, resume, _ in trained] == [
        (42, 4, "auto"),
        (7, 2, "never"),
        (42, 4, checkpoint),
    ]
    for _, _, hooks in trained:
        assert vars(hooks) == {"validate": "validate", "sample": "sample", "finish": "export"}


def test_resume_from_nowhere_is_a_config_error(
    trained: list[tuple[Any, Any, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", TRAIN, "--resume", "atuo") == 2
    assert capsys.readouterr().err == (
        "sdtrain: --resume atuo: no such checkpoint folder; "
        "give auto, never, a folder such as RUN/checkpoints/step-N or a URL such as s3://BUCKET/RUN/step-N\n"
    )
    assert trained == []
    call("train", TRAIN, "--resume", "s3://bucket/run")
    assert trained[0][1] == "s3://bucket/run", "the store is asked when the run starts"


def test_train_refuses_other_kinds(trained: list[tuple[Any, Any, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", SAMPLE) == 2
    assert "is a page of kind sampling, not training; it runs with: sdtrain sample" in capsys.readouterr().err
    assert trained == []


def test_warnings_go_to_stderr_of_rank_0(
    trained: list[tuple[Any, Any, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call("train", TRAIN, "optimizer.warmup_steps=0")
    warning = "warning: optimizer.warmup_start_lr has no effect: optimizer.warmup_steps is 0\n"
    assert capsys.readouterr().err == warning
    monkeypatch.setenv("RANK", "1")
    call("train", TRAIN, "optimizer.warmup_steps=0")
    assert capsys.readouterr().err == ""


def test_dry_run_plans_without_training(
    trained: list[tuple[Any, Any, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest, run = tmp_path / "manifest.json", tmp_path / "run"
    manifest.write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["train", TRAIN, f"data.manifest={manifest}", f"run_dir={run}", "--dry-run"]
    assert call(*arguments) == 0
    assert capsys.readouterr().out == (
        f"folder: {run} (no checkpoint yet; resume auto)\ndata: {manifest}\n"
        "batch: 8 = 2 per rank x 2 accumulation x 2 ranks\nlength: 4 steps\n"
    )
    for name in ("step-00000002", "step-00000004", "step-00000006.tmp-x"):
        (run / "checkpoints" / name).mkdir(parents=True)
    assert call(*arguments, "trainer.max_steps=null", "trainer.max_epochs=3") == 0
    out = capsys.readouterr().out
    assert f"folder: {run} (newest checkpoint step-00000004; resume auto)\n" in out
    assert out.endswith("length: 3 epochs\n")
    assert trained == []


def test_dry_run_finds_what_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", TRAIN, f"data.manifest={tmp_path}/none.json", "--dry-run") == ExitCode.DATA
    assert capsys.readouterr().err == (
        f"sdtrain: data.manifest = {tmp_path}/none.json: no such file; `sdtrain-data run` writes it\n"
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert call("train", TRAIN, "--dry-run") == ExitCode.CONFIG
    assert "with these sizes the number of ranks may be 1, 2, 4" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    manifest = tmp_path / "manifest.json"
    manifest.touch()
    arguments = ("train", TRAIN, f"data.manifest={manifest}", "--dry-run")
    assert call(*arguments, f"run_dir={tmp_path}") == ExitCode.CONFIG
    assert f"run_dir = {tmp_path}: not a run's folder: it holds manifest.json" in capsys.readouterr().err


# Other commands hand over what they were given ------------------------------------------------------------------------


def test_sample_hands_over_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[Any] = []
    provide(monkeypatch, "sdtrain.evaluation.sampling", sample=pages.append)
    assert call("sample", SAMPLE, "seed=9") == 0
    assert [page.seed for page in pages] == [9]


def test_export_and_inspect_hand_over_their_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    provide(monkeypatch, "sdtrain.export.diffusers", export=lambda *given, **named: calls.append((given, named)))
    provide(monkeypatch, "sdtrain.evaluation.inspect_run", inspect=lambda *given, **named: calls.append((given, named)))
    assert call("export", "runs/x", "--output", "out") == 0
    assert call("export", "x", "--output", "o", "--no-ema", "--dtype", "bf16", "--latent-size", "64") == 0
    assert call("inspect", "runs/x", "--no-verify", "--json") == 0
    defaults = {"ema": True, "dtype": "fp32", "latent_size": None, "scale_manifest": None}
    assert calls == [
        ((Path("runs/x"), Path("out")), defaults),
        ((Path("x"), Path("o")), {**defaults, "ema": False, "dtype": "bf16", "latent_size": (64, 64)}),
        ((Path("runs/x"),), {"verify": False, "as_json": True}),
    ]


def test_report_and_evaluate_hand_over_their_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def write_report(output: Path, **sources: Any) -> Path:
        calls.append(sources)
        return output

    def score_samples(samples: Path, world: Path, output: Path) -> None:
        output.write_text(f"{samples} {world}\n")

    provide(monkeypatch, "sdtrain.evaluation.report", write_report=write_report)
    provide(monkeypatch, "sdtrain.evaluation.prompt_accuracy", score_samples=score_samples)
    assert call("report", "runs/a", "runs/b", "--output", "r.html", "--grid", "g.png", "--funnel", "f.json") == 0
    assert calls == [
        {
            "title": "Training report",
            "funnel_json": Path("f.json"),
            "download_summary": None,
            "runs": [Path("runs/a"), Path("runs/b")],
            "grids": [Path("g.png")],
            "prompt_accuracy": (),
            "timings_json": None,
        }
    ]
    assert call("evaluate", "s", "--world", "w.json", "--output", tmp_path / "o.json") == 0
    assert capsys.readouterr().out == "report: r.html\ns w.json\n"


# config ---------------------------------------------------------------------------------------------------------------


def test_show_prints_a_page_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config", "show", TRAIN, "seed=5") == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert call("config", "show", shown, "--json") == 0
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["seed"] == 5 and resolved["name"] == "sd15-tiny-train"


def test_check_tells_command_warnings_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config", "check", TRAIN, "optimizer.warmup_steps=0", "--world-size", "2") == 0
    told = capsys.readouterr()
    command = f"sdtrain train {TRAIN} optimizer.warmup_steps=0"
    assert told.out == (
        f"batch: 8 = 2 per rank x 2 accumulation x 2 ranks\n{TRAIN}: a valid training page; it runs with: {command}\n"
    )
    warning = "optimizer.warmup_start_lr has no effect: optimizer.warmup_steps is 0"
    assert told.err == f"warning: {warning}\n"
    assert call("config", "check", TRAIN, "optimizer.warmup_steps=0", "--world-size", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "page": str(TRAIN),
        "kind": "training",
        "command": command,
        "warnings": [warning],
        "world_size": 2,
        "grad_accum_steps": 2,
    }


def test_check_refuses_impossible_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config", "check", TRAIN, "--world-size", "3") == 2
    assert "with these sizes the number of ranks may be 1, 2, 4" in capsys.readouterr().err
    assert call("config", "check", DATA, "--world-size", "3") == 2
    assert capsys.readouterr().err == f"sdtrain: --world-size is for training pages; {DATA} is of kind ingestion\n"


def test_diff_lists_keys_and_says_what_resume_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config", "diff", TRAIN, TRAIN, "seed=5", "trainer.max_steps=8") == 0
    assert capsys.readouterr().out == "seed: 42 -> 5  (not on resume)\ntrainer.max_steps: 4 -> 8\n"
    assert call("config", "diff", TRAIN, TRAIN, "seed=5", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"path": "seed", "before": 42, "after": 5, "on_resume": False}]
    assert call("config", "diff", TRAIN, TRAIN) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert call("config", "diff", TRAIN, SAMPLE) == 2
    assert capsys.readouterr().err == (
        f"sdtrain: {TRAIN} is of kind training and {SAMPLE} of kind sampling; only equal kinds compare\n"
    )


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("training", "ingestion", "sampling"):
        assert call("config", "schema", kind) == 0
        assert json.loads(capsys.readouterr().out)["title"] == f"sdtrain {kind} page"
    assert call("config", "schema", "nonsense") == 2
    assert capsys.readouterr().err == (
        "sdtrain: there is no kind of page called nonsense; there are training, ingestion, sampling\n"
    )


def test_broken_pipe_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "sdtrain", "config", "schema"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert "Traceback" not in done.stderr
