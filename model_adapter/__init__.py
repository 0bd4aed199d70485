"""Memory³ on Hugging Face models: writes explicit memories and reads them while it generates.

db = create_database("facts.memdb")            # or open_database
db.insert("The harbour master of Veldmoor is Ottoline Brask.")
print(generate("Who is the harbour master of Veldmoor?", db).text)
"""

from model_adapter.api import (
    create_database,
    load_embedder,
    open_database,
    repair_database,
    rewrite_database,
)
from model_adapter.attention.context import Context, Stretch
from model_adapter.attention.function import LayerMemory, Sight, memory_attention
from model_adapter.calibration.calibrate import calibrate
from model_adapter.calibration.found import Calibration
from model_adapter.catalog import (
    ADAPTERS,
    CATALOG,
    DEFAULT_EMBEDDER,
    DEFAULT_MODEL,
    cache_folder,
    is_pulled,
    pull,
)
from model_adapter.generation.answer import Generation, Source
from model_adapter.generation.chat import Chat
from model_adapter.generation.chunks import Chunk
from model_adapter.generation.generate import Stream, generate, stream
from model_adapter.generation.options import Mode, Options
from model_adapter.models.adapters import Adapter, load_adapter
from model_adapter.models.embedder import SentenceEmbedder
from model_adapter.models.language_model import LanguageModel, load_model
from model_adapter.prompts.framing import Frame, Message, default_framing
from model_adapter.prompts.overlap import overlap, overlaps
from model_adapter.selections import SELECTIONS, Selection
from model_adapter.warming import WorkerError, warm_database
from model_adapter.writing.writer import Writer

__all__ = [
    "ADAPTERS",
    "CATALOG",
    "DEFAULT_EMBEDDER",
    "DEFAULT_MODEL",
    "SELECTIONS",
    "Adapter",
    "Calibration",
    "Chat",
    "Chunk",
    "Context",
    "Frame",
    "Generation",
    "LanguageModel",
    "LayerMemory",
    "Message",
    "Mode",
    "Options",
    "Selection",
    "SentenceEmbedder",
    "Sight",
    "Source",
    "Stream",
    "Stretch",
    "WorkerError",
    "Writer",
    "cache_folder",
    "calibrate",
    "create_database",
    "default_framing",
    "generate",
    "is_pulled",
    "load_adapter",
    "load_embedder",
    "load_model",
    "memory_attention",
    "open_database",
    "overlap",
    "overlaps",
    "pull",
    "repair_database",
    "rewrite_database",
    "stream",
    "warm_database",
]
