"""Documents out of what people have: files and folders of text, pages, tables, notebooks."""

from memdb.files.files import Files
from memdb.files.found import PassedOver
from memdb.files.gathered import Gathered
from memdb.files.kinds import FORMATS

__all__ = ["FORMATS", "Files", "Gathered", "PassedOver"]
