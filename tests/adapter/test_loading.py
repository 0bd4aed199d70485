"""How a model is loaded: where, in which numbers, from which revision, and whose code may run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb import (
    ExplicitMemory,
    InvalidInputError,
    MemDB,
    MismatchError,
    UnsupportedModelError,
    to_float32,
)
from model_adapter import (
    LanguageModel,
    Loading,
    SentenceEmbedder,
    create_database,
    generate,
    load_embedder,
    load_model,
    open_database,
    rewrite_database,
)
from model_adapter.models import language_model
from model_adapter.models.loading import default_device
from tests.adapter.every_model import tiny_of
from tests.helpers import FACTS, tiny_model, tiny_tokenizer


def saved(folder: Path, model: Any = None) -> str:
    (model or tiny_model().model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "the dtype is one of float32, float16, bfloat16, not 'int8'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": True}, "threads must be at least 1, got True"),
        ({"device": "nowhere"}, "there is no device 'nowhere' here"),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
        ({"revision": "main"}, r"a revision \('main'\) is one of a model of a hub"),
        ({"quantization_config": {"quant_method": "none-such"}}, "cannot be loaded"),
    ],
)
def test_an_option_that_is_wrong_is_named(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path)
    with pytest.raises(InvalidInputError, match=message):
        LanguageModel.load(folder, **options)
    with pytest.raises(InvalidInputError, match=message):
        load_model(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_is_not_there_is_named() -> None:
    for load in (load_model, load_embedder, SentenceEmbedder):
        with pytest.raises(InvalidInputError, match=r"there is no device 'cuda' here.*give cpu"):
            load("smollm2-135m" if load is load_model else "all-minilm-l6-v2", device="cuda")


def test_what_is_loaded_already_has_its_options(tmp_path: Path, minilm: SentenceEmbedder) -> None:
    with pytest.raises(InvalidInputError, match="it is: device, dtype goes with a model's name"):
        create_database(
            tmp_path / "db", model=tiny_model(), embedder=minilm, device="cpu", dtype="float32"
        )
    assert not (tmp_path / "db").exists()


def test_the_gpu_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's before Apple's; on either, numbers are as they are stored."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")
    assert Loading().numbers == torch.float32
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert default_device() == torch.device("mps")
    assert Loading().numbers is None
    assert Loading(dtype="float16").numbers == torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device() == torch.device("cuda")
    assert Loading(device="cpu").numbers == torch.float32
    assert Loading(device="cpu", dtype="bfloat16").numbers == torch.bfloat16
    assert Loading(device_map="auto").place is None


def test_a_model_is_loaded_once_for_the_same_options(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    plain = load_model(folder)
    assert load_model(folder, dtype=None, threads=None) is plain
    half = load_model(folder, dtype="bfloat16")
    assert half is not plain
    assert load_model(folder, dtype="bfloat16") is half


def test_an_embedder_on_another_device_is_the_same(minilm: SentenceEmbedder) -> None:
    """`cpu:0` goes the way of a GPU: by torch."""
    assert load_embedder("all-minilm-l6-v2", device="cpu") is minilm
    there = load_embedder("all-minilm-l6-v2", device="cpu:0")
    assert there is load_embedder("all-minilm-l6-v2", device="cpu:0")
    assert there is not minilm
    assert there.fingerprint == minilm.fingerprint
    texts = [fact.text for fact in FACTS]
    np.testing.assert_allclose(there.embed(texts), minilm.embed(texts), atol=1e-4)


def test_threads_are_torchs(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    folder = saved(tmp_path)
    try:
        for threads in (before + 1, before + 2, before + 1):
            load_model(folder, threads=threads)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_trial_that_was_passed_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless what it depends on is another; and what failed fails again."""
    monkeypatch.setenv("MEMDB_CACHE", str(tmp_path / "cache"))
    folder = saved(tmp_path / "model")
    smaller = tiny_model(num_hidden_layers=2).model
    trials = []
    done = language_model.require_right
    monkeypatch.setattr(
        language_model, "require_right", lambda *given: trials.append(1) or done(*given)
    )
    for options, count in (({}, 1), ({}, 1), ({"dtype": "bfloat16"}, 2), ({}, 2)):
        LanguageModel.load(folder, **options)
        assert len(trials) == count
    saved(tmp_path / "model", smaller)
    LanguageModel.load(folder)
    assert len(trials) == 3
    refused = saved(tmp_path / "jamba", tiny_of("jamba"))
    for count in (4, 5):
        with pytest.raises(UnsupportedModelError, match="forget what stood before"):
            LanguageModel.load(refused)
        assert len(trials) == count
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEMDB_CACHE", str(tmp_path / "file"))  # no folder: nothing can be kept
    for count in (6, 7):
        LanguageModel.load(folder)
        assert len(trials) == count


