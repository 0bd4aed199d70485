"""Every decoder of the installed transformers, built tiny and random: what is accepted is right,
and the rest is refused with a reason. `docs/models.md` lists what comes out.

After an update of transformers: `python -m tests.adapter.test_every_model` writes the lists anew.
"""

from __future__ import annotations

import gc
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import __version__

from memdb import CODECS, PackedMemories, UnsupportedModelError, pack
from memdb.codecs import decode_memory, encode_memory
from model_adapter import Context, LanguageModel, Stretch, Writer
from tests.adapter.every_model import NOT_BUILT, names, tiny_of
from tests.helpers import SAMPLE, tiny_tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- lists: begin -->", "<!-- lists: end -->"

#: A kind of each, for the tests that are run every day.
SOME = {
    "deepseek_v3": "all",  # latent attention, values shorter than keys, experts
    "gemma3": "all",  # with a vision tower
    "gemma3n_text": "all",  # layers that read the keys of others
    "gpt_oss": "all",  # attention sinks
    "llama4_text": "all",  # chunks
    "mimo_v2_flash": "some",  # sinks, and layers of two shapes
    "qwen3_5": "some",  # a hybrid
    "qwen3_vl": "all",  # positions in three dimensions; no language model of its own class
    "stablelm": "all",  # layers that keep keywords to themselves
    "bart": "refused",
    "bert": "refused",
    "deepseek_v32": "refused",
    "diffllama": "refused",
    "hrm_text": "refused",
    "jamba": "refused",
    "zamba2": "refused",
}


def outcome(name: str) -> tuple[str, str]:
    """`all`, `some` (with why it is not all) or `refused` (with the reason)."""
    made = tiny_of(name)
    try:
        model = LanguageModel(made, tiny_tokenizer(), f"tiny-{name}")
    except UnsupportedModelError as error:
        reason = re.sub(r"^the model '.*?' \(\w+\) ", "", str(error))
        reason = re.sub(r"^\w+ (?=uses|has)", "", reason)  # a class in it
        reason = re.sub(r" \([\d.]+ apart\)$|(?<=: ).*(?<!before)$", "", reason)
        assert reason
        return "refused", reason.rstrip(": ")
    check(model)
    if model.reads_whole_memories:
        return "all", ""
    state = model.new_cache(0).has_state
    return "some", "the others carry a state on" if state else "the others are of another shape"


def plain_logits(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    """What transformers' own attention computes."""
    model.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model.model(torch.tensor([tokens])).logits[0]
    finally:
        model.model.set_attn_implementation("memdb")


def check(model: LanguageModel) -> None:
    """Write whole references; read them side by side with what fills up, and step by step."""
    rows = len(model.memory_layers) * model.kv_heads
    writer = Writer(model, framing="plain", budget=rows * 128)
    shape = writer.shape
    tokens = model.tokens(SAMPLE * 3)[:128]
    text = model.tokenizer.decode(tokens)
    reference = model.tokens(text)
    memories = writer.write([text, SAMPLE[:60]])
    assert memories[0].pairs == rows * len(reference)

    def packed(number: int) -> PackedMemories:
        stored = encode_memory(memories[number], shape, CODECS["exact"])
        return pack([decode_memory(stored, shape, CODECS)], shape)

    start = len(shape.prefix) + len(reference)
    said = model.tokens("\n\nQuestion: who keeps the lighthouse?")
    parts = [Stretch(said[:-3], packed(0)), Stretch(said[:4], packed(1))]

    def read(chosen: list[int]) -> list[torch.Tensor]:
        context = Context(model, shape.prefix, start, batch=len(chosen), windows=True)
        got = context.read([[parts[row]] for row in chosen], every=True)
        for at in (-3, -2, -1):
            step = context.step(torch.tensor([said[at]] * len(chosen)))
            got = [torch.cat([old, new[None]]) for old, new in zip(got, step, strict=True)]
        return got

    beside, alone = read([0, 1]), [read([0])[0], read([1])[0]]
    for one, other in zip(beside, alone, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=5e-4, rtol=1e-3)
    if model.reads_whole_memories:
        context = Context(model, shape.prefix, start, windows=True)
        (whole,) = context.read([[Stretch(said, parts[0].memories)]], every=True)
        expected = plain_logits(model, [*shape.prefix, *reference, *said])[-len(said) :]
        apart = float((whole - expected).abs().max())
        assert apart < 1e-4, f"{apart} apart"


@pytest.mark.parametrize("name", SOME)
def test_some_of_every_kind(name: str) -> None:
    found, why = outcome(name)
    assert found == SOME[name]
    assert (name, found, why) in [(name, *listed) for listed in listed_outcomes(name)]


@cache
def _sections() -> list[tuple[str, str, set[str]]]:
    """Of the lists in the docs: what is said, why, and of which types."""
    lists = DOCS.read_text().split(BEGIN)[1].split(END)[0]
    found, kind = [], ""
    for line in lists.splitlines():
        if line.startswith("**"):
            kind = {"All": "all", "Som": "some", "Ref": "refused"}[line[2:5]]
        elif line.startswith("- "):
            why, _, types = line[2:].rpartition(": ")
            found.append((kind, why, set(re.findall(r"`([^`]+)`", types))))
    return found


def listed_outcomes(name: str) -> list[tuple[str, str]]:
    return [(kind, why) for kind, why, types in _sections() if name in types]


@pytest.mark.slow
def test_the_docs_list_what_every_model_comes_to() -> None:
    assert DOCS.read_text() == rewritten()


def rewritten() -> str:
    """The page with lists made anew."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    crashed = []
    for name in names():
        try:
            kind, why = outcome(name)
        except Exception as error:  # all of them are told of at the end
            crashed.append(f"{name}: {error!r:.300}")
        else:
            found[kind][why].append(name)
        gc.collect()
    assert not crashed, "\n".join(crashed)
    before, rest = DOCS.read_text().split(BEGIN)
    after = rest.split(END)[1]
    counts = {kind: sum(map(len, found[kind].values())) for kind in ("all", "some", "refused")}
    lines = [BEGIN, f"Of transformers {__version__}, {sum(counts.values())} types:", ""]
    for kind, head in (
        ("all", "All layers have memories, and a text as memory equals it in the prompt"),
        ("some", "Some layers have memories, and the others lack what the text would have left"),
        ("refused", "Refused"),
    ):
        lines += [f"**{head}** ({counts[kind]}):", ""]
        for why, types in sorted(found[kind].items()):
            listed = ", ".join(f"`{name}`" for name in types)
            lines.append(f"- {why}: {listed}" if why else f"- {listed}")
        lines.append("")
    lines.append(f"Not tried ({len(NOT_BUILT)}): " + ", ".join(f"`{n}`" for n in sorted(NOT_BUILT)))
    return before + "\n".join(lines) + "\n" + END + after


if __name__ == "__main__":
    DOCS.write_text(rewritten())
