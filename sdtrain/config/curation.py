"""What is done with pictures once they are there: duplicates among them, scores of their own, other captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sdtrain.config.base import NonEmptyStr, PositiveInt, Section
from sdtrain.config.trainer import Precision

Percentile = Annotated[float, Field(ge=0, le=100)]


class ContentDedupConfig(Section):
    """Which pictures are the same, whatever their URLs.

    Attributes:
        by: `bytes`: the same file was fetched. `perceptual`: the pictures look alike (pHash of 64 bits), whatever
            their size, format and quality.
        radius: Bits in which the perceptual hashes of duplicates may differ; of no effect on `bytes`.
        exclude: Pictures that must not be trained on, such as those of an evaluation set: folders of pictures, or text
            files with a sha256 of a file (64 hexadecimal digits) or a perceptual hash (16) in each line.
    """

    by: Literal["bytes", "perceptual"] = "perceptual"
    radius: Annotated[int, Field(ge=0, le=10)] = 4
    exclude: tuple[Path, ...] = ()


class ScoresConfig(Section):
    """Scores of the stored pictures, by a CLIP model of open_clip; what is below a threshold is rejected.

    Attributes:
        model: Name of the model as `open_clip.list_models()` has it.
        weights: Its state dict: a .safetensors file, or a .pt or .bin that `torch.load(weights_only=True)` reads.
        min_similarity: Least cosine of picture and caption; null switches the threshold off.
        similarity_percentile: Samples with a similarity below this percentile of all samples are rejected.
        aesthetic_head: State dict of a predictor on this model's normalised embeddings, linear (`weight`, `bias`) or
            of several layers (`layers.0.weight`, ...), as LAION's are; null computes no aesthetic score.
        min_aesthetic: Least aesthetic score; null switches the threshold off.
        aesthetic_percentile: Samples with an aesthetic score below this percentile of all samples are rejected.
        batch_size: Pictures in one forward.
        precision: Working precision of the model.
        device: `auto` takes a GPU where there is one.
    """

    model: NonEmptyStr = "ViT-L-14"
    weights: Path
    min_similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    similarity_percentile: Percentile | None = None
    aesthetic_head: Path | None = None
    min_aesthetic: float | None = None
    aesthetic_percentile: Percentile | None = None
    batch_size: PositiveInt = 64
    precision: Precision = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class CaptionsConfig(Section):
    """Other captions for pictures that are there already; the ones before are kept beside them.

    Attributes:
        table: A parquet or JSON-lines file, a folder or a glob of them, with the columns `caption` and `key` or `url`.
        by: Column that rows are matched by: a sample's `key`, or its `url`.
    """

    table: NonEmptyStr
    by: Literal["key", "url"] = "key"