# --- code of a model's own ------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_code_of_a_model_never_runs_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minilm: SentenceEmbedder
) -> None:
    marker = tmp_path / "it ran"
    folder = Path(saved(tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    for load in (
        lambda: LanguageModel.load(str(folder)),
        lambda: create_database(tmp_path / "db", model=str(folder), embedder=minilm),
    ):
        with pytest.raises(InvalidInputError, match=r"of its own.*--trust-remote-code"):
            load()
    assert not marker.exists()
    model = LanguageModel.load(str(folder), trust_remote_code=True)
    assert marker.exists()
    assert type(model.model).__name__ == "Model"
    assert model.fingerprint == tiny_model().fingerprint


# --- numbers --------------------------------------------------------------------------------------


def stored(path: Path) -> str:
    with MemDB.open(path) as database:
        return str(database.shape.dtype)


@pytest.mark.parametrize(
    ("made", "kept"),
    [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "bfloat16"),
    ],
)
def test_a_database_is_used_in_other_numbers_than_it_stores(
    made: str, kept: str, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    """The weights lie in their folder in `kept`; `made` is what the database is made with."""
    folder = saved(tmp_path / "model", tiny_model(dtype=getattr(torch, kept)).model)
    path = tmp_path / "db"
    with create_database(path, model=folder, embedder=minilm, dtype=made) as database:
        database.insert(FACTS[0].text)
        assert database.writer.model.dtype == made
    for now in (None, "float32", "bfloat16", "float16"):
        with open_database(path, dtype=now) as database:
            database.insert(FACTS[1].text, id=f"in {now}")
            writer = database.writer
            assert writer.model.dtype == (now or "float32")
            assert writer.shape.dtype == made
            answer = generate(FACTS[0].question, database, max_new_tokens=3, memories=2, cite=True)
            assert answer.sources()
    assert stored(path) == made
    assert rewrite_database(path, dtype="bfloat16").memories == 5
    assert stored(path) == "bfloat16"
    rewrite_database(path, budget=40)
    assert stored(path) == "bfloat16"


def test_memories_are_the_same_but_for_rounding(tmp_path: Path, minilm: SentenceEmbedder) -> None:
    folder = saved(tmp_path / "model")
    path = tmp_path / "db"
    with create_database(
        path, model=folder, embedder=minilm, dtype="bfloat16", codec="exact"
    ) as database:
        database.insert(FACTS[0].text, id="by bfloat16")
    with open_database(path) as database:
        database.insert(FACTS[0].text, id="by float32")
        hits = database.retrieve(embedding=minilm.embed([FACTS[0].text])[0], k=2).hits
        memories = [hit.stored.memory for hit in hits if hit.stored is not None]
        assert len(memories) == 2
        keys, values = (
            [to_float32(getattr(memory, part), "bfloat16") for memory in memories]
            for part in ("keys", "values")
        )
        whole = sum(len(memory.positions) for memory in memories) / 2
        same = [set(zip(*_places(memory), strict=True)) for memory in memories]
        assert len(same[0] & same[1]) > 0.9 * whole  # but for pairs that count as much as others
        for one, other in (keys, values):
            assert abs(np.linalg.norm(one) / np.linalg.norm(other) - 1) < 0.02


def _places(memory: ExplicitMemory) -> tuple[list[int], list[int]]:
    """Row and token of each pair."""
    rows = np.repeat(np.arange(len(memory.offsets) - 1), np.diff(memory.offsets))
    return rows.tolist(), memory.positions.tolist()


def test_other_weights_are_refused_in_any_numbers(tmp_path: Path, minilm: SentenceEmbedder) -> None:
    one, other = saved(tmp_path / "one"), saved(tmp_path / "two", tiny_model("qwen2").model)
    create_database(tmp_path / "db", model=one, embedder=minilm).close()
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(MismatchError, match="model: the database has"):
            open_database(tmp_path / "db", model=other, dtype=dtype)


def test_a_database_that_records_weights_as_they_were_held_still_opens(
    tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    """Releases before this one took the fingerprint of what float32 weights were rounded to."""
    folder = saved(tmp_path / "model")
    rounded = LanguageModel(tiny_model().model.to(torch.bfloat16), tiny_tokenizer(), folder)
    create_database(tmp_path / "old", model=rounded, embedder=minilm).close()
    create_database(tmp_path / "new", model=folder, embedder=minilm, dtype="bfloat16").close()
    recorded = set()
    for dtype in ("bfloat16", None):
        for name in ("old", "new", "old"):
            with open_database(tmp_path / name, dtype=dtype) as database:
                database.upsert(FACTS[0].text)
                database.warm()
                recorded.add(database.shape.model)
    assert len(recorded) == 2


# --- models that read more than text --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gemma3", "Gemma3ForCausalLM"),
        ("mistral3", "MistralForCausalLM"),
        ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    ],
)
def test_of_a_model_that_reads_images_the_language_model_is_loaded(
    name: str, kind: str, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    whole = tiny_of(name)
    folder = saved(tmp_path / "model", whole)
    model = LanguageModel.load(folder)
    assert type(model.model).__name__ == kind
    sees = any("vision" in key or "visual" in key for key, _ in model.model.named_parameters())
    assert sees == (name == "qwen3_vl")
    ids = torch.tensor([model.tokens(FACTS[0].text)])
    with torch.no_grad():
        expected = whole.eval()(ids).logits
        torch.testing.assert_close(model.model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    with create_database(tmp_path / "db", model=folder, embedder=minilm) as database:
        database.insert(FACTS[0].text)
        assert len(generate(FACTS[0].question, database, max_new_tokens=4).token_ids) == 4
    half = LanguageModel.load(folder, dtype="bfloat16")
    assert half.fingerprint == model.fingerprint
