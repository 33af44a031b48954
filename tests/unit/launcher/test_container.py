"""Images and mounts as pyxis and apptainer read them, in golden batch scripts; what is refused before submission."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.container import Container, container_of, refuse_missing, shell_lines, spelled_out
from launcher.site import load_site
from sdtrain.errors import ConfigError, ExitCode
from tests.unit.launcher.commands import GOLDEN, launch

REPOSITORY = Path(__file__).parents[3]
DATA = ["slurm-data", "configs/sd15/data.yaml", "--nodes", "2"]
SHORT = ["slurm", "configs/sd15/train.yaml", "--nodes", "2", "--gpus-per-node", "8"]


GOLDEN_SITES = {
    "pyxis": """
environment: {NCCL_DEBUG: WARN}
scratch: /scratch
container: nvcr.io#my-org/sdtrain:train
container_mounts: [/datasets:/datasets:ro]
""",
    "apptainer": """
scratch: /scratch/me  # else /tmp, which may hold the checkout itself
container: /images/sdtrain.sqsh  # the command's --container wins
container_runtime: apptainer
container_mounts: [/datasets, /weights:/mnt/weights]
""",
    "data-pyxis": """
scratch: /scratch/me  # else /tmp, which may hold the checkout itself
container: nvcr.io#my-org/sdtrain:train  # of training
data_container: /images/data.sqsh
""",
    "data-apptainer": """
