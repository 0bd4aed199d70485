"""Reading by weights of 8 bits: close to the exact ones, whatever the model, and they are not there
unless something is written."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from memdb import InvalidInputError
from model_adapter import (
    Context,
    LanguageModel,
    SentenceEmbedder,
    Stretch,
    Writer,
    create_database,
    generate,
    load_model,
    open_database,
)
from model_adapter.attention.carried import KeyValues, State
from model_adapter.models.eight_bit import huge_pages, reading
from model_adapter.models.eight_bit.file import Source, WeightFile, write
from model_adapter.models.eight_bit.fused import FusedModel
from model_adapter.models.eight_bit.graph import ROWS, is_fast
from model_adapter.models.eight_bit.layers import EightBitEmbedding, EightBitLinear
from model_adapter.models.eight_bit.prefixes import kept_prefix
from model_adapter.models.eight_bit.rounding import BLOCK, rounded, unrounded
from model_adapter.models.eight_bit.skeleton import empty_model, sources_of
from model_adapter.models.fingerprint import weights_fingerprint
from tests.adapter.adapted import make_adapter
from tests.helpers import ARCHITECTURES, SAMPLE, tiny_model

needs_kernel = pytest.mark.skipif(not is_fast(), reason="no kernel for 8 bits on this processor")
pytestmark = needs_kernel

#: Architectures of which whole layers are one graph.
FUSED = {"llama", "mistral", "qwen2", "qwen3", "gemma3"}
EXACT = {"atol": 0, "rtol": 0}
#: What rounding changes, at most. It changes these models, of 32 numbers a token and with attention
#: that is all or nothing, ten times as much as real ones; what is computed wrongly is beyond 0.5.
NEAR = 0.15


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; what is in the real one is not touched."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MEMDB_CACHE", str(folder))
    return folder


def saved(folder: Path, architecture: str = "llama", **changes: Any) -> str:
    """A tiny model on the disk; where it lies."""
    made = tiny_model(architecture, **changes)
    randomize(made.model)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return str(folder)


def randomize(model: torch.nn.Module) -> None:
    """Norms and biases as no model is made with: those of 1 and 0 would hide their absence."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)


