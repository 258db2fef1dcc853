"""The training loop: loss, optimiser, events, checkpoints."""
