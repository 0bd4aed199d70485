"""What memories cost while decoding, and what a long prompt costs, as ratios in one process.

    python benchmarks/generation_attention.py
    python benchmarks/generation_attention.py --model qwen2.5-coder-0.5b --threads 1

- **Decoding**: a step with 5 memories, which differ from sequence to sequence, against the same
  step without; retrieval is not in it (benchmarks/generation.py has whole generations).
- **Long prompts**: one pass over a prompt in chunks of 64 tokens, each with 5 memories, against
  transformers' own pass (sdpa) over the same tokens without any, all by the exact weights, so that
  nothing but attention differs; and how much more RAM either takes while it runs. The memories
  themselves are there before.

What is compared takes turns, and figures are medians. With one thread they are of its own time on
the processor, which other programs change less than what a clock shows.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import click
import torch

from memdb import MemDBError, MemoryShape, PackedMemories, pack
from memdb.types.memory import ExplicitMemory
from model_adapter import DEFAULT_MODEL, Context, LanguageModel, Stretch, Writer

CHUNK = 64
TOGETHER = 5
#: Of the memories of a retrieval.
BIASES = (0.0, -0.5, -1.0, -1.0, -1.5)


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--tokens", default=3072, show_default=True, help="Of the long prompt.")
@click.option("--references", default=40, show_default=True)
@click.option("--steps", default=40, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Of the long prompt.")
def main(model: str, threads: int, tokens: int, references: int, steps: int, rounds: int) -> None:
    """Ratios of decoding and of a long prompt, with memories and without."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    try:
        loaded = LanguageModel.load(model)
        writer = Writer(loaded)
        texts = _texts(loaded, references)
        memories = list(writer.write(texts))
    except MemDBError as error:
        raise click.ClickException(str(error)) from error
    kept = sum(memory.pairs for memory in memories) / len(memories)
    click.echo(f"{model}, {loaded.dtype}, {threads} threads; {kept:.0f} pairs a memory")
    sets = _sets(memories, writer.shape)
    ids = (loaded.tokens(" ".join(texts)) * (1 + tokens // (100 * references)))[:tokens]
    for batch in (1, 8):
        one, other = _decoding(loaded, writer.shape, ids[:128], sets, batch, steps, clock)
        click.echo(
            f"decoding, batch {batch}: {one * 1e3:6.2f} ms a step without memories, "
            f"{other * 1e3:6.2f} with: {one / other:.3f} of the speed"
        )
    exact = loaded if loaded.is_exact else LanguageModel.load(model, exact=True)
    ways = _reading(exact, writer.shape, ids, sets)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(_taken(way, clock))
    peers = [median(column) for column in zip(*taken["transformers"], strict=True)]
    for name, values in taken.items():
        seconds, mib = (median(column) for column in zip(*values, strict=True))
        click.echo(
            f"a prompt of {len(ids)} tokens, {name:24s} {seconds:6.2f} s ({seconds / peers[0]:.3f})"
            f", RAM {mib:+5.0f} MiB ({mib / peers[1]:.2f})"
        )


def _texts(model: LanguageModel, many: int) -> list[str]:
    """References of nearly 128 tokens, of Python's documentation."""
    topics_ids = (model.tokens(topic)[:600] for topic in topics.values())
    found = [
        model.tokenizer.decode(ids[start : start + 124]).strip()
        for ids in topics_ids
        for start in range(0, len(ids) - 124, 124)
    ]
    return [text for text in found if len(model.tokens(text)) <= 128][:many]


def _sets(memories: Sequence[ExplicitMemory], shape: MemoryShape) -> list[PackedMemories]:
    return [
        pack(memories[start : start + TOGETHER], shape, BIASES)
        for start in range(0, len(memories) - TOGETHER + 1, TOGETHER)
    ]


def _decoding(
    model: LanguageModel,
    shape: MemoryShape,
    ids: list[int],
    sets: list[PackedMemories],
    batch: int,
    steps: int,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """Median seconds of a step without memories and with them."""
    start = len(shape.prefix) + shape.reference_length
    room = len(ids) + steps
    contexts = (
        Context(model, batch=batch, capacity=room),
        Context(model, shape.prefix, start, batch=batch, capacity=room),
    )
    contexts[0].read([[Stretch(ids)]] * batch)
    contexts[1].read([[Stretch(ids, sets[n % len(sets)])] for n in range(batch)])
    seconds: tuple[list[float], list[float]] = ([], [])
    tokens = torch.full((batch,), ids[-1])
    for number in range(steps):
        for which in (0, 1) if number % 2 else (1, 0):
            began = clock()
            contexts[which].step(tokens)
            seconds[which].append(clock() - began)
    return median(seconds[0][2:]), median(seconds[1][2:])


def _reading(
    model: LanguageModel, shape: MemoryShape, ids: list[int], sets: list[PackedMemories]
) -> dict[str, Callable[[], object]]:
    start = len(shape.prefix) + shape.reference_length
    stretches = [
        Stretch(ids[at : at + CHUNK], sets[at // CHUNK % len(sets)])
        for at in range(0, len(ids), CHUNK)
    ]

    def with_memories() -> object:
        return Context(model, shape.prefix, start, capacity=len(ids)).read([stretches])

    def without() -> object:
        return Context(model, capacity=len(ids)).read([[Stretch(ids)]])

    @torch.no_grad()
    def transformers() -> object:
        model.model.set_attn_implementation("sdpa")
        try:
            return model.model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        finally:
            model.model.set_attn_implementation("memdb")

    return {
        "transformers": transformers,
        "without memories": without,
        "with memories": with_memories,
    }


def _taken(call: Callable[[], object], clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and by how many MiB the process grew at most meanwhile."""
    try:
        # What was freed is given back: else it would hide what is taken.
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    except (OSError, AttributeError):
        before = float("nan")  # not on this system
    began = clock()
    result = call()
    seconds = clock() - began
    peak = _status("VmHWM")
    del result
    return seconds, (peak - before) / 1024


def _status(name: str) -> float:
    """A number of this process, in KiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


if __name__ == "__main__":
    main()
