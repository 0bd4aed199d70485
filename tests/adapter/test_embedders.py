"""Instructions before queries and texts, and static embedders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers

from memdb import InvalidInputError, MismatchError
from model_adapter import SentenceEmbedder, create_database, open_database
from model_adapter.models.embedding_prompts import EmbeddingPrompts
from model_adapter.models.static_vectors import StaticVectors
from tests.adapter.test_bert_graph import TEXTS, WORDS, saved, write
from tests.helpers import tiny_model

#: Words that the tiny tokenizer knows.
QUERY, DOCUMENT = "the blue ", "reeds in "


def with_prompts(folder: Path, pooling: str = "mean", **said: Any) -> Path:
    saved(folder, "bert", pooling)
    write(folder / "config_sentence_transformers.json", said)
    return folder


def fingerprint_of(folder: Path) -> str:
    return SentenceEmbedder(str(folder)).fingerprint


@pytest.mark.parametrize("pooling", ["mean", "max"])  # on ONNX Runtime, by sentence-transformers
@pytest.mark.parametrize("document", ["document", "passage", "corpus"])
def test_prompts_stand_before_queries_and_before_texts(
    document: str, pooling: str, tmp_path: Path
) -> None:
    folder = with_prompts(tmp_path, pooling, prompts={"query": QUERY, document: DOCUMENT})
    embedder = SentenceEmbedder(str(folder))
    assert (embedder._light is None) is (pooling == "max")
    theirs = SentenceTransformer(str(folder), device="cpu")
    for query, prompt in ((True, QUERY), (False, DOCUMENT)):
        expected = theirs.encode(TEXTS, prompt=prompt, normalize_embeddings=True)
        np.testing.assert_allclose(embedder.embed(TEXTS, query=query), expected, atol=2e-5)
        plain = theirs.encode(TEXTS, prompt="", normalize_embeddings=True)
        assert np.abs(expected - plain).max() > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_default_prompt_stands_before_both(pooling: str, tmp_path: Path) -> None:
    said = {"prompts": {"search": QUERY}, "default_prompt_name": "search"}
    embedder = SentenceEmbedder(str(with_prompts(tmp_path, pooling, **said)))
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    expected = theirs.encode(TEXTS, normalize_embeddings=True)
    for query in (True, False):
        np.testing.assert_allclose(embedder.embed(TEXTS, query=query), expected, atol=2e-5)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_prompts_that_change_vectors_change_the_fingerprint(pooling: str, tmp_path: Path) -> None:
    plain = fingerprint_of(with_prompts(tmp_path / "1", pooling))
    saying = [
        {},
        {"prompts": {"query": "", "document": ""}},
        {"prompts": {}, "default_prompt_name": None},
    ]
    for number, said in enumerate(saying):
        assert fingerprint_of(with_prompts(tmp_path / f"a{number}", pooling, **said)) == plain
    others = [
        {"prompts": {"query": QUERY}},
        {"prompts": {"query": QUERY, "document": DOCUMENT}},
        {"prompts": {"query": QUERY, "passage": DOCUMENT}},
        {"prompts": {"search": QUERY}, "default_prompt_name": "search"},
        {"prompts": {"search": QUERY}},
    ]
    found = [
        fingerprint_of(with_prompts(tmp_path / f"b{number}", pooling, **said))
        for number, said in enumerate(others)
    ]
    assert len({plain, *found}) == len(others) + 1


def test_the_light_one_and_sentence_transformers_agree_on_the_fingerprint(tmp_path: Path) -> None:
    folder = with_prompts(tmp_path, prompts={"query": QUERY, "passage": DOCUMENT})
    embedder = SentenceEmbedder(str(folder))
    fingerprint = embedder.fingerprint
    embedder._light, embedder._model = None, SentenceTransformer(str(folder), device="cpu")
    del embedder.__dict__["fingerprint"]
    assert embedder.fingerprint == fingerprint


def test_what_was_made_before_keeps_its_fingerprint(minilm: SentenceEmbedder) -> None:
    assert minilm.fingerprint == "090676947faf0a9f"
    assert minilm._prompts == EmbeddingPrompts(own={})


@pytest.mark.parametrize(
    ("name", "query", "document"),
    [
        ("intfloat/e5-small-v2", "query: ", "passage: "),
        ("intfloat/multilingual-e5-base", "query: ", "passage: "),
        ("/models/e5-large", "query: ", "passage: "),
        ("BAAI/bge-small-en-v1.5", "Represent this sentence for searching relevant", ""),
        ("bge-base-zh", "为这个句子生成表示以用于检索相关文章：", ""),
        ("Qwen/Qwen3-Embedding-0.6B", "Instruct: Given a web search query", ""),
        ("intfloat/multilingual-e5-large-instruct", "Instruct: Given a web search query", ""),
        ("nomic-ai/nomic-embed-text-v1.5", "search_query: ", "search_document: "),
        ("google/embeddinggemma-300m", "task: search result | query: ", "title: none | text: "),
        ("Snowflake/snowflake-arctic-embed-m-v2.0", "query: ", ""),
        ("BAAI/bge-m3", "", ""),
        ("thenlper/gte-small", "", ""),
        ("sentence-transformers/all-MiniLM-L6-v2", "", ""),
        ("some/code5-small", "", ""),
        ("all-minilm-l6-v2", "", ""),
    ],
)
def test_families_that_do_not_say_it_themselves(name: str, query: str, document: str) -> None:
    for names in ((name,), ("/cache/snapshots/0a1b", name)):
        prompts = EmbeddingPrompts.of(names, {}, None)
        assert prompts.query.startswith(query)
        assert bool(prompts.query) == bool(query)
        assert prompts.document == document
    own = EmbeddingPrompts.of((name,), {"query": "mine: "}, None)
    assert (own.query, own.document) == ("mine: ", "")


def test_a_family_is_known_by_its_folder_or_its_configuration(tmp_path: Path) -> None:
    plain = with_prompts(tmp_path / "plain")
    by_folder = with_prompts(tmp_path / "e5-small-v2")
    by_config = with_prompts(tmp_path / "other")
    config = json.loads((by_config / "config.json").read_text())
    write(by_config / "config.json", {**config, "_name_or_path": "intfloat/e5-small-v2"})
    one, two = SentenceEmbedder(str(by_folder)), SentenceEmbedder(str(by_config))
    assert one.fingerprint == two.fingerprint != fingerprint_of(plain)
    found = SentenceEmbedder(str(plain))
    expected = found.embed(["query: heron"])
    np.testing.assert_allclose(one.embed(["heron"], query=True), expected, atol=1e-6)
    np.testing.assert_array_equal(two.embed(["heron"]), one.embed(["heron"]))


def test_a_database_is_opened_with_those_that_it_was_made_with(tmp_path: Path) -> None:
    folder = with_prompts(tmp_path / "one", prompts={"query": QUERY, "document": DOCUMENT})
    plain = with_prompts(tmp_path / "two")
    with create_database(tmp_path / "db", model=tiny_model(), embedder=str(folder)) as database:
        database.insert("the heron stands in the reeds")
        (hit,) = database.query("a heron").hits
    assert hit.text == "the heron stands in the reeds"
    with open_database(tmp_path / "db") as database:
        assert database.query("a heron").hits[0].score == hit.score
    with pytest.raises(MismatchError):
        open_database(tmp_path / "db", embedder=str(plain))


# --- static ones ---


def static(folder: Path, seed: int = 0) -> Path:
    model2vec = pytest.importorskip("model2vec")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.random.default_rng(seed).standard_normal((len(WORDS), 16)).astype(np.float32)
    model2vec.StaticModel(vectors, tokenizer, normalize=True).save_pretrained(folder)
    return folder


def test_a_static_embedder(tmp_path: Path) -> None:
    embedder = SentenceEmbedder(str(static(tmp_path / "one")))
    assert embedder.dimension == 16
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), 16)
    assert vectors.dtype == np.float32
    from model2vec import StaticModel

    theirs = StaticModel.from_pretrained(str(tmp_path / "one"), normalize=True).encode(TEXTS)
    np.testing.assert_allclose(vectors, theirs, atol=1e-6)
    np.testing.assert_array_equal(embedder.embed(TEXTS, query=True), vectors)
    assert embedder.embed([]).shape == (0, 16)
    again = SentenceEmbedder(str(static(tmp_path / "again")))
    assert again.fingerprint == embedder.fingerprint
    other = SentenceEmbedder(str(static(tmp_path / "other", seed=1)))
    assert other.fingerprint != embedder.fingerprint
    with create_database(
        tmp_path / "db", model=tiny_model(), embedder=str(tmp_path / "one")
    ) as database:
        database.insert("the heron stands in the reeds")
    with open_database(tmp_path / "db") as database:
        assert len(database.query("blue heron").hits) == 1


def test_without_model2vec_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "config.json", {"model_type": "model2vec"})
    monkeypatch.setitem(sys.modules, "model2vec", None)
    with pytest.raises(InvalidInputError, match=r"is a static one, .*explicit-memdb\[static\]"):
        SentenceEmbedder(str(tmp_path))


@pytest.mark.parametrize("kind", ["model2vec", "bert", None])
def test_which_are_static(kind: str | None, tmp_path: Path) -> None:
    folder = static(tmp_path / "one")
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config if kind is None else {**config, "model_type": kind})
    assert (StaticVectors.load(str(folder)) is not None) is (kind != "bert")
    assert StaticVectors.load(str(saved(tmp_path / "two", "bert", "mean"))) is None
    assert StaticVectors.load("nobody/has-this") is None


def test_a_damaged_static_embedder_is_named(tmp_path: Path) -> None:
    (static(tmp_path / "one") / "model.safetensors").write_bytes(b"no such file")
    with pytest.raises(InvalidInputError, match=r"the embedder '.*one' cannot be loaded: "):
        SentenceEmbedder(str(tmp_path / "one"))
