"""Equality with the references, as commands that a user runs."""