def read_and_step(model: LanguageModel, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt's tokens, and those of tokens that are read one by one."""
    context = Context(model, batch=batch)
    tokens = model.tokens(SAMPLE)[:60]
    read = context.read([[Stretch(tokens)]] * batch, every=True)
    steps = [context.step(torch.tensor([token] * batch)) for token in tokens[:10]]
    return torch.stack(read), torch.stack(steps)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Of what size the difference is."""
    return float((found - exact).norm() / exact.norm())


# --- close to the exact ones ----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reading_is_close_to_exact(architecture: str, tied: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", architecture, tie_word_embeddings=tied)
    exact, small = LanguageModel.load(folder, exact=True), LanguageModel.load(folder)
    assert exact.is_exact
    assert not small.is_exact
    kinds = [type(module) for module in small.model.modules()]
    assert torch.nn.Linear not in kinds
    assert torch.nn.Embedding not in kinds
    assert isinstance(small.model, FusedModel) == (architecture in FUSED)
    assert (kinds.count(EightBitLinear) > 10) == (architecture not in FUSED)
    assert small.fingerprint == exact.fingerprint
    assert small.stop_tokens() == exact.stop_tokens()
    assert [small.rope(layer) for layer in range(3)] == [exact.rope(layer) for layer in range(3)]
    for batch in (1, 3):
        for found, wanted in zip(
            read_and_step(small, batch), read_and_step(exact, batch), strict=True
        ):
            assert found.shape == wanted.shape
            assert 0 < error(found, wanted) < NEAR


def test_numbers_of_8_bits_stand_for_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 2 * BLOCK + 7, generator=generator)
    weights[1] = 0
    weights[2, 3] = 1e4
    numbers, scales = rounded(weights)
    assert numbers.shape == (5, 3, BLOCK)
    assert numbers.dtype == torch.uint8
    back = unrounded(numbers, scales, weights.shape[1])
    assert back.shape == weights.shape
    assert (back[1] == 0).all()
    steps = scales.repeat_interleave(BLOCK, 1)[:, : weights.shape[1]]
    assert ((back - weights).abs() <= steps * 0.5001).all()


def test_a_linear_layer_of_any_width(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(33, 50, generator=generator), torch.randn(33, generator=generator)
    sources = {
        "a.weight": Source((33, 50), lambda start, end: weight[start:end], True, True),
        "a.bias": Source((33,), lambda start, end: bias[start:end], False, True),
    }
    write(tmp_path / "weights", sources)
    file = WeightFile(tmp_path / "weights")
    layer = EightBitLinear(file, "a.weight", "a.bias")
    near = unrounded(*rounded(weight), 50)
    rows = torch.randn(2, ROWS + 5, 50, generator=generator)
    assert error(layer(rows), torch.nn.functional.linear(rows, near, bias)) < 0.01
    assert layer(rows[:0]).shape == (0, ROWS + 5, 33)
    embedding = EightBitEmbedding(file, "a.weight", 2.0)
    torch.testing.assert_close(embedding(torch.tensor([[4, 0]])), 2 * near[[4, 0]][None])
    assert embedding(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 50)
    assert torch.equal(file.tensor("a.bias"), bias)


# --- what is exact stays exact --------------------------------------------------------------------


def test_exact_is_the_model_as_it_was(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    exact = LanguageModel.load(folder, exact=True)
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = LanguageModel(weights, exact.tokenizer, "plain")
    for found, wanted in zip(read_and_step(exact), read_and_step(plain), strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("how", [{"dtype": torch.bfloat16}, {"device_map": {"": "cpu"}}])
def test_other_models_read_by_their_own_weights(
    how: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    model = LanguageModel.load(saved(tmp_path / "model"), **how)
    assert model.is_exact
    assert not (cache / "eight_bit").exists()


def test_memories_are_written_by_exact_weights(tmp_path: Path) -> None:
    from model_adapter import Writer

    folder = saved(tmp_path / "model")
    models = [LanguageModel.load(folder), LanguageModel.load(folder, exact=True)]
    one, other = (Writer(model, budget=60).write([SAMPLE[:200]])[0] for model in models)
    assert (one.keys == other.keys).all()
    assert (one.values == other.values).all()
    assert (one.positions == other.positions).all()


# --- exact weights are loaded when something is written -------------------------------------------


def large_floats() -> int:
    """How many numbers the tensors hold that are float32 and as large as a weight."""
    gc.collect()
    return sum(
        one.numel()
        for one in gc.get_objects()
        if isinstance(one, torch.nn.Parameter) and one.dim() > 1 and not one.is_meta
    )


def test_a_warm_database_is_read_without_exact_weights(
    tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    folder = saved(tmp_path / "model")
    with create_database(tmp_path / "db", model=folder, embedder=minilm) as db:
        db.insert(SAMPLE[:300], id="harbour")
        assert not db.writer.model.is_exact  # type: ignore[union-attr]
        assert db.writer.settings["precision"] == "exact"  # type: ignore[union-attr]
    before = large_floats()
    model = LanguageModel.load(folder)
    with open_database(tmp_path / "db", model=model, embedder=minilm) as db:
        answer = generate("Which town is it?", db, max_new_tokens=5)
        assert answer.chunks[0].retrieval.hits
        assert large_floats() == before
        db.insert("Another town is Quill.", id="another")  # something is written
        assert large_floats() > before


@pytest.mark.parametrize("architecture", ["llama", "glm", "gemma3"])
def test_a_prefix_is_read_by_exact_weights(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As memories were written behind it; computed once for all processes."""
    folder = saved(tmp_path / "model", architecture)
    exact = LanguageModel.load(folder, exact=True)
    tokens = exact.tokens("Reference: ")
    expected = exact.prefix(tokens)
    rounded = LanguageModel.load(folder)
    assert not rounded.is_exact
    assert rounded.prefix(tokens).length == len(tokens)

    def fail(*_: Any) -> None:
        raise AssertionError("the exact weights were loaded")

    again = LanguageModel.load(folder)
    monkeypatch.setattr(LanguageModel, "_load_exact", fail)
    for layer, pair in again.prefix(tokens).pairs.items():
        for one, other in zip(pair, expected.pairs[layer], strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0)
    with pytest.raises(AssertionError, match="were loaded"):
        again.prefix(tokens[:-1])
    assert again.prefix([]).length == 0


def test_what_writes_keeps_the_prefix_for_what_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model")
    writer = Writer(LanguageModel.load(folder), framing="plain")
    list(writer.write([SAMPLE[:100]]))
    again = LanguageModel.load(folder)
    monkeypatch.delattr(LanguageModel, "_load_exact")
    assert again.prefix(writer.shape.prefix).length == len(writer.shape.prefix)


def test_a_kept_prefix_has_pairs_and_states(cache: Path) -> None:
    made = KeyValues(
        {2: (torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5))},
        {
            0: State({0: torch.randn(1, 6, 3)}, {0: torch.randn(1, 2), 1: torch.randn(1, 3)}),
            2: State({}, {0: torch.randn(1, 7)}),
        },
    )
    kept_prefix(["a model", None], [5, 6, 7], lambda: made)
    found = kept_prefix(["a model", None], [5, 6, 7], KeyValues)
    torch.testing.assert_close(found.pairs[2], made.pairs[2])
    assert found.states.keys() == made.states.keys()
    for layer, state in made.states.items():
        torch.testing.assert_close(found.states[layer].conv, state.conv)
        torch.testing.assert_close(found.states[layer].recurrent, state.recurrent)
    for about in (["another", None], ["a model", "an adapter"]):
        assert kept_prefix(about, [5, 6, 7], KeyValues).length == 0
    for file in (cache / "prefixes").iterdir():
        file.write_bytes(b"damaged")
    assert kept_prefix(["a model", None], [5, 6, 7], lambda: made) is made


