"""What of a model is worth keeping: measured head by head, and foreseen."""
