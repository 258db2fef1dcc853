"""Engines: run the model and keep its KV cache for decoding."""
