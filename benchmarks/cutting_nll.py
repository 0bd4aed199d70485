"""What cuts and places are worth to who reads the memories: the NLL of answers.

    python benchmarks/cutting_nll.py --corpus DIR/corpus.jsonl --questions DIR/questions.jsonl

Each question sees the memories of all references of its document, written in each of four ways: cut
at sentences or by structure, with their place or without; nothing, and the text in the prompt
(RAG), stand beside. Changes are against the first way, paired over questions, with the ends of
their 95 % intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import numpy as np
from answering import Harness, change, read
from cutting import ARMS

from memdb import Chunker, ExplicitMemory, Framing
from model_adapter import LanguageModel, Writer
from model_adapter.evaluation import read_documents


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40, help="questions, drawn over the file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--framing", choices=get_args(Framing), default="chat")
    options = parser.parse_args()
    model = LanguageModel.load(options.model)
    texts, questions = read(options.corpus, options.questions, options.limit)
    documents = read_documents(options.corpus)
    writer = Writer(model, framing=options.framing)
    harness = Harness(model, options.framing, texts)
    print("| read | NLL | change, % |")
    print("| --- | --- | --- |")
    for name, score in (("nothing", harness.nothing), ("text (RAG)", harness.rag)):
        print(f"| {name} | {np.mean([score(one)[0] for one in questions]):.3f} | |", flush=True)
    base: np.ndarray | None = None
    for arm, cutting in ARMS.items():
        chunker = Chunker(writer.tokenizer, writer.shape.reference_length, cutting)
        known: dict[str, list[ExplicitMemory]] = {}
        losses = []
        for one in questions:
            if one.document not in known:
                document = documents[one.document]
                title = str(document.metadata.get("title", ""))
                pieces = chunker.split(document.text, id=one.document, title=title)
                known[one.document] = writer.write([piece.placed for piece in pieces])
            losses.append(harness.memory(one, known[one.document], writer.shape)[0])
        found = np.array(losses)
        shown = ""
        if base is None:
            base = found
        else:
            value, low, high = (100 * part for part in change(found, base))
            shown = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
        print(f"| {arm} | {found.mean():.3f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
