"""One fine-tuning run around the loop."""