scratch: /scratch/me  # else /tmp, which may hold the checkout itself
data_container: docker://nvcr.io/my-org/sdtrain:data
container_runtime: apptainer
""",
}
GOLDEN_OPTIONS = {
    "pyxis": ["run_dir=/runs/sd15"],
    "apptainer": ["--container", "/images/my sdtrain.sif", "--mode", "torchrun"],
    "data-pyxis": ["output=/data/laion"],
    "data-apptainer": ["output=/data/laion"],
}


@pytest.mark.parametrize("runtime", sorted(GOLDEN_SITES))
def test_the_script_of_a_dry_run_is_the_golden_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, runtime: str
) -> None:
    """Renew them with SDTRAIN_RENEW_GOLDEN=1 after a change that is meant; wherever the checkout lies."""
    (tmp_path / "site.yaml").write_text(GOLDEN_SITES[runtime])
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "executable", "/opt/sdtrain/bin/python")
    command = [
        *(DATA if runtime.startswith("data-") else SHORT),
        "--site",
        tmp_path / "site.yaml",
        *GOLDEN_OPTIONS[runtime],
        "--dry-run",
    ]
    assert launch(monkeypatch, *command) == 0
    script = capsys.readouterr().out.replace(str(REPOSITORY), "/home/me/sdtrain")
    golden = GOLDEN / f"slurm-{runtime}.sbatch"
    if os.environ.get("SDTRAIN_RENEW_GOLDEN"):
        golden.write_text(script)
    assert script == golden.read_text()


def arrays(lines: list[str]) -> list[list[str]]:
    """What bash makes of the lines: the words of `container`, then those of `inside`."""
    show = """printf '%s\\n' "${container[@]}" --- "${inside[@]}" """
    said = subprocess.run(["bash", "-uc", "\n".join([*lines, show])], capture_output=True, text=True, check=True).stdout
    words = said.splitlines()
    place = words.index("---")
    return [[word for word in part if word] for part in (words[:place], words[place + 1 :])]


def test_folders_of_the_job_are_seen_at_their_own_places_and_each_once() -> None:
    container = Container("/i m/s.sif", "apptainer", ("/data:/mnt:ro",))
    places = (Path("/home/me/a/runs/r"), Path("/tmp"))
    lines = shell_lines(container, Path("/home/me/a"), places, [])
    command = ["apptainer", "exec", "--nv", "--bind=/home/me/a,/tmp,/data:/mnt:ro", "--pwd=/home/me/a", "/i m/s.sif"]
    assert arrays(lines) == [[], command]


def test_a_page_outside_of_the_folder_is_seen_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.yaml"
    page.write_text((REPOSITORY / "configs" / "sd15" / "train.yaml").read_text())
    (tmp_path / "site.yaml").write_text("scratch: /scratch\ngpus_per_node: 8\ncontainer: ubuntu\n")
    monkeypatch.chdir(REPOSITORY)
    command = ["slurm", page, "run_dir=/runs/r", "--site", tmp_path / "site.yaml", "--dry-run"]
    assert launch(monkeypatch, *command) == 0
    assert f"  '--container-mounts={REPOSITORY},{tmp_path},/runs/r,/scratch'\n" in capsys.readouterr().out


def test_variables_of_job_and_site_win_over_those_of_an_image() -> None:
    container = Container("nvcr.io#o/i:t", "pyxis", ())
    options, inside = arrays(shell_lines(container, Path("/a"), [Path("/b")], ["NCCL_DEBUG", "MASTER_ADDR"]))
    assert inside == []
    assert options == [
        "--container-image=nvcr.io#o/i:t",
        "--container-mounts=/a,/b",
        "--container-workdir=/a",
        "--container-env=MASTER_ADDR,MASTER_PORT,OMP_NUM_THREADS,PYTHONUNBUFFERED,SDTRAIN_REFUSALS,NCCL_DEBUG",
    ]


def test_no_container() -> None:
    assert arrays(shell_lines(None, Path("/a"), [], [])) == [[], []]
    assert container_of(None, "pyxis", ()) is None
    assert container_of("none", "apptainer", ()) is None, "where the site has one"


# Names of images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    ["ubuntu", "ubuntu:24.04", "nvcr.io#org/image:tag", "docker://me@registry.local:5000#a/b-c/d:1.0", "org/image"],
)
def test_names_that_pyxis_knows(image: str) -> None:
    assert container_of(image, "pyxis", ()) == Container(image, "pyxis")


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert container_of("a.sqsh", "pyxis", ()) == Container(f"{tmp_path}/a.sqsh", "pyxis")
    assert container_of("./rootfs", "apptainer", ()) == Container(f"{tmp_path}/rootfs", "apptainer")
    assert [spelled_out(one) for one in ("a.sif", "docker://a/b.sif", "ubuntu", "none", None)] == [
        f"{tmp_path}/a.sif",
        "docker://a/b.sif",
        "ubuntu",
        "none",
        None,
    ]
    assert container_of("docker://ghcr.io/org/image:tag", "apptainer", ()) is not None


@pytest.mark.parametrize(
    ("image", "runtime", "said"),
    [
        ("nvcr.io/org/image:tag", "pyxis", "a registry is parted by #: write nvcr.io#org/image:tag"),
        ("docker://localhost:5000/image", "pyxis", "would look for it on Docker Hub; .* write localhost:5000#image"),
        (
            "a b",
            "pyxis",
            r"pyxis takes a path to a .sqsh file or \[USER@\]\[REGISTRY#\]IMAGE\[:TAG\], such as nvcr.io#",
        ),
        (
            "/images/a.sif",
            "pyxis",
            "is an image of apptainer, and container_runtime is pyxis; give one that ends in .sqsh",
        ),
        (
            "nvcr.io#org/image",
            "apptainer",
            "apptainer takes a .sif file, a folder, or docker://REGISTRY/IMAGE:TAG; write",
        ),
        ("docker://nvcr.io#org/image", "apptainer", "apptainer takes a .sif file, a folder, or docker://REGISTRY/"),
        ("/images/a.squashfs", "apptainer", "is an image of pyxis, and container_runtime is apptainer; give one that"),
    ],
)
def test_what_the_runtime_would_not_understand_is_refused(image: str, runtime: str, said: str) -> None:
    assert runtime in ("pyxis", "apptainer")
    with pytest.raises(ConfigError, match=f"^container = {image}: .*{said}"):
        container_of(image, "pyxis" if runtime == "pyxis" else "apptainer", ())


def test_an_image_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a.sif: no such image; give one that all nodes see, or --container none"):
        refuse_missing(container_of(str(tmp_path / "a.sif"), "apptainer", ()))
    with pytest.raises(ConfigError, match=r"is a folder; pyxis takes a .sqsh file \(enroot import makes one\)"):
        refuse_missing(container_of(str(tmp_path), "pyxis", ()))
    refuse_missing(container_of(str(tmp_path), "apptainer", ()))
    refuse_missing(container_of("ubuntu", "pyxis", ()))
    refuse_missing(None)


def test_mistakes_of_a_site_are_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("container_runtime: docker\n")
    with pytest.raises(ConfigError, match=r'container_runtime = "docker" \(line 1\): must be one of pyxis, apptainer'):
        load_site(path)
    path.write_text("container_mounts: [/data, data, '/a:b', '/a:/b:ro+x', '/a b', '/a,/b']\n")
    with pytest.raises(ConfigError) as refused:
        load_site(path)
    said = str(refused.value)
    assert [line.split(" =")[0].strip() for line in said.splitlines()[1:-1]] == [
        f"container_mounts.{index}" for index in (1, 2, 4, 5)
    ]
    assert "must be SRC[:DST[:FLAGS]] with absolute paths, such as /data or /data:/data:ro" in said


def test_a_command_with_a_wrong_image_ends_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("SDTRAIN_SITE", raising=False)
    assert launch(monkeypatch, *SHORT, "--container", "nvcr.io/org/image:tag", "--dry-run") == ExitCode.CONFIG
    assert "write nvcr.io#org/image:tag" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder_in_a_site_file_too() -> None:
    home = str(Path.home())
    assert spelled_out("~/train.sqsh") == f"{home}/train.sqsh"
    container = container_of("~/train.sqsh", "pyxis", ())
    assert container is not None and container.image == f"{home}/train.sqsh"
