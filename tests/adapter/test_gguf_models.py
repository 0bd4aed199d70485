"""A GGUF file is a model: read as transformers reads it, without a copy of its weights."""

from __future__ import annotations

import gc
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM

from memdb import InvalidInputError, MismatchError
from model_adapter import (
    LanguageModel,
    SentenceEmbedder,
    create_database,
    generate,
    load_model,
    open_database,
)
from model_adapter.gguf import converting
from model_adapter.gguf.file import GGUFFile
from model_adapter.gguf.weights import GGUFWeights
from model_adapter.models.eight_bit import file as eight_bit
from model_adapter.models.eight_bit.skeleton import empty_model, sources_in
from model_adapter.models.fingerprint import weights_fingerprint
from tests.gguf_files import ARCHITECTURES, Q8, mixed, random_model, write_gguf

KINDS = gguf.GGMLQuantizationType
TEXT = "The harbour of Veldmoor is old."


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMDB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def by_transformers(file: Path, config: Any = None) -> Any:
    given = {} if config is None else {"config": config}
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **given
    )


def same_weights(one: Any, other: Any) -> bool:
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(
        torch.equal(weight, others[name]) for name, weight in weights.items()
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_weights_are_those_that_transformers_reads(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    made = random_model(architecture, tie_word_embeddings=tied)
    file = tmp_path / "model.gguf"
    write_gguf(file, made, mixed)
    # It does not ask a file of Qwen 3 for the length of its keys.
    expected = by_transformers(file, made.config if "qwen3" in architecture else None)
    read = LanguageModel.load(str(file))
    assert not read.is_exact
    assert read.fingerprint == weights_fingerprint(expected)
    assert read.fingerprint != made.fingerprint  # some weights lost precision
    assert same_weights(read.base, expected)
    exact = LanguageModel.load(str(file), exact=True)
    assert exact.is_exact
    assert same_weights(exact.model, expected)
    tied = tied or architecture == "gemma2"  # which is never otherwise
    assert exact.config.tie_word_embeddings is tied
    assert (exact.model.lm_head.weight is exact.model.model.embed_tokens.weight) is tied
    half = LanguageModel.load(str(file), dtype="bfloat16")
    assert half.dtype == "bfloat16"
    assert half.fingerprint == read.fingerprint
    assert same_weights(half.model, expected.to(torch.bfloat16))


def test_a_file_in_full_precision_gives_the_model_back(tmp_path: Path) -> None:
    made = random_model("qwen2")
    write_gguf(tmp_path / "model.gguf", made)
    read = LanguageModel.load(str(tmp_path / "model.gguf"))
    assert read.fingerprint == made.fingerprint
    assert read.stop_tokens() == made.stop_tokens() == {2}
    text = "The lighthouse <|im_end|> shows them the way."
    assert read.tokens(text) == made.tokens(text)
    assert read.tokens(text, special=True) == made.tokens(text, special=True)
    message = [{"role": "user", "content": "Where is the harbour?"}]
    prompts = [m.tokenizer.apply_chat_template(message, tokenize=False) for m in (read, made)]
    assert prompts[0] == prompts[1]


def kinds_that(
    take: Callable[[gguf.GGMLQuantizationType], object],
) -> list[gguf.GGMLQuantizationType]:
    """Those kinds of quantization that gguf can do something with."""
    found = []
    for kind in KINDS:
        try:
            take(kind)
        except (NotImplementedError, KeyError):
            continue
        found.append(kind)
    return found


def writes_a_row(kind: gguf.GGMLQuantizationType) -> None:
    quantize(np.zeros((1, 256), np.float32), kind)


def reads_a_row(kind: gguf.GGMLQuantizationType) -> None:
    dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)


@pytest.mark.parametrize("kind", kinds_that(writes_a_row), ids=lambda kind: kind.name)
def test_each_quantization_that_can_be_written_is_read(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    made = random_model("llama", **wide, vocab_size=400)
    file = tmp_path / "model.gguf"
    write_gguf(file, made, lambda _: kind)
    expected = by_transformers(file)
    read = LanguageModel.load(str(file))
    assert read.fingerprint == weights_fingerprint(expected)
    assert same_weights(read.base, expected)


@pytest.mark.parametrize("kind", kinds_that(reads_a_row), ids=lambda kind: kind.name)
def test_some_rows_are_what_they_are_in_the_whole(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    """K-quants, too, which gguf reads and does not write: of random bytes."""
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    width = 512 // numbers * size
    stored = np.random.default_rng(0).integers(0, 256, (37, width), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("some", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GGUFFile.open(tmp_path / "one.gguf").tensors["some"]
    with np.errstate(all="ignore"):
        whole = dequantize(stored, kind)
        assert tensor.shape == whole.shape == (37, 512)
        for start, end in ((0, 37), (0, 1), (5, 23), (36, 37)):
            rows = tensor.rows(start, end)
            assert rows.dtype == np.float32
            np.testing.assert_array_equal(rows, whole[start:end])


def test_rows_that_the_file_has_in_another_order(tmp_path: Path) -> None:
    """Llama's queries and keys: any rows are found, not only whole heads."""
    made = random_model("llama")
    write_gguf(tmp_path / "model.gguf", made)
    weights = GGUFWeights([tmp_path / "model.gguf"], made.model)
    for name, weight in made.model.named_parameters():
        for start, end in ((0, len(weight)), (3, 5), (len(weight) - 1, len(weight))):
            rows = weights.rows(name, start, end)
            np.testing.assert_array_equal(rows, weight.detach().numpy()[start:end])


def test_a_file_a_folder_and_parts(tmp_path: Path) -> None:
    made = random_model("llama")
    (tmp_path / "folder").mkdir()
    write_gguf(tmp_path / "folder" / "tiny.gguf", made)
    (tmp_path / "folder" / "mmproj-tiny.gguf").write_bytes(b"eyes")
    assert LanguageModel.load(str(tmp_path / "folder")).fingerprint == made.fingerprint
    (tmp_path / "parts").mkdir()
    write_gguf(tmp_path / "parts" / "tiny.gguf", made, parts=3)
    parts = sorted((tmp_path / "parts").iterdir())
    assert [part.name for part in parts] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for name in (tmp_path / "parts", parts[0], parts[2]):
        read = LanguageModel.load(str(name))
        assert read.fingerprint == made.fingerprint
        assert not read.config.tie_word_embeddings  # the head is in another part than the first
    parts[1].unlink()
    with pytest.raises(InvalidInputError, match=r"'.*00002-of-00003.gguf', one of the 3 parts"):
        LanguageModel.load(str(parts[0]))


def test_a_folder_of_several_models_asks_which(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_gguf(tmp_path / f"{name}.gguf", random_model("llama"))
    with pytest.raises(InvalidInputError, match=r"several GGUF models: .*one\.gguf' or '.*two\.gg"):
        LanguageModel.load(str(tmp_path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"there is no GGUF file '.*none\.gguf'$"):
        LanguageModel.load(str(tmp_path / "none.gguf"))
    write_gguf(tmp_path / "model.gguf", random_model("llama"))
    with pytest.raises(InvalidInputError, match="a revision"):
        LanguageModel.load(str(tmp_path / "model.gguf"), revision="main")


def test_a_folder_with_its_own_configuration_and_a_gguf_file(tmp_path: Path, cache: Path) -> None:
    """As the catalogue keeps its models."""
    made = random_model("llama")
    write_gguf(tmp_path / "model.gguf", made)
    converting.convert([tmp_path / "model.gguf"], tmp_path, "tiny")
    read = LanguageModel.load(str(tmp_path))
    assert read.fingerprint == made.fingerprint
    assert same_weights(read.base, made.model)
    assert not (cache / "gguf").exists()


def test_nothing_is_converted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, random_model("llama"))
    said: list[str] = []
    first = LanguageModel.load(str(file), notify=said.append)
    assert [line for line in said if "model.gguf: reading its tokenizer" in line]
    with monkeypatch.context() as patched:
        patched.setattr(converting, "convert", None)  # calling it would fail
        assert LanguageModel.load(str(file)).fingerprint == first.fingerprint
    other = random_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    with torch.no_grad():
        other.model.lm_head.weight.mul_(2)
    write_gguf(file, other)  # another file in its place
    again = load_model(str(file))
    assert again.fingerprint == other.fingerprint != first.fingerprint
    assert again.config.rope_parameters["rope_theta"] == 500


def test_no_copy_of_four_bytes_a_weight(tmp_path: Path, cache: Path) -> None:
    larger = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1024}
    made = random_model("llama", **larger, num_hidden_layers=6)
    size = 4 * sum(weight.numel() for weight in made.model.parameters())
    assert size > 24e6
    file = tmp_path / "model.gguf"
    write_gguf(file, made, lambda _: Q8)
    read = LanguageModel.load(str(file))
    _ = read.base
    kept = {path: path.stat().st_size for path in cache.rglob("*") if path.is_file()}
    assert sum(kept.values()) < size / 2
    assert not [path for path in kept if path.suffix == ".bin"]
    folder = next(path for path in (cache / "gguf").iterdir() if path.is_dir())
    empty = empty_model(AutoConfig.from_pretrained(folder))
    gc.collect()
    tracemalloc.start()  # knows of numpy's arrays, which the weights are until they are rounded
    try:
        sources = sources_in(folder, empty)
        assert sources is not None
        eight_bit.write(tmp_path / "rounded", sources)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 4


def test_a_database_records_the_file(
    tmp_path: Path, minilm: SentenceEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, random_model("llama"), mixed)
    with create_database(tmp_path / "db", model=str(file), embedder=minilm) as database:
        database.insert(TEXT)
        shape = database.shape
        assert database.settings["model"]["name"] == str(file)
    with open_database(tmp_path / "db") as database:
        database.insert("The lighthouse shows them the way.")
        assert database.writer.shape == database.shape == shape
        assert generate("Where?", database, max_new_tokens=3, memories=2, cite=True).sources()
    monkeypatch.chdir(tmp_path)
    with open_database("db", model="model.gguf") as database:
        assert database.writer.shape == shape
    write_gguf(tmp_path / "other.gguf", random_model("llama"), lambda _: Q8)
    with pytest.raises(MismatchError):
        open_database(tmp_path / "db", model=str(tmp_path / "other.gguf"))


# --- what stretches positions ---


@pytest.mark.parametrize(
    "stretched",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda stretched: stretched["rope_type"],
)
def test_stretched_positions(stretched: dict[str, Any], tmp_path: Path) -> None:
    rope = {"rope_theta": 500000.0, **stretched}
    made = random_model("llama", rope_parameters=rope, head_dim=64)

    def more(writer: gguf.GGUFWriter) -> None:
        if stretched["rope_type"] == "llama3":
            plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
            factors = plain / made.model.model.rotary_emb.inv_freq
            assert factors.unique().numel() > 3
            writer.add_tensor("rope_freqs.weight", factors.numpy().astype(np.float32))
            return
        writer.add_rope_scaling_type(gguf.RopeScalingType(stretched["rope_type"]))
        writer.add_rope_scaling_factor(stretched["factor"])
        if original := stretched.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)

    write_gguf(tmp_path / "model.gguf", made, more=more)
    read = LanguageModel.load(str(tmp_path / "model.gguf"), exact=True)
    assert read.config.rope_parameters == rope
    tokens = torch.tensor([made.tokens(TEXT) * 9])
    with torch.no_grad():
        expected = made.model(tokens).logits
        torch.testing.assert_close(read.model(tokens).logits, expected)
        rope["rope_type"] = "default"
    write_gguf(tmp_path / "plain.gguf", made)
    plain = LanguageModel.load(str(tmp_path / "plain.gguf"), exact=True)
    with torch.no_grad():
        assert not torch.allclose(plain.model(tokens).logits, expected)


def test_positions_that_are_stretched_in_an_unknown_way_are_refused(tmp_path: Path) -> None:
    def factors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 9], np.float32))

    def kind(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "spiral")
        writer.add_rope_scaling_factor(2.0)

    for number, (more, why) in enumerate(((factors, "factors of its own"), (kind, "'spiral'"))):
        file = tmp_path / f"{number}.gguf"
        write_gguf(file, random_model("llama"), more=more)
        with pytest.raises(InvalidInputError, match=f"{why}.*Hugging Face folder"):
            LanguageModel.load(str(file))


# --- what cannot be read ---


def cut_short(content: bytes) -> bytes:
    return content[:-5000]


def cut_in_its_head(content: bytes) -> bytes:
    return content[:3000]


def of_another_kind(content: bytes) -> bytes:
    return b"PK" + content[2:]


def empty(content: bytes) -> bytes:
    return b""


def of_the_first_version(content: bytes) -> bytes:
    return content[:4] + struct.pack("<I", 1) + content[8:]


def big_endian(content: bytes) -> bytes:
    return content[:4] + struct.pack(">I", 3) + content[8:]


def of_an_unknown_quantization(content: bytes) -> bytes:
    place = content.index(b"blk.1.ffn_down.weight") + len("blk.1.ffn_down.weight") + 4 + 2 * 8
    return content[:place] + struct.pack("<I", 999) + content[place + 4 :]


def of_a_quantization_that_is_not_read(content: bytes) -> bytes:
    place = content.index(b"blk.1.ffn_down.weight") + len("blk.1.ffn_down.weight") + 4 + 2 * 8
    return content[:place] + struct.pack("<I", KINDS.Q8_K) + content[place + 4 :]


def of_an_unknown_architecture(content: bytes) -> bytes:
    return content.replace(b"llama", b"lemma")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_short, r"is cut short: it has \d+ bytes, and its tensor \S+ ends at \d+"),
        (cut_in_its_head, "the head of .* is damaged or cut short"),
        (of_another_kind, "is no GGUF file: it begins with b'PKUF'"),
        (empty, "is no GGUF file"),
        (of_the_first_version, "is of version 1; versions 2 and 3"),
        (big_endian, "is big-endian"),
        (of_an_unknown_quantization, "blk.1.ffn_down.weight of .* as kind 999, .* Q4_K_M"),
        (of_a_quantization_that_is_not_read, "blk.1.ffn_down.weight of .* as Q8_K|damaged"),
        (of_an_unknown_architecture, "architecture 'lemma'.* cannot be read: .*lemma.*Hugging"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(
    damage: Callable[[bytes], bytes], said: str, tmp_path: Path, cache: Path
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, random_model("llama"))
    file.write_bytes(damage(file.read_bytes()))
    for name in (file, tmp_path):
        with pytest.raises(InvalidInputError, match=said):
            LanguageModel.load(str(name))
    assert not list(cache.rglob("*.json"))
    assert not list(cache.rglob("*.safetensors"))


def test_weights_that_are_not_in_the_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, random_model("llama"), without="blk.1.ffn_up.weight")
    with pytest.raises(InvalidInputError, match=r"lacks 1 of .* model\.layers\.1\.mlp\.up_proj"):
        LanguageModel.load(str(file))


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    made = random_model("llama")
    made.model.model.norm.weight = torch.nn.Parameter(torch.ones(64))
    write_gguf(tmp_path / "model.gguf", made)
    with pytest.raises(InvalidInputError, match=r"output_norm\.weight of .* the shape \(64,\), wh"):
        LanguageModel.load(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("place", ["tokenizer", "rounding"])
def test_an_interruption_leaves_nothing_and_the_next_call_does_it(
    place: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    made = random_model("llama")
    write_gguf(file, made)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if place == "tokenizer":
            patched.setattr(converting.AutoTokenizer, "from_pretrained", interrupted)
        else:
            patched.setattr(eight_bit, "rounded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            LanguageModel.load(str(file))
    assert not list(cache.rglob("*.safetensors"))
    assert not [path for path in cache.rglob(".*") if path.is_dir()]
    assert bool(list(cache.rglob("config.json"))) is (place == "rounding")
    assert LanguageModel.load(str(file)).fingerprint == made.fingerprint


def test_what_is_of_files_that_are_gone_is_removed(tmp_path: Path, cache: Path) -> None:
    for name in ("one", "two"):
        write_gguf(tmp_path / f"{name}.gguf", random_model("llama"))
    LanguageModel.load(str(tmp_path / "one.gguf"))
    (kept,) = (cache / "gguf").glob("one-*")
    assert json.loads((kept / "gguf.json").read_text())["files"][0]["path"].endswith("one.gguf")
    (tmp_path / "one.gguf").unlink()
    LanguageModel.load(str(tmp_path / "two.gguf"))
    assert not kept.exists()
