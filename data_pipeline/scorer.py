"""Scores of pictures by a CLIP model of open_clip: similarity to the caption, and an aesthetic score on its embeddings.

Weights are state dicts on this machine, read without unpickling anything but tensors.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from sdtrain.config.curation import ScoresConfig
from sdtrain.config.problems import nearest
from sdtrain.errors import ConfigError, DataError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_LAYER = re.compile(r"layers\.(\d+)\.weight")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def known_models() -> list[str]:
    """Names of open_clip's own models, found without importing it."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.origin is not None, "open-clip-torch is a core dependency"
    return sorted(path.stem for path in (Path(spec.origin).parent / "model_configs").glob("*.json"))


def check_files(settings: ScoresConfig) -> None:
    """Refuse what no worker could load, before one is started.

    Raises:
        ConfigError: An unknown model, a file that is not there or of a kind that is not read.
    """
    known = known_models()
    if settings.model not in known:
        meant = nearest(settings.model, known)
        raise ConfigError(
            f"scores.model: open_clip knows no {settings.model!r}{f'; did you mean {meant}?' if meant else ''}; "
            "`python -c 'import open_clip; print(open_clip.list_models())'` lists all"
        )
    for key, path in (("weights", settings.weights), ("aesthetic_head", settings.aesthetic_head)):
        if path is not None and path.suffix not in SUFFIXES:
            raise ConfigError(f"scores.{key}: {path}: a state dict is read from {', '.join(SUFFIXES)}; save it as one")
        if path is not None and not path.is_file():
            raise ConfigError(f"scores.{key}: {path}: no such file; fetch it first, nothing is fetched from here")


class Scorer:
    """A model and its head in one process.

    Args:
        settings: Model, files, batch size and precision.
        on_gpu: Where it works.

    Raises:
        ConfigError: The model needs files that are not here.
        DataError: The weights do not fit the model, or the head not the embeddings.
    """

    def __init__(self, settings: ScoresConfig, *, on_gpu: bool):
        self._settings = settings
        self._device = torch.device("cuda" if on_gpu else "cpu")
        model, self._transform, self._tokenizer = _open_model(settings)
        self._model = model.to(self._device).eval().requires_grad_(False)
        head = settings.aesthetic_head
        self._head = None if head is None else load_head(head).to(self._device)
        self._check_head()

    @property
    def columns(self) -> tuple[str, ...]:
        """What is computed: `similarity`, and `aesthetic` where there is a head."""
        return ("similarity",) if self._head is None else ("similarity", "aesthetic")

    def _check_head(self) -> None:
        if self._head is None:
            return
        width = self._embed([Image.new("RGB", (8, 8))], [""])[0].shape[1]
        first = self._head[0]
        assert isinstance(first, nn.Linear)
        if first.in_features != width:
            raise DataError(
                f"scores.aesthetic_head: {self._settings.aesthetic_head}: made for embeddings of {first.in_features} "
                f"numbers, {self._settings.model} has {width}; give the head of this model"
            )

    def score(self, pictures: Sequence[bytes], captions: Sequence[str]) -> dict[str, Float[np.ndarray, " batch"]]:
        """Scores of at most `batch_size` pictures, in their order.

        Args:
            pictures: Encoded files.
            captions: What they should show.
        """
        decoded = []
        for picture in pictures:
            with Image.open(io.BytesIO(picture), formats=("JPEG", "PNG", "WEBP")) as image:
                decoded.append(image.convert("RGB"))
        seen, read = self._embed(decoded, captions)
        scores = {"similarity": (seen * read).sum(1)}
        if self._head is not None:
            scores["aesthetic"] = self._head(seen)[:, 0]
        return {name: values.cpu().numpy()[: len(pictures)] for name, values in scores.items()}

    @torch.inference_mode()
    def _embed(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Normalised embeddings of a full batch in fp32: one shape, so that nothing depends on a batch's neighbours."""
        pixels = torch.stack([self._transform(picture) for picture in pictures])  # (B, 3, H, W)
        tokens = self._tokenizer(list(captions))  # (B, L)
        padding = self._settings.batch_size - len(pixels)
        pixels = torch.cat([pixels, pixels.new_zeros(padding, *pixels.shape[1:])]).to(self._device)
        tokens = torch.cat([tokens, tokens[:1].expand(padding, -1)]).to(self._device)
        dtype = _DTYPES[self._settings.precision]
        enabled = dtype != torch.float32
        with torch.autocast(self._device.type, dtype=dtype if enabled else None, enabled=enabled):
            seen, read = self._model.encode_image(pixels), self._model.encode_text(tokens)
        return nn.functional.normalize(seen.float(), dim=1), nn.functional.normalize(read.float(), dim=1)


def _open_model(settings: ScoresConfig) -> tuple[Any, Any, Any]:
    """Model with weights, transform and tokenizer."""
    import open_clip

    model: Any
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            settings.model, pretrained=None, load_weights=False, pretrained_text=False
        )
        tokenizer = open_clip.get_tokenizer(settings.model)
    except Exception as error:  # text towers of the hub: whatever transformers raises where their files are not here
        raise ConfigError(
            f"scores.model: {settings.model} needs more than open_clip has ({_one_line(error)}); "
            "take a model whose text tower is open_clip's own"
        ) from None
    try:
        open_clip.load_checkpoint(model, str(settings.weights), weights_only=True)
    except Exception as error:  # pickle, zip, safetensors and shape errors: all mean that this file is not this model's
        raise DataError(
            f"scores.weights: {settings.weights}: no state dict of {settings.model} that can be read without running "
            f"code ({_one_line(error)}); save model.state_dict() as .safetensors"
        ) from None
    return model, transform, tokenizer


