"""What benchmarks/generation.py measures, one function each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from answering import Harness, Question, change

from memdb import MemDB, pack
from model_adapter import Context, LanguageModel, Stretch, Writer, generate
from model_adapter.writing.predictor import comes_with

MEMORIES = 5
CHUNK = 64
LENGTH = 128  # tokens in, tokens out: the paper's setting


class Endless(LanguageModel):
    """A model whose answers end at `max_new_tokens` only."""

    def stop_tokens(self) -> frozenset[int]:
        """None."""
        return frozenset()


@dataclass(frozen=True)
class Bench:
    """What is measured on.

    Attributes:
        db: warm, open with `model`; it keeps no decoded memories, so each retrieval loads them.
        model: the model.
        texts: whose beginnings are prompts.
        rounds: how often each is measured; medians are reported.
    """

    db: MemDB
    model: Endless
    texts: Sequence[str]
    rounds: int

    def __post_init__(self) -> None:
        self.writer.frame.stop_tokens = frozenset()  # the template's own, too

    @property
    def writer(self) -> Writer:
        """The database's."""
        writer = self.db.writer
        assert isinstance(writer, Writer)
        return writer

    def prompts(self, tokens: int) -> list[str]:
        """Texts that are so many tokens behind the memories."""
        found = []
        for text in self.texts:
            part = self.model.tokens(text)[: tokens + 8]
            while part:
                prompt = self.model.tokenizer.decode(part)
                length = len(self.writer.frame.behind_memories(prompt).content)
                if length <= tokens:
                    break
                part = part[:-1]
            if part and length == tokens:
                found.append(prompt)
        return found


