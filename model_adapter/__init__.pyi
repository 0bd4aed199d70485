from .api.create import create_database
from .api.embedders import load_embedder
from .api.open import open_database
from .api.repair import repair_database
from .api.rewrite import rewrite_database
from .attention.context import Context, Stretch
from .attention.function import memory_attention
from .attention.sight import LayerMemory, Sight
from .calibration.calibrate import calibrate
from .calibration.found import Calibration
from .catalog import (
    ADAPTERS,
    CATALOG,
    DEFAULT_EMBEDDER,
    DEFAULT_MODEL,
    cache_folder,
    is_pulled,
    pull,
)
from .generation.answer import Generation, Source
from .generation.chat import Chat
from .generation.chunks import Chunk
from .generation.generate import Stream, generate, stream
from .generation.inspected import Inspected, Inspection, inspect_document
from .generation.options import Mode, Options
from .models.adapters import Adapter, load_adapter
from .models.embedder import SentenceEmbedder
from .models.language_model import LanguageModel, load_model
from .models.loading import Loading
from .models.loading_options import LoadingOptions
from .prompts.framing import Frame, Message, default_framing
from .prompts.overlap import overlap, overlaps
from .selections import SELECTIONS, Selection
from .warming import WorkerError, warm_database
from .writing.writer import Writer

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
    "Inspected",
    "Inspection",
    "LanguageModel",
    "LayerMemory",
    "Loading",
    "LoadingOptions",
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
    "inspect_document",
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
