"""What is submitted: golden batch scripts that a shell and shellcheck accept, and the site's defaults in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.site import Site, load_site
from launcher.slurm import TEMPLATE, Job, job_name, render
from sdtrain.errors import ConfigError, ExitCode
from sdtrain.run_dir import RunDir
from tests.unit.launcher.commands import GOLDEN, SHELLCHECK, launch

REPOSITORY = Path(__file__).parents[3]
EXAMPLE = REPOSITORY / "slurm" / "site.example.yaml"


def command_of(nodes: int) -> list[str]:
    options = {
        1: [],
        8: ["--site", "slurm/site.example.yaml", "--time", "12:00:00", "--mode", "torchrun"],
        64: ["--site", "slurm/site.example.yaml", "--time", "2-00:00:00", "--partition", "big", "--max-restarts", "9"],
    }
    overrides = {1: [], 8: ["data.batch_size=2048"], 64: ["data.batch_size=2048", "data.micro_batch_size=4"]}
    command = ["slurm", "configs/sd15/train.yaml", "--nodes", str(nodes), "--gpus-per-node", "8", *options[nodes]]
    return [*command, *overrides[nodes], "--dry-run"]


@pytest.mark.parametrize("nodes", [1, 8, 64])
def test_the_script_of_a_dry_run_is_the_golden_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nodes: int
) -> None:
    """Renew them with SDTRAIN_RENEW_GOLDEN=1 after a change that is meant."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "executable", "/opt/sdtrain/bin/python")
    assert launch(monkeypatch, *command_of(nodes)) == 0
    script = capsys.readouterr().out.replace(str(REPOSITORY), "/home/me/sdtrain")
    golden = GOLDEN / f"slurm-{nodes}.sbatch"
    if os.environ.get("SDTRAIN_RENEW_GOLDEN"):
        golden.write_text(script)
    assert script == golden.read_text()


@pytest.mark.parametrize("script", [*sorted(GOLDEN.glob("*.sbatch")), TEMPLATE], ids=lambda path: path.stem)
def test_a_shell_and_shellcheck_accept_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    subprocess.run([SHELLCHECK, script], check=True)


def test_shellcheck_accepts_the_scripts_of_the_local_cluster() -> None:
    subprocess.run([SHELLCHECK, *(REPOSITORY / "slurm" / "local_cluster").glob("*.sh")], check=True)


def test_everything_that_a_shell_could_misread_is_quoted(tmp_path: Path) -> None:
    site = Site(environment={"A": "x $(reboot) 'y'"}, scratch=Path("/a b"), account="a b")
    job = Job(1, 1, "01:00:00", "srun", 3, "never", "n")
    run = RunDir(tmp_path / "a %j run")
    script = render(job, site, run, tmp_path, Path("my page.yaml"), ["run_dir=a b"])
    assert "export A='x $(reboot) '\"'\"'y'\"'\"''\n" in script
    assert "set -- 'my page.yaml' 'run_dir=a b'\n" in script
    assert f"#SBATCH --output='{tmp_path}/a %%j run/logs/slurm-%j.out'\n" in script
    assert "#SBATCH --account='a b'\n" in script
    assert "export TMPDIR='/a b'\nexport TRITON_CACHE_DIR='/a b/sdtrain-cache/triton'\n" in script


def test_an_installation_without_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("launcher.slurm.TEMPLATE", tmp_path / "train.sbatch")
    with pytest.raises(ConfigError, match=r"train.sbatch is not there: submit from an installation out of a checkout"):
        render(Job(1, 1, "01:00:00", "srun", 3, "auto", "n"), Site(), RunDir(tmp_path), tmp_path, Path("p.yaml"), [])


def test_names_of_jobs() -> None:
    assert [job_name(name) for name in ("sd15-train", "a/b c", "")] == ["sd15-train", "a-b-c", "sdtrain"]


# The site's file ------------------------------------------------------------------------------------------------------


def test_the_example_holds_every_key() -> None:
    site = load_site(EXAMPLE)
    assert set(Site.model_fields) == site.model_fields_set
    assert (site.gpus_per_node, site.time, site.modules) == (8, "24:00:00", ("cuda/12.8",))


def test_the_site_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SDTRAIN_SITE", raising=False)
    assert load_site(None) == Site()
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.yaml").write_text("partition: usual\n")
    assert load_site(None).partition == "usual"
    (tmp_path / "other.yaml").write_text("partition: other\n")
    monkeypatch.setenv("SDTRAIN_SITE", "other.yaml")
    assert load_site(None).partition == "other"


def test_all_mistakes_of_a_site_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "partitoin: gpu\ngpus_per_node: 0\nmodules: [a; reboot]\nsbatch: [exclusive]\nenvironment: {A-B: x, C: 1}\n"
    )
    with pytest.raises(ConfigError) as refused:
        load_site(path)
    assert str(refused.value).splitlines() == [
        f"{path}: 5 mistakes",
        "  gpus_per_node = 0 (line 2): must be > 0",
        "  environment.C = 1 (line 5): must be a text",
        '  partitoin = "gpu" (line 1): unknown key; did you mean partition?',
        '  sbatch.0 = "exclusive" (line 4): must be one option of sbatch, such as --exclusive or --mem=0',
        '  modules.0 = "a; reboot" (line 3): must be one module, such as cuda/12.8',
        "All keys, with an example: slurm/site.example.yaml",
    ]
    path.write_text("environment: {A-B: x}\n")
    with pytest.raises(ConfigError, match=r'environment.A-B = "x" .*a variable\'s name is made of letters, digits and'):
        load_site(path)


def test_a_missing_site_is_a_config_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    command = ("slurm", "configs/sd15/train.yaml", "--gpus-per-node", 8, "--site", "no.yaml", "--dry-run")
    assert launch(monkeypatch, *command) == ExitCode.CONFIG
    assert "no.yaml: no such file" in capsys.readouterr().err
