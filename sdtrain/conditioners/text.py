"""Text conditioning: CLIP tokens and the CLIP text encoder, as Stable Diffusion uses them."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt16
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtrain.errors import ConfigError
from sdtrain.nn.folders import find_folder, load_strictly, read_folder, write_folder
from sdtrain.records import Conditioning
from sdtrain.run_dir import sync_folder

START_ID, END_ID = 49406, 49407
VOCABULARY_SIZE = 49408
WEIGHTS_FILE = "model.safetensors"
_PREFIX = "text_model."  # in files; transformers 5 leaves it out in memory, and reads files with and without it


class ClipTextConditioner(nn.Module):
    """Token ids to the last hidden state of a CLIP text encoder, after its final norm.

    As in Stable Diffusion 1, padding is attended to: no attention mask, for prompts and for the empty prompt alike.

    Args:
        text_model: The encoder.
        trainable: Whether it learns; a frozen one keeps its evaluation mode and needs no gradients.
        max_length: Tokens of every prompt, padding included; at most the encoder's positions.

    Raises:
        ConfigError: The encoder has fewer positions than `max_length`.

    Source: Rombach et al. 2022, arXiv:2112.10752; CLIP: Radford et al. 2021, arXiv:2103.00020.
    """

    def __init__(self, *, text_model: CLIPTextModel, trainable: bool, max_length: int) -> None:
        super().__init__()
        positions = text_model.config.max_position_embeddings
        if max_length > positions:
            raise ConfigError(
                f"text conditioner: max_length is {max_length}, the encoder has {positions} positions; lower max_length"
            )
        self.text_model = text_model
        self.trainable = trainable
        self.max_length = max_length
        self.text_model.requires_grad_(trainable)
        self.train(self.training)

    @property
    def width(self) -> int:
        """Width of the tokens: the denoiser's `context_dim`."""
        return self.text_model.config.hidden_size

    def train(self, mode: bool = True) -> ClipTextConditioner:
        """Switch to training mode, but a frozen encoder to evaluation mode."""
        super().train(mode and self.trainable)
        return self

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Conditioning:
        """Conditioning with `tokens` of shape (batch, length, width).

        Args:
            tokens: Ids of `tokenize`, as integers that torch can index with.
        """
        return Conditioning(tokens=self._encode(tokens))

    def null(self, batch: int) -> Conditioning:
        """The empty prompt for every item, encoded once: what a dropped condition and guidance refer to."""
        ids = torch.full((1, self.max_length), END_ID, dtype=torch.int64, device=self.text_model.device)
        ids[0, 0] = START_ID
        return Conditioning(tokens=self._encode(ids).expand(batch, -1, -1))  # (B, L, D)

    def save_pretrained(self, folder: Path) -> None:
        """Save the encoder in transformers' layout, under the names of CLIP's published files."""
        config = self.text_model.config.to_diff_dict() | {"architectures": ["CLIPTextModel"]}
        tensors = {f"{_PREFIX}{name}": tensor for name, tensor in self.text_model.state_dict().items()}
        write_folder(folder, config, tensors, weights_file=WEIGHTS_FILE)

    def _encode(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        return self.text_model(input_ids=tokens.long()).last_hidden_state


def load_clip_text(source: str, *, trainable: bool, max_length: int = 77) -> ClipTextConditioner:
    """A text conditioner with trained weights, in float32, on the CPU.

    Args:
        source: A folder in transformers' layout, a pipeline's folder with one in `text_encoder/`, or a hub name such as
            `openai/clip-vit-large-patch14`.
        trainable: Whether it learns.
        max_length: Tokens of every prompt.

    Raises:
        ConfigError: Nothing readable is there; only safetensors are read.
    """
    folder = find_folder(source, part="text_encoder", weights_file=WEIGHTS_FILE)
    _, tensors = read_folder(folder, weights_file=WEIGHTS_FILE)
    text_model = CLIPTextModel(CLIPTextConfig.from_pretrained(folder))
    load_strictly(text_model, _text_tensors(tensors), where=folder)
    return ClipTextConditioner(text_model=text_model, trainable=trainable, max_length=max_length)


def small_clip_text(
    *, hidden_size: int, layers: int, heads: int, max_length: int, seed: int, trainable: bool
) -> ClipTextConditioner:
    """A text conditioner with random weights that depend on nothing but the arguments.

    Args:
        hidden_size: Width of the tokens; a multiple of `heads`.
        layers: Transformer layers.
        heads: Attention heads.
        max_length: Tokens of every prompt, and positions of the encoder.
        seed: Of the weights.
        trainable: Whether it learns.

    Raises:
        ConfigError: The heads do not divide the width.
    """
    if hidden_size % heads:
        raise ConfigError(f"text conditioner: hidden_size={hidden_size} is no multiple of heads={heads}; change either")
    config = CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        projection_dim=hidden_size,
        bos_token_id=START_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_model = CLIPTextModel(config)
    return ClipTextConditioner(text_model=text_model, trainable=trainable, max_length=max_length)


def build_tokenizer(max_length: int = 77) -> CLIPTokenizer:
    """CLIP's tokenizer as Stable Diffusion uses it, without a network: padded with 49407, cut at `max_length`.

    Built from the vocabulary inside open_clip; open_clip's own tokenizer pads with 0 and cleans text differently.

    Raises:
        ConfigError: open_clip is not installed.
    """
    merges: Any = _read_merges(_vocabulary_file())
    symbols = _byte_symbols()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == VOCABULARY_SIZE
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> UInt16[np.ndarray, "batch length"]:
    """Token ids of the captions: start, text, end, then end again up to the tokenizer's length."""
    length = tokenizer.model_max_length
    if not captions:
        return np.zeros((0, length), dtype=np.uint16)
    rows = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length)["input_ids"]
    return np.asarray(rows, dtype=np.uint16)


def tokenizer_fingerprint(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """What must agree between the tokens of a data set and a recipe: padding, length, digest of the vocabulary."""
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    digest = hashlib.sha256(json.dumps(by_id, ensure_ascii=True).encode()).hexdigest()
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "max_length": tokenizer.model_max_length,
        "vocabulary_sha256": digest,
    }


def _text_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder's tensors of a file, which may hold all of CLIP, under their names in memory."""
    prefixed = {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    named = {name.removeprefix(_PREFIX): tensor.float() for name, tensor in (prefixed or tensors).items()}
    named.pop("embeddings.position_ids", None)  # 0, 1, 2, ...; saved by old versions
    return named


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save the tokenizer, its maximum length included, as a pipeline's `tokenizer/` folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        tokenizer.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            path.replace(folder / path.name)
    sync_folder(folder)


def _vocabulary_file() -> Path:
    """Where open_clip keeps its vocabulary; found without importing it, which would cost seconds and torchvision."""
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        if path.is_file():
            return path
    raise ConfigError(
        "tokenizer: the CLIP vocabulary comes with open-clip-torch, which is not installed; pip install 'sdtrain[data]'"
    )


@lru_cache(maxsize=1)
def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges of CLIP's vocabulary in order of rank; the file holds more, which CLIP does not use."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    num_merges = VOCABULARY_SIZE - 2 * 256 - 2
    pairs = (line.split() for line in lines[1 : 1 + num_merges])
    return [(left, right) for left, right in pairs]


def _byte_symbols() -> list[str]:
    """A printable character for each byte, in the order of CLIP's vocabulary (GPT-2's, printable bytes first)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]
