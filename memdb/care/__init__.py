"""Looking after a database: is it whole, mending what can be derived, giving space back, copies.

Each is a function of a path. They may run while other processes read and write; who writes waits
for `compact`, `restore`, `migrate` and the first part of `verify`, who reads never does.
"""

from __future__ import annotations

from memdb.care.aside import AsideRecord, read_aside
from memdb.care.repair import Repair
from memdb.care.rewrite import RewriteReport
from memdb.care.verify import Problem
from memdb.care.whole import backup, compact, migrate, repair, restore, rewrite, verify

__all__ = [
    "AsideRecord",
    "Problem",
    "Repair",
    "RewriteReport",
    "backup",
    "compact",
    "migrate",
    "read_aside",
    "repair",
    "restore",
    "rewrite",
    "verify",
]
