"""Models of transformers: loaded, tried out, identified, and run."""
