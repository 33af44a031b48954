"""Run a job's tasks in a container: what an image may look like, and how its runtime is asked for it.

Slurm's commands, and the two ends of a batch script that call them, stay on the host: an image has neither the site's
Slurm nor its munge. Inside runs what srun starts. The folders of submission, page and run, and the temporary one, are
mounted where they are on the host, so that a path means the same on both sides; others are the site's affair.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdtrain.errors import ConfigError

Runtime = Literal["pyxis", "apptainer"]
NO_CONTAINER = "none"
MOUNT = re.compile(r"/[^:,\s]*(:/[^:,\s]*(:[\w+-]+)?)?")
"""`/data`, `/data:/mnt` or `/data:/mnt:ro`, as both runtimes read it."""

_FILES = {"pyxis": (".sqsh", ".squashfs"), "apptainer": (".sif", ".sqsh", ".img")}
_ENROOT_NAME = re.compile(
    r"(docker://)?([\w.+-]+@)?([\w.-]+(:\d+)?#)?[a-z0-9][\w./-]*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?"
)
_REGISTRY_WITH_SLASH = re.compile(r"(docker://)?(?P<registry>[\w-]+(\.[\w-]+)+(:\d+)?|localhost(:\d+)?)/(?P<rest>.+)")
_APPTAINER_NAME = re.compile(r"(docker|oras|library|docker-daemon)://[^\s#]+")
# What the job sets for its ranks, whatever an image sets: images for training often bring some of these.
_JOB_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "PYTHONUNBUFFERED", "SDTRAIN_REFUSALS")


@dataclass(frozen=True, slots=True)
class Container:
    """Where a job's tasks run.

    Attributes:
        image: A file or folder on a disk that all nodes see, absolute; or a name in a registry, in the runtime's
            spelling.
        runtime: Who starts it: the plugin pyxis of srun, or the program apptainer.
        mounts: `SRC[:DST[:FLAGS]]` beside those that every job has.
    """

    image: str
    runtime: Runtime
    mounts: tuple[str, ...] = ()

    @property
    def path(self) -> Path | None:
        """The image's file or folder; None where a registry has it."""
        return Path(self.image) if self.image.startswith("/") else None


def container_of(image: str | None, runtime: Runtime, mounts: Sequence[str]) -> Container | None:
    """The container that was asked for, spelled right; None for `none` or nothing.

    Args:
        image: As the user wrote it.
        runtime: Who starts it.
        mounts: `SRC[:DST[:FLAGS]]`.

    Raises:
        ConfigError: The runtime would not understand the image's name.
    """
    if image is None or image == NO_CONTAINER:
        return None
    if _is_path(image):
        kinds = _FILES[runtime]
        other = next((name for name, known in _FILES.items() if Path(image).suffix in known and name != runtime), None)
        if other is not None and Path(image).suffix not in kinds:
            raise ConfigError(
                f"container = {image}: is an image of {other}, and container_runtime is {runtime}; give one that "
                f"ends in {' or '.join(kinds)}, or set container_runtime: {other}"
            )
        return Container(str(Path(image).expanduser().absolute()), runtime, tuple(mounts))
    if runtime == "pyxis":
        _check_enroot_name(image)
    elif not _APPTAINER_NAME.fullmatch(image):
        raise ConfigError(
            f"container = {image}: apptainer takes a .sif file, a folder, or docker://REGISTRY/IMAGE:TAG; write a "
            "path with a slash in front (./IMAGE.sif)"
        )
    return Container(image, runtime, tuple(mounts))


def spelled_out(image: str | None) -> str | None:
    """An option's value that means the same in every folder."""
    return str(Path(image).expanduser().absolute()) if image is not None and _is_path(image) else image


def _is_path(image: str) -> bool:
    ends_as_file = Path(image).suffix in {suffix for suffixes in _FILES.values() for suffix in suffixes}
    return "://" not in image and (image.startswith(("/", ".", "~")) or ends_as_file)


def _check_enroot_name(image: str) -> None:
    found = _REGISTRY_WITH_SLASH.fullmatch(image)
    if found is not None:
        raise ConfigError(
            f"container = {image}: enroot would look for it on Docker Hub; a registry is parted by #: write "
            f"{found['registry']}#{found['rest']}"
        )
    if not _ENROOT_NAME.fullmatch(image):
        raise ConfigError(
            f"container = {image}: pyxis takes a path to a .sqsh file or [USER@][REGISTRY#]IMAGE[:TAG], such as "
            "nvcr.io#org/image:tag"
        )


def refuse_missing(container: Container | None) -> None:
    """Refuse an image that is not there.

    Raises:
        ConfigError: Its path leads nowhere, or not to what the runtime can start.
    """
    path = None if container is None else container.path
    if container is None or path is None:
        return
    if not path.exists():
        raise ConfigError(f"container = {path}: no such image; give one that all nodes see, or --container none")
    if path.is_dir() and container.runtime == "pyxis":
        raise ConfigError(f"container = {path}: is a folder; pyxis takes a .sqsh file (enroot import makes one)")


def shell_lines(
    container: Container | None, folder: Path, places: Iterable[Path], variables: Iterable[str]
) -> list[str]:
    """What the batch script needs to know: `container`, options of srun, and `inside`, what tasks are started with.

    Args:
        container: Where tasks run; None for the nodes themselves.
        folder: Where they start.
        places: What they must see beside it, at the same path.
        variables: Names of variables that the site sets, which win over the image's.
    """
    if container is None:
        return ["container=() inside=()"]
    clean = "export PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1"  # no packages from the user's home, nor from the folder
    mounts = ",".join([*_outermost([folder, *places]), *container.mounts])
    if container.runtime == "apptainer":
        command = ["apptainer", "exec", "--nv", f"--bind={mounts}", f"--pwd={folder}", container.image]
        return ["container=()", _array("inside", command), clean]
    ours = dict.fromkeys([*_JOB_VARIABLES, *variables])
    options = [f"--container-image={container.image}", f"--container-mounts={mounts}", f"--container-workdir={folder}"]
    return [_array("container", [*options, f"--container-env={','.join(ours)}"]), "inside=()", clean]


def _array(name: str, words: Iterable[str]) -> str:
    """An array of bash, one word a line; commas are quoted, since shellcheck takes them for a mistake."""
    quoted = (shlex.quote(word) if "," not in word or "'" in word else f"'{word}'" for word in words)
    return "\n".join([f"{name}=(", *(f"  {word}" for word in quoted), ")"])


def _outermost(places: Iterable[Path]) -> list[str]:
    """Folders that lie in none of the others, in order."""
    known = list(dict.fromkeys(places))
    return [str(one) for one in known if not any(one != other and one.is_relative_to(other) for other in known)]