def test_memories_of_either_are_read_by_either(tmp_path: Path, minilm: SentenceEmbedder) -> None:
    folder = saved(tmp_path / "model")
    for made_by, read_by in ((True, False), (False, True)):
        path = tmp_path / f"db-{made_by}"
        model = LanguageModel.load(folder, exact=made_by)
        with create_database(path, model=model, embedder=minilm) as db:
            db.insert(SAMPLE[:300], id="harbour")
        with open_database(path, exact=read_by, embedder=minilm) as db:
            assert db.writer.model.is_exact == read_by  # type: ignore[union-attr]
            assert len(generate("Which town?", db, max_new_tokens=3).token_ids) == 3


def test_the_real_model_reads_by_8_bits(
    smollm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMDB_CACHE")
    small = load_model(smollm.name)
    assert not small.is_exact
    assert small.fingerprint == smollm.fingerprint
    tokens = smollm.tokens(SAMPLE)
    (exact,), (found,) = (
        Context(model).read([[Stretch(tokens)]], every=True) for model in (smollm, small)
    )
    losses = [
        torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
        for logits in (exact, found)
    ]
    assert abs(float((losses[1] - losses[0]).mean())) < 0.03
    assert float((exact.argmax(-1) == found.argmax(-1)).float().mean()) > 0.9
    # One by one it reads as it does at once, but for what sums in another order round otherwise.
    context = Context(small)
    context.read([[Stretch(tokens[:-8])]])
    steps = torch.cat([context.step(torch.tensor([token])) for token in tokens[-8:]])
    assert error(steps, found[-8:]) < NEAR


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["write", "read", "both"])
def test_what_reads_is_rounded_with_its_adapter(path: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    exact = LanguageModel.load(folder, exact=True)
    make_adapter(tmp_path / "adapter", model=exact, path=path)
    adapter = tmp_path / "adapter"
    adapted = LanguageModel.load(folder, adapter=str(adapter), exact=True)
    small, plain = LanguageModel.load(folder, adapter=str(adapter)), LanguageModel.load(folder)
    assert not small.is_exact
    assert small.fingerprint == exact.fingerprint == plain.fingerprint
    (found, _), (wanted, _), (other, _) = map(read_and_step, (small, adapted, plain))
    assert error(found, wanted) < NEAR
    assert (error(found, other) > NEAR) == (path != "write")
    for name, weight in adapted.writing.named_parameters():
        torch.testing.assert_close(small.writing.get_parameter(name), weight, **EXACT)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    other = tiny_model("llama", initializer_range=0.2)
    for path in ("write", "read"):
        make_adapter(tmp_path / path, model=other, path=path)
        with pytest.raises(InvalidInputError, match="was trained for the model"):
            LanguageModel.load(folder, adapter=str(tmp_path / path))


# --- the file -------------------------------------------------------------------------------------


def rounded_files(cache: Path) -> list[Path]:
    return sorted((cache / "eight_bit").glob("*.safetensors"))


def test_weights_are_rounded_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model")
    said: list[str] = []
    monkeypatch.setattr(reading, "_MANY", 1000)
    first = LanguageModel.load(folder, notify=said.append)
    assert len(said) == 1
    assert len(rounded_files(cache)) == 1
    monkeypatch.setattr(reading, "write", None)
    second = LanguageModel.load(folder, notify=said.append)
    assert len(said) == 1
    for one, other in zip(read_and_step(first), read_and_step(second), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_weights_that_changed_are_rounded_anew(tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path / "model")
    before = LanguageModel.load(folder)
    (old,) = rounded_files(cache)
    made = tiny_model("llama", initializer_range=0.2)
    made.model.save_pretrained(folder)
    os.utime(Path(folder) / "model.safetensors", ns=(1, 1 << 61))
    after = LanguageModel.load(folder)
    assert after.fingerprint == weights_fingerprint(made.model) != before.fingerprint
    (new,) = rounded_files(cache)
    assert new != old


def test_files_of_folders_that_are_gone_are_removed(tmp_path: Path, cache: Path) -> None:
    for name in ("one", "other"):
        LanguageModel.load(saved(tmp_path / name))
    assert len(rounded_files(cache)) == 2
    shutil.rmtree(tmp_path / "one")
    left = cache / "eight_bit" / ".making-half"
    left.mkdir()
    LanguageModel.load(saved(tmp_path / "third", "qwen2"))
    names = [file.name.partition("-")[0] for file in rounded_files(cache)]
    assert names == ["other", "third"]
    assert not left.exists()


@pytest.mark.parametrize("damage", ["cut", "emptied", "text", "other format"])
def test_a_damaged_file_is_made_anew(damage: str, tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path / "model")
    wanted = read_and_step(LanguageModel.load(folder))
    (file,) = rounded_files(cache)
    content = file.read_bytes()
    file.unlink()  # others have it mapped
    file.write_bytes(
        {
            "cut": content[:-1],
            "emptied": b"",
            "text": b"no weights at all",
            "other format": content.replace(b'"format": "3"', b'"format": "0"', 1),
        }[damage]
    )
    with pytest.raises(InvalidInputError, match="no weights of 8 bits"):
        WeightFile(file)
    for one, other in zip(read_and_step(LanguageModel.load(folder)), wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_where_nothing_can_be_kept_it_reads_as_well(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model")
    wanted = read_and_step(LanguageModel.load(folder))
    monkeypatch.setenv("MEMDB_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("no folder")
    for one, other in zip(read_and_step(LanguageModel.load(folder)), wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_the_fingerprint_is_that_of_the_exact_weights(tmp_path: Path) -> None:
    made = tiny_model("qwen2", tie_word_embeddings=True).model
    write(tmp_path / "weights", sources_of(made))
    assert WeightFile(tmp_path / "weights").fingerprint == weights_fingerprint(made)


def test_names_that_transformers_changes_are_loaded_by_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(saved(tmp_path / "model"))
    wanted = read_and_step(LanguageModel.load(str(folder)))
    weights = load_file(folder / "model.safetensors")
    # A model without its head's prefix, as some are published.
    short = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    os.utime(folder / "model.safetensors", ns=(1, 1 << 61))
    for one, other in zip(read_and_step(LanguageModel.load(str(folder))), wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_half_precision_on_the_disk_is_rounded_as_it_is(tmp_path: Path) -> None:
    made = tiny_model(dtype=torch.bfloat16)
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    small = LanguageModel.load(str(tmp_path / "model"))
    assert not small.is_exact
    assert small.dtype == "float32"
    assert small.fingerprint == weights_fingerprint(made.model)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="another system")
def test_what_is_allocated_is_found_and_put_into_huge_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    advised: list[range] = []
    advise = huge_pages._advise
    monkeypatch.setattr(
        huge_pages,
        "_advise",
        lambda start, length: (advised.append(range(start, start + length)), advise(start, length)),
    )
    old = torch.ones(16 << 20)
    with huge_pages.in_huge_pages():
        new = torch.arange(16 << 20)
    inside = new.data_ptr() + new.nbytes // 2
    assert any(inside in one for one in advised)
    assert not any(old.data_ptr() + old.nbytes // 2 in one for one in advised)
    assert all(one.start % (2 << 20) == 0 for one in advised)
    assert torch.equal(new, torch.arange(16 << 20))  # moved, not changed
    before, after = [(10, 20), (30, 40)], [(5, 25), (30, 35), (50, 60)]
    assert list(huge_pages._added(before, after)) == [(5, 10), (20, 25), (50, 60)]


# --- options, threads, errors ---------------------------------------------------------------------


def test_fast_is_accepted_and_says_that_it_does_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    with pytest.warns(DeprecationWarning, match="exact=True"):
        model = load_model(folder, fast=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(folder) is model
    assert load_model(folder, exact=True) is not model


def test_a_given_model_is_not_made_exact(tmp_path: Path, minilm: SentenceEmbedder) -> None:
    folder = saved(tmp_path / "model")
    small = LanguageModel.load(folder)
    create_database(tmp_path / "db", model=small, embedder=minilm).close()
    with pytest.raises(InvalidInputError, match="exact=True"):
        open_database(tmp_path / "db", model=small, embedder=minilm, exact=True)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_threads_do_not_meet(architecture: str, tmp_path: Path) -> None:
    model = LanguageModel.load(saved(tmp_path / "model", architecture))
    texts = [model.tokens(SAMPLE)[start : start + 40] for start in range(0, 80, 20)]

    def answer(tokens: list[int]) -> torch.Tensor:
        context = Context(model)
        (logits,) = context.read([[Stretch(tokens)]])
        found = [logits]
        for _ in range(10):
            found.append(context.step(found[-1].argmax(-1)))
        return torch.cat(found)

    wanted = [answer(tokens) for tokens in texts]
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        for _ in range(3):
            found[number] = answer(texts[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(wanted):
        torch.testing.assert_close(found[number], one, **EXACT)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_two_threads_read_the_same(tmp_path: Path, two_threads: None) -> None:
    folder = saved(tmp_path / "model", hidden_size=256, intermediate_size=512)
    two = read_and_step(LanguageModel.load(folder))
    torch.set_num_threads(1)
    for found, wanted in zip(two, read_and_step(LanguageModel.load(folder)), strict=True):
        assert error(found, wanted) < 0.01


def test_a_model_that_rounding_does_not_fit_reads_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", "phi3")

    def fail(*_: Any) -> None:
        raise TypeError("it asks for a weight")

    monkeypatch.setattr(EightBitLinear, "forward", fail)
    said: list[str] = []
    model = LanguageModel.load(folder, notify=said.append)
    assert model.is_exact
    assert "it asks for a weight" in said[-1]


def test_a_model_that_asks_for_code_or_is_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="cannot be loaded"):
        LanguageModel.load(str(tmp_path / "empty"))
    folder = Path(saved(tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match="cannot be loaded"):
        LanguageModel.load(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such"}))
    with pytest.raises(InvalidInputError, match="cannot be loaded"):
        LanguageModel.load(str(folder))


def test_an_empty_model_has_no_numbers_but_buffers() -> None:
    config = tiny_model().model.config
    empty = empty_model(config)
    assert all(weight.is_meta for weight in empty.parameters())
    assert not any(buffer.is_meta for buffer in empty.buffers())
