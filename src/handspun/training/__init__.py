"""The training loop: loss, optimizer, events, checkpoints."""
