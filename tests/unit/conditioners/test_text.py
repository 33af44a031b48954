from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch

from sdtrain.conditioners import text
from sdtrain.conditioners.text import (
    ClipTextConditioner,
    build_tokenizer,
    load_clip_text,
    small_clip_text,
    tokenize,
    tokenizer_fingerprint,
)
from sdtrain.errors import ConfigError


def small(*, trainable: bool = False, max_length: int = 77, seed: int = 3) -> ClipTextConditioner:
    return small_clip_text(hidden_size=32, layers=2, heads=4, max_length=max_length, seed=seed, trainable=trainable)


def ids(*captions: str, max_length: int = 77) -> torch.Tensor:
    return torch.from_numpy(tokenize(build_tokenizer(max_length), captions).astype(np.int64))


def test_known_tokens() -> None:
    """As openai/clip-vit-large-patch14's tokenizer writes them."""
    rows = tokenize(build_tokenizer(), ["a photo of a cat", ""])
    assert rows.shape == (2, 77)
    assert rows.dtype == np.uint16
    assert rows[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert set(rows[0, 7:].tolist()) == {49407}
    assert rows[1].tolist() == [49406] + [49407] * 76


def test_long_captions_end_with_the_end_token() -> None:
    (row,) = tokenize(build_tokenizer(8), ["cat " * 50])
    assert row.tolist() == [49406] + [2368] * 6 + [49407]


def test_case_and_white_space_do_not_matter() -> None:
    rows = tokenize(build_tokenizer(), ["A Photo\tof  a CAT\n", "a photo of a cat"])
    assert (rows[0] == rows[1]).all()


def test_no_captions_no_rows() -> None:
    assert tokenize(build_tokenizer(), []).shape == (0, 77)


def test_fingerprint_tells_tokenizers_apart() -> None:
    fingerprint = tokenizer_fingerprint(build_tokenizer())
    assert fingerprint == {
        "pad_token_id": 49407,
        "max_length": 77,
        "vocabulary_sha256": "64b85eec9307ffac25105ea5c4a2f6538baa1728289342f6b9f2aba7a0bdc03a",
    }
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert tokenizer_fingerprint(build_tokenizer(16)) == fingerprint | {"max_length": 16}


def test_missing_vocabulary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ModuleSpec("open_clip", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    for found in (None, spec):
        monkeypatch.setattr(text.importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(ConfigError) as error:
            build_tokenizer()
        assert str(error.value) == (
            "tokenizer: the CLIP vocabulary comes with open-clip-torch, which is not installed; "
            "pip install 'sdtrain[data]'"
        )


def test_tokens_are_the_normed_last_hidden_state() -> None:
    conditioner = small()
    conditioning = conditioner(ids("a photo of a cat", "seven"))
    assert set(conditioning.parts()) == {"tokens"}
    assert conditioning.tokens.shape == (2, 77, 32)
    assert conditioner.width == 32
    normed = conditioning.tokens.detach()  # the fresh final norm has weight 1 and bias 0
    torch.testing.assert_close(normed.mean(-1), torch.zeros(2, 77), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.std(-1, correction=0), torch.ones(2, 77), atol=1e-2, rtol=0)


def test_padding_is_attended_to_and_attention_is_causal() -> None:
    """No mask hides the padding, as in Stable Diffusion 1; but no token sees those behind it."""
    conditioner, tokens = small(), ids("a photo of a cat")
    changed = tokens.clone()
    changed[0, 10] = 320  # a padding position
    before, after = conditioner(tokens).tokens, conditioner(changed).tokens
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 11:], after[:, 11:], atol=1e-5)


def test_null_is_the_empty_prompt() -> None:
    conditioner = small()
    null = conditioner.null(3).tokens
    assert null.shape == (3, 77, 32)
    torch.testing.assert_close(null, conditioner(ids("", "", "")).tokens)
    assert conditioner(ids("a cat")).where(torch.tensor([True]), conditioner.null(1)).tokens.equal(null[:1])


def test_null_of_a_short_conditioner() -> None:
    conditioner = small(max_length=16)
    torch.testing.assert_close(conditioner.null(1).tokens, conditioner(ids("", max_length=16)).tokens)


def test_frozen_encoders_stay_frozen() -> None:
    conditioner = small()
    assert not any(parameter.requires_grad for parameter in conditioner.parameters())
    assert not conditioner.train().text_model.training
    assert not conditioner(ids("a cat")).tokens.requires_grad


def test_trainable_encoders_learn() -> None:
    conditioner = small(trainable=True)
    assert conditioner.train().text_model.training
    assert not conditioner.eval().text_model.training
    conditioner(ids("a cat")).tokens.square().sum().backward()
    assert [name for name, parameter in conditioner.named_parameters() if parameter.grad is None] == []


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, same, other = (small(seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    name = "text_model.embeddings.token_embedding.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])


def test_saved_encoders_come_back(tmp_path: Path) -> None:
    conditioner = small(trainable=True)
    conditioner.save_pretrained(tmp_path / "text_encoder")
    loaded = load_clip_text(str(tmp_path), trainable=False)
    assert torch.equal(loaded(ids("a cat")).tokens, conditioner(ids("a cat")).tokens)
    assert sorted(path.name for path in (tmp_path / "text_encoder").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert config["architectures"] == ["CLIPTextModel"]
    assert config["hidden_size"] == 32


def test_positions_limit_the_length(tmp_path: Path) -> None:
    small(max_length=16).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_clip_text(str(tmp_path), trainable=False, max_length=77)
    assert str(error.value) == ("text conditioner: max_length is 77, the encoder has 16 positions; lower max_length")


def test_heads_divide_the_width() -> None:
    with pytest.raises(ConfigError) as error:
        small_clip_text(hidden_size=32, layers=1, heads=5, max_length=8, seed=0, trainable=False)
    assert str(error.value) == "text conditioner: hidden_size=32 is no multiple of heads=5; change either"


def test_missing_and_foreign_weights(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    other = small_clip_text(hidden_size=32, layers=1, heads=4, max_length=77, seed=0, trainable=False)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        load_clip_text(str(tmp_path), trainable=False)
    assert str(error.value).startswith(f"{tmp_path}: weights do not fit their config: missing encoder.layers.1.")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors: missing"):
        load_clip_text(str(tmp_path), trainable=False)
