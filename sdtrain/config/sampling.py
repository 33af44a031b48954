"""Kind `sampling`: pictures from a trained run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sdtrain.config.base import (
    Fraction,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SchemaVersion,
    Section,
)
from sdtrain.config.problems import Problem
from sdtrain.config.trainer import Precision
from sdtrain.errors import ConfigError


class SamplingConfig(Section):
    """What `sdtrain sample` does.

    Attributes:
        schema_version: Version of this page's keys.
        kind: `sampling`.
        name: What the page is called; null takes folder and file name.
        run: A run folder, a checkpoint folder or an exported pipeline.
        prompts: One picture or more per prompt; or give prompts_file.
        prompts_file: A text file with one prompt per line; or give prompts.
        sampler: `ddim`, `ddpm` (ancestral) or `euler`, made for a flow; without eta `ddim` takes the same steps.
        num_steps: Denoising steps.
        eta: Share of fresh noise in DDIM; 0 is deterministic.
        guidance_scale: Strength of classifier-free guidance; 1.0 is off.
        seed: Seed of the first picture; the next ones count on.
        images_per_prompt: Pictures per prompt.
        batch_size: Pictures made together; changes nothing but speed.
        output: Folder for the pictures.
        precision: Working precision of the denoiser.
    """

    schema_version: SchemaVersion
    kind: Literal["sampling"]
    name: NonEmptyStr | None = None
    run: Path
    prompts: tuple[NonEmptyStr, ...] | None = None
    prompts_file: Path | None = None
    sampler: Literal["ddim", "ddpm", "euler"] = "ddim"
    num_steps: PositiveInt = 30
    eta: Fraction = 0.0
    guidance_scale: NonNegativeFloat = 7.5
    seed: NonNegativeInt = 0
    images_per_prompt: PositiveInt = 1
    batch_size: PositiveInt = 8
    output: Path
    precision: Precision = "fp32"

    def all_prompts(self) -> tuple[str, ...]:
        """The prompts of the page, or the lines of its file that are not blank.

        Raises:
            ConfigError: The file is missing, unreadable or holds no prompt.
        """
        if self.prompts_file is None:
            return self.prompts or ()
        try:
            lines = self.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompts_file = {self.prompts_file} cannot be read as text: {error}") from None
        prompts = tuple(line.strip() for line in lines if line.strip())
        if not prompts:
            raise ConfigError(f"prompts_file = {self.prompts_file} holds no prompt; write one per line")
        return prompts


def one_source_of_prompts(prompts: tuple[str, ...] | None, prompts_file: Path | None) -> Iterator[Problem]:
    """Prompts come from the page or from a file, not from both and not from nowhere."""
    if bool(prompts) == (prompts_file is not None):
        yield Problem("prompts", "give exactly one of prompts (a list) and prompts_file (one prompt per line)")


SAMPLING_RULES = (one_source_of_prompts,)
