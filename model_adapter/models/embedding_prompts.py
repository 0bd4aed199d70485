"""What stands before a query, and before a text, when it is embedded.

Many embedders are trained with an instruction before what they read, another one for queries than
for texts, and find less without. Most say so in `config_sentence_transformers.json` (`prompts`,
`default_prompt_name`). Some that many people have do not: those are known here by their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_QUERY, _DOCUMENT = ("query",), ("document", "passage", "corpus")
_BGE = "Represent this sentence for searching relevant passages: "
_WEB = (
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
)
#: Before a query and before a text, as the models' cards say it, by the end of the model's name.
_FAMILIES: tuple[tuple[str, tuple[str, str]], ...] = (
    (r"e5-(small|base|large)(-v2|-unsupervised)?", ("query: ", "passage: ")),
    (r"(multilingual-e5-large|e5-mistral-7b)-instruct", (f"{_WEB} ", "")),
    (r"bge-(small|base|large)-en(-v1\.5)?", (_BGE, "")),
    (r"bge-(small|base|large)-zh(-v1\.5)?", ("为这个句子生成表示以用于检索相关文章：", "")),
    (r"mxbai-embed-(large|xsmall)-v1", (_BGE, "")),
    (r"snowflake-arctic-embed-(xs|s|m|l|m-long|m-v1\.5)", (_BGE, "")),
    (r"snowflake-arctic-embed-[ml]-v2\.0", ("query: ", "")),
    (r"nomic-embed-text-v\d(\.\d)?(-moe)?", ("search_query: ", "search_document: ")),
    (r"qwen3-embedding-[\d.]+b", (_WEB, "")),
    (r"embeddinggemma-300m", ("task: search result | query: ", "title: none | text: ")),
)


@dataclass(frozen=True)
class EmbeddingPrompts:
    """What stands before what is embedded.

    Attributes:
        query: before a query.
        document: before a text.
        own: what the model's configuration has, by its names, without what is empty.
    """

    query: str = ""
    document: str = ""
    own: Mapping[str, str] | None = None

    @classmethod
    def of(
        cls, names: tuple[str, ...], prompts: Mapping[str, str | None] | None, default: str | None
    ) -> EmbeddingPrompts:
        """Of a model.

        Args:
            names: what it is called: an id of a hub, a folder.
            prompts: of its configuration.
            default: there: which of them is the default. It stands where there is no other.
        """
        own = {name: text for name, text in (prompts or {}).items() if text}
        query = _first(own, _QUERY)
        document = _first(own, _DOCUMENT)
        if not query and not document:
            query = document = own.get(default, "") if default else ""
            if not query:
                query, document = _known(names)
        return cls(query, document, own)

    @property
    def recipe(self) -> dict[str, Any]:
        """What of them a fingerprint counts. Releases before this one put nothing before a text
        but what is called `query` and `document`; what was embedded so keeps its fingerprint."""
        own = dict(self.own or {})
        now = [self.query, self.document]
        same = now == [own.get("query", ""), own.get("document", "")]
        return {"prompts": own} if same else {"prompts": own, "embedded_with": now}


def names_of(name: str, folder: Path) -> tuple[str, ...]:
    """What a model is called: as somebody named it, and as its configuration says."""
    with suppress(OSError, ValueError, AttributeError):
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        said = said.get("_name_or_path")
        if isinstance(said, str) and said:
            return name, said
    return (name,)


def _first(prompts: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((prompts[name] for name in names if name in prompts), "")


def _known(names: tuple[str, ...]) -> tuple[str, str]:
    for name in names:
        called = Path(name).name.lower()
        for family, prompts in _FAMILIES:
            if re.search(rf"(^|[-_]){family}$", called):
                return prompts
    return "", ""
