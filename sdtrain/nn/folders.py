"""Networks on disk in diffusers' layout: a folder with `config.json` and one safetensors file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdtrain.errors import ConfigError
from sdtrain.run_dir import sync_folder, write_atomically

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def find_folder(source: str, *, part: str, weights_file: str = WEIGHTS_FILE) -> Path:
    """The local folder behind `source`; fetched from the Hugging Face hub where it is no folder.

    Args:
        source: A folder, or a hub name `owner/name`; either a single network or a whole pipeline.
        part: The network's sub-folder in a pipeline: `vae`, `unet`, `text_encoder`.
        weights_file: Name of the safetensors file.

    Raises:
        ConfigError: There is no such folder, the hub does not give it, or it holds no `config.json`.
    """
    root = Path(source)
    if not root.is_dir():
        root = _fetch(source, [name for file in (CONFIG_FILE, weights_file) for name in (file, f"{part}/{file}")])
    for folder in (root, root / part):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise ConfigError(
        f"{root}: neither {CONFIG_FILE} nor {part}/{CONFIG_FILE} is there; give a folder in diffusers' layout"
    )


def look_for(source: str, *, part: str, weights_file: str = WEIGHTS_FILE) -> str:
    """Where the network behind `source` will come from, without its tensors being read or fetched.

    Args:
        source: As for `find_folder`.
        part: The network's sub-folder in a pipeline.
        weights_file: Name of the safetensors file.

    Returns:
        A few words: its folder and size, or that the hub has it.

    Raises:
        ConfigError: No folder or hub gives it, or its file is cut short.
    """
    if Path(source).is_dir():
        path = find_folder(source, part=part, weights_file=weights_file) / weights_file
    else:
        _refuse_other_names(source)
        cached = _cached(source, part, weights_file)
        if cached is None:
            return _ask_hub(source, [weights_file, f"{part}/{weights_file}"])
        path = cached
    if not path.is_file():
        raise ConfigError(f"{path}: missing; give a folder with safetensors weights")
    try:
        with safe_open(path, framework="pt"):  # reads the header, and compares the file's size with it
            return f"{path.parent}, {path.stat().st_size / 2**20:,.1f} MiB"
    except SafetensorError as error:
        raise ConfigError(f"{path}: not a readable safetensors file ({error}); copy it again") from error


def _cached(source: str, part: str, weights_file: str) -> Path | None:
    """The weights in the hub's cache of this machine; None where they are not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in (weights_file, f"{part}/{weights_file}"):
        with suppress(HFValidationError):
            found = try_to_load_from_cache(source, name)
            if isinstance(found, str):
                return Path(found)
    return None


def _ask_hub(source: str, names: Sequence[str]) -> str:
    """That a hub repository holds one of some files.

    Raises:
        ConfigError: It does not, or the hub does not answer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        with _no_progress_bars():
            files = snapshot_download(source, allow_patterns=list(names), dry_run=True)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_given(source, error) from error
    if not files:
        raise ConfigError(f"{source}: the hub's repository holds no {' or '.join(names)}; give another source")
    return f"on the hub, {sum(one.file_size or 0 for one in files) / 2**20:,.1f} MiB to be fetched at the start"


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def _fetch(source: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    _refuse_other_names(source)
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_given(source, error) from error


def _refuse_other_names(source: str) -> None:
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ConfigError(f"{source}: no such folder; give a folder in diffusers' layout or a hub name like owner/name")


def _not_given(source: str, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(
        f"{source}: not a local folder, and the hub did not give it ({reason}); download it where there is a "
        "network and give the folder"
    )


def read_folder(folder: Path, *, weights_file: str = WEIGHTS_FILE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a network, on the CPU.

    Raises:
        ConfigError: The weights are missing, pickled or damaged.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    path = folder / weights_file
    if not path.is_file():
        pickled = sorted(file.name for file in [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")])
        found = f"; pickled weights are not read ({', '.join(pickled)}): convert them to safetensors" if pickled else ""
        raise ConfigError(f"{path}: missing{found}")
    try:
        return config, load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path}: not a readable safetensors file ({error}); copy it again") from error


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, weights_file: str = WEIGHTS_FILE
) -> None:
    """Save a network: each file under a temporary name first, weights before config, so that a config means complete.

    Args:
        folder: Made where it is missing; files of the same names are replaced.
        config: Content of `config.json`.
        tensors: Saved as they are, on whatever device and in whatever precision.
        weights_file: Name of the safetensors file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{weights_file}.{secrets.token_hex(4)}.tmp"
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, temporary, metadata={"format": "pt"})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(folder / weights_file)
    sync_folder(folder)
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Load a state dict whose names and shapes must be exactly the network's.

    Raises:
        ConfigError: Names or shapes differ; the first few are named.
    """
    mine = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"missing {name}" for name in mine if name not in theirs]
    problems += [f"unexpected {name}" for name in theirs if name not in mine]
    problems += [
        f"{name} is {theirs[name]} instead of {shape}"
        for name, shape in mine.items()
        if name in theirs and theirs[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(f"{where}: weights do not fit their config: {'; '.join(problems[:5])}{more}")
    network.load_state_dict(dict(tensors), strict=True)
