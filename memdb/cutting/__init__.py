"""Where a text may be cut, and what stands above each of its parts (docs/cutting.md)."""
