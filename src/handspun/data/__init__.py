"""Rows to conversations to examples to batches."""
