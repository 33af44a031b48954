"""Tests; `tests.run` is what `make test` calls."""
