"""GGUF files: what is in them, and their weights by the names of transformers."""
