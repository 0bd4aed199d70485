"""The light encoder gives what sentence-transformers gives, or leaves it to that."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from model_adapter import SentenceEmbedder
from model_adapter.models.bert_graph import BertGraph

TEXTS = [
    "a heron",
    "  the  blue heron   stands in the reeds  ",
    "",
    "heron " * 60,
    "The BLUE Heron",
    "an unknown zyx \U0001f426",
    "reeds",
]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "the", "blue", "heron", "stands", "in", "reeds"]
KINDS = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
POOLINGS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}


def saved(folder: Path, family: str, pooling: str, *, lower: bool = False) -> Path:
    """A tiny random encoder as sentence-transformers writes it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    }
    if family == "bert":
        model: Any = BertModel(BertConfig(**sizes))
    else:
        model = RobertaModel(RobertaConfig(**sizes, type_vocab_size=1, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():  # norms of 1 and 0 would hide that they are mixed up
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    write(
        folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    )
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(KINDS)
    ]
    write(folder / "modules.json", modules)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": lower})
    write(folder / "config_sentence_transformers.json", {"prompts": {}})
    modes = {f"pooling_mode_{name}": short == pooling for short, name in POOLINGS.items()}
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **modes})
    (folder / "2_Normalize").mkdir(exist_ok=True)
    return folder


def write(file: Path, value: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_vectors_and_fingerprint_are_those_of_sentence_transformers(
    tmp_path: Path, family: str, pooling: str, lower: bool
) -> None:
    folder = saved(tmp_path / "model", family, pooling, lower=lower)
    light = BertGraph.load(folder)
    assert light is not None
    theirs = SentenceTransformer(str(folder), device="cpu")
    expected = theirs.encode_document(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(light.embed(TEXTS), expected, atol=2e-5)
    one_by_one = np.concatenate([light.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(one_by_one, expected, atol=2e-5)

    embedder = SentenceEmbedder(str(folder))
    fingerprint, dimension = embedder.fingerprint, embedder.dimension
    embedder._light, embedder._model = None, theirs
    del embedder.__dict__["fingerprint"]
    assert (embedder.fingerprint, embedder.dimension) == (fingerprint, dimension)


def test_the_real_one_is_light(minilm: SentenceEmbedder) -> None:
    assert minilm._light is not None
    assert minilm.embed([]).shape == (0, 384)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("1_Pooling/config.json", {"include_prompt": False}),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}),
        ("config.json", {"hidden_act": "relu"}),
        ("config.json", {"model_type": "distilbert"}),
        ("config.json", {"num_hidden_layers": 2}),
        ("sentence_bert_config.json", {"max_seq_length": None}),
    ],
)
def test_what_is_unusual_is_left_to_sentence_transformers(
    tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    folder = saved(tmp_path / "model", "bert", "mean")
    assert BertGraph.load(folder) is not None
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert BertGraph.load(folder) is None


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "modules.json"])
def test_a_folder_that_lacks_a_file_or_is_damaged_is_left_to_it_too(
    tmp_path: Path, name: str
) -> None:
    folder = saved(tmp_path / "model", "bert", "mean")
    (folder / name).write_bytes(b"no such file")
    assert BertGraph.load(folder) is None
    (folder / name).unlink()
    assert BertGraph.load(folder) is None


def test_another_pooling_still_embeds(tmp_path: Path) -> None:
    embedder = SentenceEmbedder(str(saved(tmp_path / "model", "bert", "max")))
    assert embedder._light is None
    assert embedder.embed(["a heron"], query=True).shape == (1, 32)


def test_a_forked_child_embeds_too(minilm: SentenceEmbedder) -> None:
    """Threads do not come along into a child: there it opens a session of its own."""
    here = minilm.embed(["a heron"])
    context = multiprocessing.get_context("fork")
    there = context.Queue()
    child = context.Process(target=lambda: there.put(minilm.embed(["a heron"])))
    child.start()
    np.testing.assert_array_equal(there.get(timeout=60), here)
    child.join(60)
    assert child.exitcode == 0
