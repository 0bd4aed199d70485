"""Files that outlast an interruption, and a folder that one process works in at a time."""
