"""The same of llama.cpp, with the references as text in the prompt: what a user would take else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from generation_run import CHUNK, MEMORIES, Bench, seconds_of
from rich.table import Table

from model_adapter import generate

ANSWERS = (16, 64, 256)  # tokens


def compare(bench: Bench, gguf: Path, figures: dict[str, float]) -> Table:
    """Whole answers, end to end, retrieval included, to prompts of 64 tokens with 5 references."""
    try:
        from llama_cpp import Llama
    except ImportError as error:
        raise click.ClickException(
            "--gguf needs llama.cpp: pip install llama-cpp-python"
        ) from error
    threads = torch.get_num_threads()
    peer = Llama(str(gguf), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)
    table = Table(title=f"whole answers, {CHUNK} tokens in, {MEMORIES} references: seconds")
    for column in ("tokens out", "memdb, fast weights", "llama.cpp, references as text", "ratio"):
        table.add_column(column, justify="right")
    prompts = bench.prompts(CHUNK)[: max(2, bench.rounds)]
    for length in ANSWERS:
        ours, theirs = [], []
        for prompt in prompts:
            ours.append(seconds_of(partial(_memdb, bench, prompt, length)))
            theirs.append(seconds_of(partial(_llama, bench, peer, prompt, length)))
        mine, other = median(ours), median(theirs)
        figures[f"seconds_over_llama_cpp_{length}"] = mine / other
        table.add_row(f"{length}", f"{mine:.2f}", f"{other:.2f}", f"{mine / other:.2f}")
    return table


def _memdb(bench: Bench, prompt: str, length: int) -> None:
    generate(prompt, bench.db, max_new_tokens=length, memories=MEMORIES)


def _llama(bench: Bench, peer: Any, prompt: str, length: int) -> None:
    hits = bench.db.retrieve_batch([prompt], MEMORIES, memories=False)[0].hits
    framed = bench.writer.frame.with_text([hit.reference.content for hit in hits], prompt)
    bias = {str(token): -100.0 for token in bench.writer.model.tokenizer.all_special_ids}
    peer.create_completion(
        [*framed.content, *framed.tail], max_tokens=length, temperature=0.0, logit_bias=bias
    )
