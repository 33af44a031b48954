"""Captions come from the web: what has to be taken out before one is shown anywhere."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # spell words in several scripts, and reorder nothing


def clean_caption(text: str) -> str:
    """A caption that can be shown anywhere: NFC, one line, no control, bidi or other invisible format characters.

    A right-to-left override in a web caption would otherwise turn the text around it; a lone surrogate cannot be
    written to a file at all.
    """
    spaced = " ".join(text.split())
    kept = [char for char in spaced if char in _JOINERS or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Cn"}]
    return " ".join(unicodedata.normalize("NFC", "".join(kept)).split())
