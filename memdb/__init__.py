"""memdb: a database for explicit memory.

What SQLite is to tables, for the key-values that a language model reads instead of text: text and
embeddings, and for each reference its sparse attention key-values (Yang et al., "Memory³: Language
Modeling with Explicit Memory", 2024). The engine needs no model; `model_adapter` writes memories
with one and reads them while it generates.
"""

from memdb.batch import MemoryBatch
from memdb.bulk import Batch, LoadReport
from memdb.cache import CacheStats
from memdb.care import Problem, Repair, backup, compact, migrate, repair, restore, verify
from memdb.chunking import Chunker, Piece, text_tokenizer
from memdb.codecs import CODEC_NAMES, CODECS, Codec
from memdb.corpus import json_object, read_corpus
from memdb.database import DEFAULT_CODEC, MemDB
from memdb.environment import Durability
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
from memdb.importing import import_database
from memdb.index import IndexInfo, IndexKind
from memdb.ingest import IngestReport
from memdb.packing import PackedLayer, PackedMemories, pack
from memdb.protocols import Embedder, MemoryWriter, Progress, Warmer, no_progress
from memdb.reading import Readable, Snapshot
from memdb.recoding import RecodeReport
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
from memdb.remembering import StoredMemory
from memdb.retrieval import Hit, Query, Retrieval
from memdb.rewriting import RewriteReport, rewrite

__version__ = "0.1.0"

__all__ = [
    "CODECS",
    "CODEC_NAMES",
    "DEFAULT_CODEC",
    "Batch",
    "CacheStats",
    "Chunker",
    "Codec",
    "ConflictError",
    "CorpusError",
    "CorruptRecordError",
    "DType",
    "DatabaseExistsError",
    "Document",
    "DocumentExistsError",
    "Durability",
    "Embedder",
    "ExplicitMemory",
    "ForkedProcessError",
    "FormatError",
    "Framing",
    "Hit",
    "IndexInfo",
    "IndexKind",
    "IngestReport",
    "InvalidInputError",
    "LoadReport",
    "MemDB",
    "MemDBError",
    "MemoryBatch",
    "MemoryShape",
    "MemoryWriter",
    "MismatchError",
    "MissingPartError",
    "NotADatabaseError",
    "PackedLayer",
    "PackedMemories",
    "Piece",
    "Problem",
    "Progress",
    "Query",
    "Readable",
    "RecodeReport",
    "Reference",
    "Repair",
    "Retrieval",
    "RewriteReport",
    "Rope",
    "Snapshot",
    "StorageError",
    "StoredDocument",
    "StoredMemory",
    "UnknownDocumentError",
    "UnsupportedModelError",
    "Warmer",
    "backup",
    "compact",
    "from_float32",
    "import_database",
    "json_object",
    "migrate",
    "no_progress",
    "pack",
    "read_corpus",
    "repair",
    "restore",
    "rewrite",
    "text_tokenizer",
    "to_float32",
    "verify",
]
