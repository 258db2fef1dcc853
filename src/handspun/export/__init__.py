"""A checkpoint in the forms that others take: one merged folder, a GGUF file, a repository on the hub."""
