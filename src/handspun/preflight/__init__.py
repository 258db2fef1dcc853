"""Checks before the first step of a run: problems in its rows, and its cost."""
