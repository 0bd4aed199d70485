"""The same of llama.cpp, with the references as text in the prompt: what a user would take else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from generation_gguf import write_gguf
from generation_run import CHUNK, MEMORIES, Bench, Endless
from rich.table import Table

from memdb import InvalidInputError
from model_adapter import generate, open_database, pull

ANSWERS = (16, 64, 256)  # tokens
_DECODED = 64  # of whose answers a token's time is taken
KINDS = ("Q8_0", "Q4_1")

#: Seconds of an answer of so many tokens to a prompt; and milliseconds of one of its tokens.
_Answer = Callable[[str, int], tuple[float, float]]


def compared(
    path: Path,
    model: str,
    texts: list[str],
    work: Path,
    *,
    threads: tuple[int, ...],
    rounds: int,
    answers: tuple[int, ...],
    figures: dict[str, float],
) -> Iterator[Table]:
    """Decoding, and whole answers end to end, retrieval included, to prompts of 64 tokens with 5
    references: of memdb, and of llama.cpp with each kind of file, its prompt cache off and on.

    Args:
        path: the database.
        model: its name, or its folder.
        texts: whose beginnings are prompts.
        work: where GGUF files are made.
        threads: of both; a table each.
        rounds: answers of each length; medians are reported.
        answers: lengths.
        figures: where ratios go.

    Yields:
        The table so far, after each row.
    """
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            yield from _of_threads(path, model, texts, work, count, rounds, answers, figures)
    finally:
        torch.set_num_threads(before)


def _of_threads(
    path: Path,
    model: str,
    texts: list[str],
    work: Path,
    threads: int,
    rounds: int,
    answers: tuple[int, ...],
    figures: dict[str, float],
) -> Iterator[Table]:
    table = Table(
        title=f"{CHUNK} tokens in, {MEMORIES} references, threads: {threads}; of memdb's speed",
        title_justify="left",
    )
    table.add_column("with")
    for column in ("ms a token", *(f"{length} tokens, s" for length in answers)):
        table.add_column(column, justify="right")
    loaded = Endless.load(model)  # its graphs take so many threads as torch has now
    with open_database(path, model=loaded, cache_bytes=0) as db:
        bench = Bench(db, loaded, texts, rounds)
        prompts = cycle(bench.prompts(CHUNK))
        for kind in KINDS:
            for cache in (False, True):
                name = f"llama.cpp {kind}, its prompt cache {'on' if cache else 'off'}"
                try:
                    with _llama(bench, model, work, kind, threads, cache) as theirs:
                        ours = partial(_memdb, bench)
                        both = _in_turns((ours, theirs), prompts, rounds, answers)
                except (ImportError, InvalidInputError, RuntimeError) as error:
                    table.add_row(name, f"not measured: {error}", *[""] * len(answers))
                    yield table
                    continue
                mine, other = both
                cells = [f"{found:.2f}" for found in mine]
                table.add_row("memdb, in turns with it", *cells)
                ratios = [b / a for a, b in zip(mine, other, strict=True)]
                cells = [f"{b:.2f} ({r:.2f})" for b, r in zip(other, ratios, strict=True)]
                table.add_row(name, *cells)
                suffix = f"{kind}_threads{threads}" + ("_cached" if cache else "")
                figures[f"decode_over_llama_{suffix}"] = ratios[0]
                for length, ratio in zip(answers, ratios[1:], strict=True):
                    figures[f"answer{length}_over_llama_{suffix}"] = ratio
                yield table


def _in_turns(
    arms: tuple[_Answer, _Answer], prompts: Iterator[str], rounds: int, answers: tuple[int, ...]
) -> list[list[float]]:
    """Of each arm the median milliseconds of a token, and the median seconds by length. Prompts
    differ: what a prompt cache has of one is what all begin with."""
    seconds: list[dict[int, list[float]]] = [{length: [] for length in answers} for _ in arms]
    tokens: list[list[float]] = [[] for _ in arms]
    for arm in arms:
        arm(next(prompts), 4)  # what is loaded at the first answer is
    for number in range(rounds):
        for length in answers:
            prompt = next(prompts)
            order = range(len(arms)) if number % 2 else reversed(range(len(arms)))
            for place in order:
                whole, one = arms[place](prompt, length)
                seconds[place][length].append(whole)
                if length == _DECODED:  # up to here nothing is retrieved anew
                    tokens[place].append(one)
    return [
        [median(own), *(median(by_length[length]) for length in answers)]
        for own, by_length in zip(tokens, seconds, strict=True)
    ]


def _memdb(bench: Bench, prompt: str, length: int) -> tuple[float, float]:
    began = time.perf_counter()
    answer = generate(prompt, bench.db, max_new_tokens=length, memories=MEMORIES)
    whole = time.perf_counter() - began
    return whole, 1e3 * (whole - answer.seconds["first_token"]) / (length - 1)


@contextmanager
def _llama(
    bench: Bench, model: str, work: Path, kind: str, threads: int, cache: bool
) -> Iterator[_Answer]:
    import xllamacpp

    file = work / f"{kind}.gguf"
    if not file.exists():
        write_gguf(Path(model) if Path(model).is_dir() else pull(model), file, kind)
    options = xllamacpp.CommonParams()
    options.model.path = str(file)
    options.n_ctx = 2048
    options.n_parallel = 1
    options.n_gpu_layers = 0
    options.verbosity = 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(options)

    def answer(prompt: str, length: int) -> tuple[float, float]:
        began = time.perf_counter()
        hits = bench.db.retrieve_batch([prompt], MEMORIES, memories=False)[0].hits
        framed = bench.writer.frame.with_text([hit.reference.content for hit in hits], prompt)
        asked = {
            "prompt": [*framed.content, *framed.tail],
            "n_predict": length,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": cache,
        }
        given: Any = server.handle_completions(asked)
        given = json.loads(given) if isinstance(given, (str, bytes)) else given
        whole = time.perf_counter() - began
        timings = given["timings"]
        if timings["predicted_n"] != length:
            raise RuntimeError(f"it answered {timings['predicted_n']} tokens of {length}")
        return whole, float(timings["predicted_per_token_ms"])

    yield answer
