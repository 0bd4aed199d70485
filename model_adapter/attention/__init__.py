"""Attention over memories and context: the function, where both lie, and how much each counts."""
