"""From references to memories."""
