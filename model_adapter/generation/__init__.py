"""Generation with explicit memory: look up, read, decode."""
