"""Equality with the references on a model of the user's own: the one place that calls transformers' `generate`."""
