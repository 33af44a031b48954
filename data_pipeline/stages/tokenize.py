"""Stage `tokens`: the captions of each image shard as CLIP token ids, one token shard beside each image shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.stage import Needs, Unit, Work, one_to_one
from sdtrain.data.shard import ShardReader, ShardWriter


@lru_cache(maxsize=1)
def tokenizer_facts(max_length: int) -> dict[str, Any]:
    """Padding, length and vocabulary digest of the tokenizer; part of the data set's fingerprint."""
    from sdtrain.conditioners.text import build_tokenizer, tokenizer_fingerprint  # imports torch: seconds

    return tokenizer_fingerprint(build_tokenizer(max_length))


@dataclass(frozen=True)
class TokenizeStage:
    """One token shard (`tokens.npy`, uint16, one row of `max_length`) for each image shard, same keys, same order.

    Attributes:
        source: Folder of the image shards.
        folder: Where the token shards go.
        max_length: Tokens of each caption, start, end and padding included.
    """

    source: Path
    folder: Path
    max_length: int
    name: str = "tokens"
    version: str = "1"

    @property
    def needs(self) -> Needs:
        """Long-lived processes: the tokenizer takes a second to build."""
        return Needs(keeps_worker=True)

    def fingerprint(self) -> dict[str, Any]:
        """What the data set's manifest says of its tokens."""
        return {"tokenizer": tokenizer_facts(self.max_length)}

    def config_facts(self) -> Mapping[str, Any]:
        """The tokenizer."""
        return self.fingerprint()

    def units(self) -> Sequence[Unit]:
        """One per image shard."""
        return one_to_one(self.source, ".tar")

    def worker(self) -> Work:
        """Build the tokenizer once."""
        from sdtrain.conditioners.text import build_tokenizer, tokenize

        tokenizer = build_tokenizer(self.max_length)

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            with ShardReader(unit.inputs[0]) as images, ShardWriter(folder / f"{unit.name}.tar") as writer:
                captions = [images.decode(sample, "txt") for sample in range(len(images))]
                tokens = tokenize(tokenizer, captions)  # (N, L)
                for key, row in zip(images.keys, tokens, strict=True):
                    writer.write(key, {"tokens.npy": row})
            full = int((tokens[:, -2] != tokens[:, -1]).sum())  # text right up to the end token: cut, or just fitting
            return {"captions": len(captions), "full": full}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """How many captions there are, and how many fill all tokens."""
        captions, full = (sum(row[name] for row in stats) for name in ("captions", "full"))
        return f"tokens: {captions:,} captions, {full:,} fill all {self.max_length} tokens (the rest of them is cut)"
