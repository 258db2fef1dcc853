"""Export checkpoints: a merged folder, a GGUF file, a repository on the Hugging Face hub."""
