"""Verify Handspun against transformers on the user's model. Only this package calls transformers' `generate`."""
