"""Evaluate a model on held-out rows: losses and answers."""