def seconds_of(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# --- the first token ------------------------------------------------------------------------------


def first_token(bench: Bench) -> dict[str, float]:
    """Median seconds to the first token of a prompt of 64 tokens, by mode; retrieval included."""
    seconds: dict[str, list[float]] = {"memory": [], "rag": [], "none": []}
    prompts = bench.prompts(CHUNK)[: 2 * bench.rounds]
    for mode in seconds:  # what is done once
        generate(prompts[-1], bench.db, mode=mode, max_new_tokens=1, memories=MEMORIES)
    for prompt in prompts:
        for mode, values in seconds.items():
            answer = generate(prompt, bench.db, mode=mode, max_new_tokens=1, memories=MEMORIES)
            values.append(answer.seconds["first_token"])
    return {mode: median(values) for mode, values in seconds.items()}


# --- decoding -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Medians.

    Attributes:
        decoding: tokens/s from the first token on, with what is retrieved meanwhile.
        whole: tokens/s of the whole call: retrieving, reading 128 tokens and generating 128.
    """

    decoding: float
    whole: float


def decoding(bench: Bench, exact: Sequence[Bench], batch: int) -> dict[str, Speed]:
    """Speed with memory, without, of transformers' own `generate`, and by exact weights where those
    that read are others."""
    prompts = (bench.prompts(LENGTH) * batch)[:batch]
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        "memory": lambda: _ours(bench.db, prompts, mode="memory"),
        "none": lambda: _ours(bench.db, prompts, mode="none"),
        "transformers": lambda: _transformers(bench, prompts),
    }
    if batch == 1:
        runs["memory, prefetch"] = partial(_ours, bench.db, prompts, mode="memory", prefetch=8)
    for other in exact:
        ours = partial(_ours, other.db, prompts)
        runs["memory, exact"] = partial(ours, mode="memory")
        runs["none, exact"] = partial(ours, mode="none")
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(bench.rounds):
        # Side by side, and none always first: what else the machine does hits all.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken[name].append(runs[name]())
    return {
        name: Speed(
            batch * (LENGTH - 1) / median(total - first for total, first in values),
            batch * LENGTH / median(total for total, _ in values),
        )
        for name, values in taken.items()
    }


def _ours(db: MemDB, prompts: list[str], **options: Any) -> tuple[float, float]:
    """Seconds of the whole, and to the first token."""
    began = time.perf_counter()
    (answer, *_) = generate(
        prompts,
        db,
        max_new_tokens=LENGTH,
        memories=MEMORIES,
        retrieve_every=CHUNK,
        **options,
    )
    return time.perf_counter() - began, answer.seconds["first_token"]


def _transformers(bench: Bench, prompts: list[str]) -> tuple[float, float]:
    """The same of transformers' `generate`, without memory, with its own attention, by the exact
    weights."""
    framed = [bench.writer.frame.alone(prompt) for prompt in prompts]
    rows = [[*prompt.content, *prompt.tail] for prompt in framed]
    length = max(map(len, rows))
    device = bench.model.device
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    model = bench.model.base
    model.set_attn_implementation("sdpa")
    try:
        seconds = [
            seconds_of(
                partial(
                    model.generate,
                    ids,
                    attention_mask=mask,
                    min_new_tokens=count,
                    max_new_tokens=count,
                    do_sample=False,
                    pad_token_id=0,
                )
            )
            for count in (1, LENGTH)
        ]
    finally:
        model.set_attn_implementation("memdb")
    return seconds[1], seconds[0]


# --- retrieving -----------------------------------------------------------------------------------


def retrieving(bench: Bench) -> dict[str, float]:
    """Median seconds of one retrieval by its parts, with 64 generated tokens as the query."""
    parts: dict[str, list[float]] = {"embed": [], "search and load": [], "decode and pack": []}
    embedder, tokenizer = bench.db.embedder, bench.model.tokenizer
    for text in list(bench.texts)[: 4 * bench.rounds]:
        query = tokenizer.decode(bench.model.tokens(text)[:CHUNK])
        began = time.perf_counter()
        vector = embedder.embed([query], query=True)[0]
        embedded = time.perf_counter()
        retrieval = bench.db.retrieve(vector, MEMORIES)
        loaded = time.perf_counter()
        pack(retrieval.stored, bench.db.shape)
        ended = time.perf_counter()
        for name, value in zip(
            parts, (embedded - began, loaded - embedded, ended - loaded), strict=True
        ):
            parts[name].append(value)
    return {name: median(values) for name, values in parts.items()}


# --- writing --------------------------------------------------------------------------------------


def encoding(bench: Bench) -> dict[str, float]:
    """References/s of reading them and nothing more, and of writing their memories by selection,
    model and selection only."""
    texts = [
        piece.text.strip()
        for text in bench.texts
        for piece in bench.db.split(text)
        if piece.tokens > bench.db.shape.reference_length // 2
    ][: 8 * min(bench.rounds, 4)]
    names = ["paper", "reconstruction", *(["predicted"] if comes_with(bench.model) else [])]
    writers = {name: Writer(bench.model, selection=name) for name in names}
    batch = writers["paper"].batch
    rows = sorted((bench.model.tokens(text) for text in texts), key=len)
    ordered = sorted(texts, key=lambda text: len(bench.model.tokens(text)))
    seconds: dict[str, list[float]] = {"prefill": [], **{name: [] for name in writers}}
    for _ in range(bench.rounds):
        seconds["prefill"].append(seconds_of(lambda: _prefill(bench.model, rows, batch)))
        for name, writer in writers.items():
            seconds[name].append(seconds_of(partial(writer.write, ordered)))
    return {name: len(texts) / median(values) for name, values in seconds.items()}


@torch.no_grad()
def _prefill(model: LanguageModel, rows: list[list[int]], batch: int) -> None:
    """Plain reading of the same tokens in batches of the same size, by transformers alone."""
    model.base.set_attn_implementation("sdpa")
    try:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            length = max(map(len, part))
            ids = torch.tensor([row + [0] * (length - len(row)) for row in part])
            model.base.base_model(ids.to(model.device), use_cache=True)
    finally:
        model.base.set_attn_implementation("memdb")


# --- limits ---------------------------------------------------------------------------------------


def bandwidth(device: torch.device) -> float:
    """Bytes/s at which this machine reads memory: what decoding waits for."""
    numbers = torch.ones(64 << 20, device=device)  # 256 MiB, more than any cache

    def read() -> None:
        float(numbers.sum())

    return numbers.nbytes / min(seconds_of(read) for _ in range(7))


def weight_bytes(model: LanguageModel) -> int:
    """Bytes of exact weights that a token needs: all but the embeddings it does not look at."""
    head = model.base.get_output_embeddings().weight
    tied = head is model.base.get_input_embeddings().weight
    total = sum(weight.nbytes for weight in model.base.parameters())
    return int(total if tied else total - model.base.get_input_embeddings().weight.nbytes)


# --- quality --------------------------------------------------------------------------------------


def quality(
    exact: LanguageModel, small: LanguageModel, texts: dict[str, str], questions: list[Question]
) -> dict[str, tuple[float, float, float, float]]:
    """Answer NLL with memory and without, by exact weights and by those of 8 bits, which read the
    answer's tokens one by one, as when decoding; and the ends of its change's 95 % interval."""
    harnesses = [Harness(model, "chat", texts) for model in (exact, small)]
    writer = Writer(exact)
    shape = writer.shape
    losses: dict[str, list[tuple[float, float]]] = {"memory": [], "nothing": []}
    document, packed = "", None
    for question in questions:
        if question.document != document:
            document = question.document
            packed = pack(writer.write(harnesses[0].pieces(document)), shape)
        prompt = writer.frame.behind_memories(harnesses[0].prompt(question))
        alone = writer.frame.alone(harnesses[0].prompt(question))
        answer = harnesses[0].answer(question)
        start = len(shape.prefix) + shape.reference_length
        for name, given, tokens in (("memory", packed, prompt), ("nothing", None, alone)):
            prefix = writer.frame.prefix if given else ()
            contexts = [
                Context(model, prefix, start if given else None) for model in (exact, small)
            ]
            stretch = Stretch([*tokens.content, *tokens.tail], given)
            one, other = (_nll(context, stretch, answer) for context in contexts)
            losses[name].append((one, other))
    found = {}
    for name, pairs in losses.items():
        one, other = np.array(pairs).T
        _, low, high = change(other, one)
        found[name] = (float(one.mean()), float(other.mean()), low, high)
    return found


def _nll(context: Context, stretch: Stretch, answer: list[int]) -> float:
    (logits,) = context.read([[stretch]])
    losses = []
    for token in answer:
        losses.append(-float(logits[0].float().log_softmax(-1)[token]))
        logits = context.step(torch.tensor([token], device=logits.device))
    return float(np.mean(losses))
