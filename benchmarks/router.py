"""Whether a model's own attention finds references better than an embedder does (paper, Remark 2).

One plain pass over each reference gives its keys, one over each question its queries. The heads
whose scores find the right text best, in a text that is in no test, make a router: by the keys of
all tokens (`late`), or by one key for each reference (`pooled`). Each kind of score is measured
alone and fused with the embedder, beside the embedder that memdb ships and a keyword search.

    python benchmarks/router.py --data data --tuning foldoc.jsonl --model smollm2-135m

`--data`: a folder with a folder for each set, of a `corpus.jsonl` and a `questions.jsonl` as for
`memdb eval`. `--tuning`: what recipes/calibration/foldoc.py writes. Vectors of all heads are kept
in the work folder, about 0.7 MB for each reference: the same command goes on where it was
interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from keywords import bm25
from router_data import Asked, read
from router_fit import Fit, Router, best_weight, reciprocal
from router_pass import Floats, Passes
from router_scores import KINDS, POOLED, standard
from router_table import printed
from router_tuning import Tuning, tuning

from memdb import MemDBError
from model_adapter import DEFAULT_EMBEDDER, DEFAULT_MODEL, LanguageModel
from model_adapter.catalog import cache_folder
from model_adapter.evaluation.folder import digest
from model_adapter.models.embedder import SentenceEmbedder

EMBEDDER, KEYWORDS = "embedder", "keywords"


class Embedded:
    """Scores of the embedder; embeddings of references are kept."""

    def __init__(self, embedder: SentenceEmbedder, folder: Path) -> None:
        self._embedder, self._folder = embedder, folder

    def scores(self, questions: list[str], texts: list[str]) -> Floats:
        """Cosines, (questions, references)."""
        file = self._folder / f"embedded-{digest([self._embedder.fingerprint, texts])}.npy"
        if not file.exists():
            half = file.with_suffix(".half.npy")
            np.save(half, self._embedder.embed(texts))
            half.rename(file)
        vectors: Floats = np.load(file)
        return self._embedder.embed(questions, query=True) @ vectors.T


def ways(asked: Asked, by_name: dict[str, tuple[Floats, float]], base: Floats) -> dict[str, Any]:
    """What each way finds: the embedder, each other score alone, and fused with it.

    Args:
        asked: the set.
        by_name: other scores, and their weights beside the embedder's.
        base: the embedder's scores.
    """
    found: dict[str, Any] = {EMBEDDER: asked.found(base)}
    for name, (scores, weight) in by_name.items():
        found[name] = asked.found(scores)
        found[f"{name} + embedder"] = asked.found(standard(base) + weight * standard(scores))
        found[f"{name} + embedder, ranks"] = asked.found(reciprocal(base, scores))
    return found


def sizes(routers: list[Router], model: LanguageModel, tokens: float, dim: int) -> dict[str, float]:
    """Bytes for each reference, as float16 (embeddings are float32), by way."""
    group = model.heads // model.kv_heads
    found = {EMBEDDER: 4.0 * dim}
    for router in routers:
        keys = len({row // group for row in router.rows}) * model.head_dim * 2
        found[router.kind] = keys * (1 if router.kind in POOLED else tokens)
    return found


def routers_of(fit: Fit, text: Tuning, embedded: Embedded) -> tuple[list[Router], float]:
    """A router of each kind, and the weight of keywords."""
    queries = [query.text for query in text.queries]
    base = embedded.scores(queries, text.texts)
    routers = [fit.router(kind, base) for kind in KINDS]
    for one in routers:
        rows = ", ".join(map(str, one.rows))
        print(
            f"{one.kind}: heads {rows}; weight {one.weight}; MRR {one.mrr[0]:.3f}, with the "
            f"embedder {one.mrr[1]:.3f}"
        )
    words = standard(text.masked(bm25(queries, text.texts)))
    weight, fused = best_weight(standard(text.masked(base)), words, text)
    print(f"keywords: weight {weight}; with the embedder MRR {fused:.3f}")
    return routers, weight


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--tuning", "text", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--set", "sets", multiple=True, help="Only these folders; may be given again.")
@click.option("--limit", type=click.IntRange(min=1), default=150, show_default=True)
@click.option(
    "--distractors",
    type=click.IntRange(min=0),
    help="The corpus is the questions' documents and so many distractors of each; default: all.",
)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="What is kept; default: the cache.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write figures here.")
def main(
    data: Path,
    text: Path,
    sets: tuple[str, ...],
    limit: int,
    distractors: int | None,
    model: str,
    work: Path | None,
    output: Path | None,
) -> None:
    """Whether a model's own attention finds references better than an embedder does."""
    folder = work or cache_folder() / "router"
    figures: dict[str, Any] = {}
    try:
        # Half the time of float32 or less on CPUs that have it; ranks hardly mind.
        loaded = LanguageModel.load(model, dtype=torch.bfloat16, notify=print)
        embedder = SentenceEmbedder(DEFAULT_EMBEDDER, print)
        passes, embedded = Passes(loaded, folder), Embedded(embedder, folder)
        known = tuning(loaded, text)
        routers, weight = routers_of(Fit(passes, known, folder), known, embedded)
        group = loaded.heads // loaded.kv_heads
        for name in sets or sorted(path.parent.name for path in data.glob("*/questions.jsonl")):
            asked = read(data / name, loaded.tokenizer_json, limit, distractors)
            questions = [one.text for one in asked.questions]
            queries, keys = passes.queries(questions), passes.keys(asked.texts)
            by_name = {KEYWORDS: (bm25(questions, asked.texts), weight)}
            by_name |= {one.kind: (one.scores(group, queries, keys), one.weight) for one in routers}
            base = embedded.scores(questions, asked.texts)
            title = f"{model}, {name}: {len(questions)} questions, {len(asked.texts)} references"
            size = sizes(routers, loaded, float(keys.counts.mean()), embedder.dimension)
            figures[name] = printed(title, ways(asked, by_name, base), EMBEDDER, size)
            if output is not None:
                output.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    except MemDBError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
