"""memdb: a database for explicit memory.

What SQLite is to tables, for the key-values that a language model reads instead of text: text and
embeddings, and for each reference its sparse attention key-values (Yang et al., "Memory³: Language
Modeling with Explicit Memory", 2024). The engine needs no model; `model_adapter` writes memories
with one and reads them while it generates.
"""

from memdb.care import (
    Problem,
    Repair,
    RewriteReport,
    backup,
    compact,
    migrate,
    repair,
    restore,
    rewrite,
    verify,
)
from memdb.care.recode import RecodeReport
from memdb.care.statistics import IndexStats, MemoryBytes, Stats
from memdb.codecs import CODEC_NAMES, CODECS, Codec, CodedVectors, Digits, Levels, Recipe, Scaled
from memdb.database import DEFAULT_CODEC, MemDB
from memdb.errors import (
    BusyError,
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
    UnknownNamespaceError,
    UnsupportedModelError,
)
from memdb.files import FORMATS, Files, Gathered, PassedOver
from memdb.importing import import_database
from memdb.index import IndexInfo, IndexKind
from memdb.ingest.chunking import Chunker, Piece, text_tokenizer
from memdb.ingest.corpus import json_object, read_corpus
from memdb.ingest.corpus_run import IngestReport
from memdb.ingest.load import DocumentBatch, LoadReport
from memdb.ingest.text_only import TextOnly, text_only
from memdb.memories.cache import CacheStats
from memdb.memories.coded_packing import CodedGroup, CodedLayer, CodedMemories, pack_coded
from memdb.memories.memory_store import StoredMemory
from memdb.memories.packing import PackedLayer, PackedMemories, pack
from memdb.namespaces import (
    create_namespace,
    drop_namespace,
    existing_namespace,
    list_namespaces,
)
from memdb.protocols import Embedder, MemoryWriter, Progress, Warmer, no_progress
from memdb.readable import Readable, Snapshot
from memdb.retrieval import Hit, Mode, Query, Rerank, Retrieval
from memdb.storage.environment import Durability
from memdb.transaction import WriteTransaction
from memdb.types.change import Change
from memdb.types.cutting import Cutting
from memdb.types.document import Document, Part, Reference, StoredDocument
from memdb.types.html import Html
from memdb.types.memory import ExplicitMemory, from_float32, to_float32
from memdb.types.memory_batch import MemoryBatch
from memdb.types.shape import DType, Framing, MemoryShape, Rope
from memdb.writable import Writable

__version__ = "0.1.0"

Batch = DocumentBatch  # its name up to 0.1

__all__ = [
    "CODECS",
    "CODEC_NAMES",
    "DEFAULT_CODEC",
    "FORMATS",
    "Batch",
    "BusyError",
    "CacheStats",
    "Change",
    "Chunker",
    "Codec",
    "CodedGroup",
    "CodedLayer",
    "CodedMemories",
    "CodedVectors",
    "ConflictError",
    "CorpusError",
    "CorruptRecordError",
    "Cutting",
    "DType",
    "DatabaseExistsError",
    "Digits",
    "Document",
    "DocumentBatch",
    "DocumentExistsError",
    "Durability",
    "Embedder",
    "ExplicitMemory",
    "Files",
    "ForkedProcessError",
    "FormatError",
    "Framing",
    "Gathered",
    "Hit",
    "Html",
    "IndexInfo",
    "IndexKind",
    "IndexStats",
    "IngestReport",
    "InvalidInputError",
    "Levels",
    "LoadReport",
    "MemDB",
    "MemDBError",
    "MemoryBatch",
    "MemoryBytes",
    "MemoryShape",
    "MemoryWriter",
    "MismatchError",
    "MissingPartError",
    "Mode",
    "NotADatabaseError",
    "PackedLayer",
    "PackedMemories",
    "Part",
    "PassedOver",
    "Piece",
    "Problem",
    "Progress",
    "Query",
    "Readable",
    "Recipe",
    "RecodeReport",
    "Reference",
    "Repair",
    "Rerank",
    "Retrieval",
    "RewriteReport",
    "Rope",
    "Scaled",
    "Snapshot",
    "Stats",
    "StorageError",
    "StoredDocument",
    "StoredMemory",
    "TextOnly",
    "UnknownDocumentError",
    "UnknownNamespaceError",
    "UnsupportedModelError",
    "Warmer",
    "Writable",
    "WriteTransaction",
    "backup",
    "compact",
    "create_namespace",
    "drop_namespace",
    "existing_namespace",
    "from_float32",
    "import_database",
    "json_object",
    "list_namespaces",
    "migrate",
    "no_progress",
    "pack",
    "pack_coded",
    "read_corpus",
    "repair",
    "restore",
    "rewrite",
    "text_only",
    "text_tokenizer",
    "to_float32",
    "verify",
]
