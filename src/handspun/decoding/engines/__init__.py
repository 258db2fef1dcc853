"""What computes the logits of the next token."""
