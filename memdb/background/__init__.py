"""Work that goes on while nobody waits for it, and belongs to an open database."""

from __future__ import annotations

from memdb.background.task import Cancelled, Task
from memdb.background.turn import one_at_a_time

__all__ = ["Cancelled", "Task", "one_at_a_time"]
