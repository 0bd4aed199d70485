"""Models that run without transformers' say what transformers makes of the same weights, and little
of transformers is imported for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, DynamicCache

from model_adapter import Context, LanguageModel, SentenceEmbedder, Stretch, create_database
from model_adapter.attention.registered import attend_by_memdb
from model_adapter.models.eight_bit.described import Described
from model_adapter.models.eight_bit.file import WeightFile, write
from model_adapter.models.eight_bit.fused import FusedModel
from model_adapter.models.eight_bit.graph import ROWS, is_fast
from model_adapter.models.eight_bit.skeleton import model_from, sources_of
from model_adapter.models.noted_tokenizer import NotedTokenizer
from tests.adapter.test_eight_bit import error, randomize, saved
from tests.helpers import SAMPLE, tiny_model

pytestmark = pytest.mark.skipif(not is_fast(), reason="no kernel for 8 bits on this processor")

#: What rounding an activation to its neighbour changes, at most.
NEAR = 0.02
_HALF = 8  # of head_dim
_LONG = {
    "short_factor": [1.0 + 0.1 * n for n in range(_HALF)],
    "long_factor": [2.0 + n for n in range(_HALF)],
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
#: How keys may turn.
TURNING: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "longrope": _LONG,
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}
_BY_KIND = ["sliding_attention", "full_attention", "sliding_attention"]
#: What models of each class may have beside the usual.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{architecture: (architecture, {}) for architecture in ("llama", "mistral", "qwen2", "qwen3")},
    "gemma3": ("gemma3", {"sliding_window": 24, "layer_types": _BY_KIND}),
    "gemma3, scaled otherwise": ("gemma3", {"query_pre_attn_scalar": 7, "sliding_window": 5}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral, a window": ("mistral", {"sliding_window": 24}),
    "mistral, none": ("mistral", {"sliding_window": None}),
    "qwen2, windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "layer_types": _BY_KIND},
    ),
    "qwen3, biases, a window": (
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
        },
    ),
    # What its class does not know it does not heed.
    "llama, a window of nobody's": ("llama", {"sliding_window": 24, "layer_types": _BY_KIND}),
    **{
        f"llama, {kind}": (
            "llama",
            {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **more}},
        )
        for kind, more in TURNING.items()
    },
}


def both(case: str, tied: bool, folder: Path) -> tuple[FusedModel, Any]:
    """A model, and the same as transformers has it, with this attention."""
    architecture, changes = CASES[case]
    more = {"head_dim": 2 * _HALF, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    made = tiny_model(architecture, **more, **changes).model
    randomize(made)
    described = Described.of(made)
    assert described is not None
    noted = json.loads(json.dumps(described.noted))
    write(folder / "weights", sources_of(made))
    file = WeightFile(folder / "weights")
    unfused = model_from(file, made.config)
    return FusedModel(file, Described.read(noted), lambda: unfused), unfused


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_says_what_transformers_does(case: str, tied: bool, tmp_path: Path) -> None:
    fused, unfused = both(case, tied, tmp_path)
    tokens = torch.randint(3, 400, (2, ROWS + 3), generator=torch.Generator().manual_seed(0))
    for attention in ("sdpa", "memdb"):
        unfused.set_attn_implementation(attention)
        found = []
        for model in (fused, unfused):
            cache = DynamicCache()
            whole = model(tokens, past_key_values=cache, use_cache=True).logits
            some = model(tokens[:, :3], past_key_values=cache, logits_to_keep=2).logits
            one = model(tokens[:, :1], past_key_values=cache, logits_to_keep=torch.tensor([0]))
            found.append((whole, some, one.logits, model(tokens[:, :9]).logits))
        for mine, theirs in zip(*found, strict=True):
            assert mine.shape == theirs.shape
            # The same rounded products; sums in another order may round one to its neighbour.
            assert error(mine, theirs) < NEAR


@pytest.mark.parametrize("case", CASES)
def test_it_turns_keys_as_transformers_does(case: str, tmp_path: Path) -> None:
    fused, unfused = both(case, False, tmp_path)
    kinds = getattr(unfused.config, "layer_types", None) if case.startswith("gemma3") else None
    places, like = torch.tensor([[0, 1, 7, 300], [5, 6, 500, 511]]), torch.empty(1)
    for kind in kinds or [None]:
        given = (like, places) if kind is None else (like, places, kind)
        theirs = unfused.base_model.rotary_emb(*given)
        mine = fused.get_decoder().rotary_emb(*given)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize("case", ["llama", "mistral, a window", "qwen3", "gemma3"])
def test_whoever_looks_on_sees_the_same(case: str, tmp_path: Path) -> None:
    architecture, changes = CASES[case]
    loaded = LanguageModel.load(saved(tmp_path / "model", architecture, **changes))
    assert isinstance(loaded.model, FusedModel)
    plain = loaded.model.unfused()
    attend_by_memdb(plain)
    tokens = loaded.tokens(SAMPLE)[:40]
    seen: list[list[torch.Tensor]] = []
    for model in (loaded.model, plain):
        seen.append([])
        loaded.model = model
        loaded._prefixes.clear()
        for start in (None, 60):
            loaded.observe(
                [tokens, tokens[:9]],
                lambda _, *given: seen[-1].extend(given[:3]),  # type: ignore[arg-type]
                prefix=tokens[:5],
                start=start,
                what="read",
            )
    assert len(seen[0]) == len(seen[1]) > 0
    for one, other in zip(*seen, strict=True):
        assert error(one, other) < NEAR


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma3", {"final_logit_softcapping": 5.0}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("llama", {"hidden_act": "relu"}),
        ("phi3", {}),
    ],
)
def test_what_is_not_known_is_run_by_transformers(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    made = tiny_model("gemma3" if architecture == "gemma3" else architecture).model
    for name, value in changes.items():
        setattr(made.config, name, value)
    assert Described.of(made) is None
    if changes.keys() - {"use_bidirectional_attention"}:
        folder = saved(tmp_path / "model", architecture, **changes)
        loaded = LanguageModel.load(folder)
        assert not isinstance(loaded.model, FusedModel)
        assert not isinstance(loaded.tokenizer, NotedTokenizer)
        assert not loaded.is_exact


def test_one_that_says_other_things_than_transformers_reads_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held against transformers' own when it is first loaded: here its windows are wrong."""
    monkeypatch.setenv("MEMDB_CACHE", str(tmp_path / "cache"))
    of = Described.of

    def wrong(model: Any) -> Described | None:
        found = of(model)
        return found and Described(**{**vars(found), "windows": [1] * len(found.windows)})

    monkeypatch.setattr(Described, "of", wrong)
    said: list[str] = []
    model = LanguageModel.load(saved(tmp_path / "model"), notify=said.append)
    assert model.is_exact
    assert "says other things" in said[-1]


