"""memdb: a database for explicit memory.

What SQLite is to tables, for the key-values that a language model reads instead of text: text and
embeddings, and for each reference its sparse attention key-values (Yang et al., "Memory³: Language
Modeling with Explicit Memory", 2024). The engine needs no model; `model_adapter` writes memories
with one and reads them while it generates.
"""

from memdb.chunking import text_tokenizer
from memdb.codecs import CODECS, Codec
from memdb.corpus import read_corpus
from memdb.database import MemDB
from memdb.errors import (
    ConflictError,
    CorpusError,
    CorruptRecordError,
    DatabaseExistsError,
    DocumentExistsError,
    ForkedProcessError,
    FormatError,
    InvalidInputError,
    MemDBError,
    MismatchError,
    MissingPartError,
    NotADatabaseError,
    StorageError,
    UnknownDocumentError,
    UnsupportedModelError,
)
from memdb.ingest import IngestReport
from memdb.packing import PackedLayer, PackedMemories, pack
from memdb.protocols import Embedder, MemoryWriter, Progress
from memdb.records import (
    Document,
    DType,
    ExplicitMemory,
    Framing,
    MemoryShape,
    Reference,
    Rope,
    StoredDocument,
    from_float32,
    to_float32,
)
from memdb.retrieval import Hit, Query, Retrieval

__version__ = "0.1.0"

__all__ = [
    "CODECS",
    "Codec",
    "ConflictError",
    "CorpusError",
    "CorruptRecordError",
    "DType",
    "DatabaseExistsError",
    "Document",
    "DocumentExistsError",
    "Embedder",
    "ExplicitMemory",
    "ForkedProcessError",
    "FormatError",
    "Framing",
    "Hit",
    "IngestReport",
    "InvalidInputError",
    "MemDB",
    "MemDBError",
    "MemoryShape",
    "MemoryWriter",
    "MismatchError",
    "MissingPartError",
    "NotADatabaseError",
    "PackedLayer",
    "PackedMemories",
    "Progress",
    "Query",
    "Reference",
    "Retrieval",
    "Rope",
    "StorageError",
    "StoredDocument",
    "UnknownDocumentError",
    "UnsupportedModelError",
    "from_float32",
    "pack",
    "read_corpus",
    "text_tokenizer",
    "to_float32",
]
