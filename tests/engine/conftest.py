from __future__ import annotations

from hypothesis import settings

# How fast an example is depends on what else the machine does.
settings.register_profile("engine", deadline=None)
settings.load_profile("engine")
