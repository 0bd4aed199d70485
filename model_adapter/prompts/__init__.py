"""What stands around memories and prompt, and who speaks in it."""