def load_head(path: Path) -> nn.Sequential:
    """An aesthetic predictor: its linear layers one after another, as LAION's two predictors are.

    The first has the names `weight` and `bias`, the second `layers.0.weight` and so on; its dropout does nothing here
    and between its layers is nothing else.

    Raises:
        DataError: Not a state dict of such layers.

    Source: github.com/LAION-AI/aesthetic-predictor; github.com/christophschuhmann/improved-aesthetic-predictor.
    """
    state = read_state_dict(path, "scores.aesthetic_head")
    numbers = sorted(int(match[1]) for name in state if (match := _LAYER.fullmatch(name)))
    names = [f"layers.{number}." for number in numbers] or [""]
    layers = [_linear(state, name, path) for name in names]
    fits = all(before.out_features == after.in_features for before, after in pairwise(layers))
    if len(state) != 2 * len(layers) or not fits or layers[-1].out_features != 1:
        raise DataError(
            f"scores.aesthetic_head: {path}: {_shapes(state)} are no chain of linear layers that ends in one number"
        )
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _linear(state: Mapping[str, Tensor], name: str, path: Path) -> nn.Linear:
    weight, bias = state.get(f"{name}weight"), state.get(f"{name}bias")
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise DataError(
            f"scores.aesthetic_head: {path}: holds {_shapes(state)}; expected weight and bias, or layers.0.weight, "
            "layers.0.bias and so on"
        )
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return layer


def _shapes(state: Mapping[str, Tensor]) -> str:
    shown = [f"{name} {list(value.shape)}" for name, value in list(state.items())[:6]]
    return ", ".join(shown) + (", ..." if len(state) > len(shown) else "")


def read_state_dict(path: Path, key: str) -> Mapping[str, Tensor]:
    """Tensors by name, from safetensors or a pickle that may hold nothing else.

    Raises:
        DataError: Damaged, or something else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("no flat mapping of names to tensors")
    except Exception as error:  # zip, pickle and safetensors have errors of their own
        raise DataError(
            f"{key}: {path}: no state dict that can be read without running code ({_one_line(error)})"
        ) from None
    return state


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