def test_what_a_model_turned_out_to_be_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_adapter.models import language_model

    monkeypatch.setenv("MEMDB_CACHE", str(tmp_path / "cache"))
    folders = [saved(tmp_path / name, name) for name in ("smollm3", "gemma3")]
    first = [LanguageModel.load(folder) for folder in folders]
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "find_out", None)
        second = [LanguageModel.load(folder) for folder in folders]
    for one, other in zip(first, second, strict=True):
        assert one._found == other._found
        assert [one.rope(layer) for layer in range(3)] == [other.rope(layer) for layer in range(3)]
    assert first[0].rope(3 - 1) is not None
    for mark in (tmp_path / "cache" / "tried").iterdir():
        mark.write_text('{"memory_')  # cut off
    assert LanguageModel.load(folders[0])._found == first[0]._found


# --- what is imported -----------------------------------------------------------------------------

HEAVY = (
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.models.auto",
    "transformers.tokenization_utils_base",
    "torch._dynamo",
    "torch.distributed.tensor",
    "accelerate",
    "peft",
    "scipy",
    "sympy",
    "sklearn",
    "pandas",
    "matplotlib",
)


@pytest.mark.parametrize("options", [[], ["--cite"], ["--rag"], ["--n", "2", "--temperature", "1"]])
def test_a_warm_generate_imports_little(
    options: list[str],
    warm: tuple[Path, dict[str, str]],
) -> None:
    path, environment = warm
    code = (
        "import sys\nfrom cli.main import main\ntry:\n    main(sys.argv[1:])\n"
        f"except SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    asked = ["generate", "Which town is it?", "--db", str(path), "--max-new-tokens", "3", *options]
    done = subprocess.run(
        [sys.executable, "-c", code, *asked],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


@pytest.fixture(scope="module")
def warm(
    tmp_path_factory: pytest.TempPathFactory, minilm: SentenceEmbedder
) -> tuple[Path, dict[str, str]]:
    """A warm database, and with what environment it is opened elsewhere."""
    folder = tmp_path_factory.mktemp("warm")
    cache = folder / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMDB_CACHE", str(cache))
        cache.mkdir()
        model = saved(folder / "model")
        embedder = Path.home() / ".cache" / "memdb" / minilm.name
        if embedder.is_dir():
            (cache / minilm.name).symlink_to(embedder)
        with create_database(folder / "db", model=model, embedder=minilm) as db:
            db.insert(SAMPLE[:300], id="harbour")
            assert all(memory is not None for _, memory in db.memories("harbour"))
    return folder / "db", {**os.environ, "MEMDB_CACHE": str(cache)}


# --- the tokenizer --------------------------------------------------------------------------------


def test_all_else_is_asked_of_transformers_tokenizer(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    loaded = LanguageModel.load(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    mine = loaded.tokenizer
    assert isinstance(mine, NotedTokenizer)
    assert loaded.tokenizer_json == theirs.backend_tokenizer.to_str()
    assert mine._loaded is None
    assert mine("the harbour")["input_ids"] == theirs("the harbour")["input_ids"]
    assert mine._loaded is not None
    assert len(mine) == len(theirs)
    assert mine.pad_token_id == theirs.pad_token_id
    assert mine.get_vocab() == theirs.get_vocab()
    with pytest.raises(AttributeError):
        mine.no_such_thing  # noqa: B018
    config = AutoConfig.from_pretrained(folder)
    assert loaded.config.vocab_size == config.vocab_size
    context = Context(loaded)
    assert context.read([[Stretch(mine.encode("a ship"))]])[0].shape == (1, config.vocab_size)
