"""GGUF files, from their wheels to a folder that transformers loads."""

from __future__ import annotations

import json
import tracemalloc
import zipfile
from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from transformers import AutoModelForCausalLM

from memdb import StorageError
from model_adapter import LanguageModel, catalog, pull
from model_adapter.catalog import CatalogEntry, gguf_file
from model_adapter.catalog.gguf_file import convert_gguf
from model_adapter.catalog.wheels import Wheel
from model_adapter.models.fingerprint import weights_fingerprint
from tests.helpers import tiny_model

F32, Q5, Q8 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q5_0", "Q8_0"))
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
NAME = "tiny-parts"


def random_model(architecture: str, **changes: object) -> LanguageModel:
    """Qwen2's has biases, which are not zero, and its head is its embedding."""
    made = tiny_model(architecture, tie_word_embeddings=architecture == "qwen2", **changes)
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    return made


def write_gguf(
    file: Path,
    made: LanguageModel,
    kind: Callable[[str], gguf.GGMLQuantizationType] = lambda _: F32,
    without: str = "",
) -> None:
    """As llama.cpp writes a model: its names, and for Llama its order of the rows of q and k."""
    architecture, config = made.config.model_type, made.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokenizer = json.loads(made.tokenizer_json)
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    control = {token["content"] for token in tokenizer["added_tokens"]}
    types = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([types.CONTROL if t in control else types.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(made.tokenizer.chat_template)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    for name, weight in made.model.named_parameters():
        stem, _, ending = name.rpartition(".")
        known = f"{names.get_name(stem)}.{ending}"
        values = weight.detach().numpy()
        if architecture == "llama" and (".attn_q." in known or ".attn_k." in known):
            rows, columns = values.shape
            heads = rows // config.head_dim
            values = values.reshape(heads, 2, config.head_dim // 2, columns)
            values = np.ascontiguousarray(values.swapaxes(1, 2).reshape(rows, columns))
        if known != without:
            stored = kind(known) if values.ndim == 2 else F32
            writer.add_tensor(known, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mixed(name: str) -> gguf.GGMLQuantizationType:
    return Q5 if "token_embd" in name else Q8 if "ffn_down" in name or "attn_k" in name else F32


def published(
    content: bytes, parts: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> CatalogEntry:
    """A model of the catalogue in wheels that pip finds in a folder, and nowhere else."""
    folder.mkdir()
    made = []
    cuts = [len(content) * n // parts for n in range(parts + 1)]
    for number, (begin, end) in enumerate(pairwise(cuts), 1):
        project = f"tiny_parts_{number}"
        file = folder / f"{project}-1.0-py3-none-any.whl"
        info, member = f"{project}-1.0.dist-info", f"{project}/data/part.bin"
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr(member, content[begin:end])
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
        made.append(Wheel(f"{project}==1.0", sha256(file.read_bytes()).hexdigest(), member))
    entry = CatalogEntry(NAME, "language", tuple(made), 1, "none")
    monkeypatch.setitem(catalog.CATALOG, NAME, entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MEMDB_CACHE", str(folder.parent / "cache"))
    return entry


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_weights_are_those_that_transformers_reads(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "SHARD", "20KB")
    monkeypatch.setattr(gguf_file, "ROWS", 7)  # which divides no tensor's rows
    made = random_model(architecture)
    write_gguf(tmp_path / "model.gguf", made, mixed)
    steps: list[tuple[int, int]] = []
    convert_gguf(
        tmp_path / "model.gguf", tmp_path / "made", "tiny", lambda *step: steps.append(step)
    )
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert got.dtype == torch.float32
    weights, others = got.state_dict(), expected.state_dict()
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=0)
    assert weights_fingerprint(got) == weights_fingerprint(expected)
    assert weights_fingerprint(got) != made.fingerprint  # some of them lost precision
    tied = architecture == "qwen2"
    assert got.config.tie_word_embeddings is tied
    assert (got.lm_head.weight is got.model.embed_tokens.weight) is tied
    stored = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    files = stored["weight_map"].values()
    assert ("lm_head.weight" in stored["weight_map"]) is not tied
    assert steps[-1] == (len(stored["weight_map"]), len(stored["weight_map"]))
    assert len(steps) == len(set(files)) > 5
    assert stored["metadata"]["total_size"] == 4 * sum(p.numel() for p in got.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_in_full_precision_gives_the_model_back(architecture: str, tmp_path: Path) -> None:
    made = random_model(architecture)
    write_gguf(tmp_path / "model.gguf", made)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "made", "tiny")
    loaded = LanguageModel.load(str(tmp_path / "made"), exact=True)
    assert loaded.fingerprint == made.fingerprint
    tokens = torch.tensor([made.tokens("The harbour of Veldmoor is old.")])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens).logits, made.model(tokens).logits)


def test_a_model_in_the_parts_of_several_wheels_is_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = random_model("qwen2")
    write_gguf(tmp_path / "model.gguf", made)
    published((tmp_path / "model.gguf").read_bytes(), 3, tmp_path / "wheels", monkeypatch)
    said: list[str] = []
    loaded = LanguageModel.load(NAME, notify=said.append)
    assert loaded.fingerprint == made.fingerprint
    assert loaded.stop_tokens() == made.stop_tokens() == {2}
    text = "The lighthouse <|im_end|> shows them the way."
    assert loaded.tokens(text) == made.tokens(text)
    assert loaded.tokens(text, special=True) == made.tokens(text, special=True)
    message = [{"role": "user", "content": "Where is the harbour?"}]
    prompts = [m.tokenizer.apply_chat_template(message, tokenize=False) for m in (loaded, made)]
    assert prompts[0] == prompts[1]
    count = len(list(made.model.parameters()))
    assert f"{NAME}: {count} of {count} tensors converted" in said


def test_a_conversion_holds_a_shard_and_not_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1024}
    made = random_model("llama", **larger, num_hidden_layers=6)
    size = 4 * sum(weight.numel() for weight in made.model.parameters())
    write_gguf(tmp_path / "model.gguf", made, lambda _: Q8)
    monkeypatch.setattr(gguf_file, "SHARD", "1MB")
    tracemalloc.start()  # knows of numpy's arrays, which the weights are until they are written
    try:
        convert_gguf(tmp_path / "model.gguf", tmp_path / "made", "tiny")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 24e6
    assert peak < 6e6


def cut_short(content: bytes) -> bytes:
    return content[:-5000]


def cut_in_its_head(content: bytes) -> bytes:
    return content[:3000]


def of_another_kind(content: bytes) -> bytes:
    return b"PK" + content[2:]


@pytest.mark.parametrize("damage", [cut_short, cut_in_its_head, of_another_kind])
def test_a_damaged_file_is_named_and_leaves_nothing(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "model.gguf", random_model("llama"))
    content = damage((tmp_path / "model.gguf").read_bytes())
    published(content, 1, tmp_path / "wheels", monkeypatch)
    with pytest.raises(StorageError, match=f"GGUF file of '{NAME}' cannot be converted: .*kept"):
        pull(NAME)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".{NAME}.lock"]


def test_weights_that_are_not_in_the_file_are_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", random_model("llama"), without="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"1 of .* for example model\.layers\.1\.mlp\.up_proj"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "made", "tiny")


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    made = random_model("llama")
    made.model.model.norm.weight = torch.nn.Parameter(torch.ones(64))
    write_gguf(tmp_path / "model.gguf", made)
    with pytest.raises(ValueError, match=r"output_norm\.weight has the shape \(64,\), where"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "made", "tiny")
