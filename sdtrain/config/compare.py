"""What differs between two pages, and what may differ when a run is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdtrain.config.base import Section
from sdtrain.config.problems import dotted, shown
from sdtrain.errors import ConfigError

ALLOWED_ON_RESUME = (
    "name",
    "run_dir",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.log_every_steps",
    "trainer.compile",
    "trainer.compile_mode",
    "trainer.timeout_seconds",
    "trainer.hang_timeout_seconds",
    "trainer.max_hours",
    "data.num_workers",
    "data.prefetch",
    "data.read_retries",
    "data.cache_dir",
    "data.cache_gib",
    "data.ram_cache_gib",
    "data.micro_batch_size",
    "task.loss_bins",
    "trainer.oom_skip",
    "health",
    "checkpoint",
    "validation",
    "samples",
    "tracking",
)
"""Keys and sections that a resumed run may change: none of them touches a sample, a draw or the optimiser's state.

A new length of the run does move the end of a decaying learning rate."""

LONGEST_SHOWN = 400
"""Characters of a value; two long paths may differ in their last part alone."""

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Difference:
    """One key with two values.

    Attributes:
        path: Dotted path.
        before: Value in the first page; None also where the key does not exist there.
        after: Value in the second page.
    """

    path: str
    before: Any
    after: Any

    @property
    def is_allowed_on_resume(self) -> bool:
        """Whether a resumed run may change this."""
        return any(self.path == known or self.path.startswith(f"{known}.") for known in ALLOWED_ON_RESUME)

    def __str__(self) -> str:
        before, after = (shown(value, most=LONGEST_SHOWN) for value in (self.before, self.after))
        return f"{self.path}: {before} -> {after}"


def _walk(before: Any, after: Any, path: tuple[str, ...]) -> Iterator[Difference]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            yield from _walk(before.get(key, _ABSENT), after.get(key, _ABSENT), (*path, key))
    elif before != after or type(before) is not type(after):
        yield Difference(dotted(path), None if before is _ABSENT else before, None if after is _ABSENT else after)


def differences(before: Section, after: Section) -> list[Difference]:
    """Every key whose value differs, in the order of the page; lists count as one value."""
    return list(_walk(before.model_dump(mode="json"), after.model_dump(mode="json"), ()))


def refuse_on_resume(old: Section, new: Section) -> None:
    """Let a run be resumed only as the run that it is.

    Args:
        old: The page that is stored with the checkpoint.
        new: The page that was given now.

    Raises:
        ConfigError: Pages differ outside `ALLOWED_ON_RESUME`; names every such key with both values.
    """
    refused = [difference for difference in differences(old, new) if not difference.is_allowed_on_resume]
    if not refused:
        return
    listed = "\n".join(f"  {difference}" for difference in refused)
    raise ConfigError(
        f"this page cannot resume the run that stands in its folder (checkpoint -> page):\n{listed}\n"
        "Set these keys back, or start another run: run_dir=NEW_FOLDER. "
        f"A resumed run may change {', '.join(ALLOWED_ON_RESUME)}."
    )
