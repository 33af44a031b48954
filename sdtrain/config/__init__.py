"""The typed page of a run: strict, frozen, complete. Imports no torch, so that checking a page is instant."""
