"""Small tokenizers and chat templates, of the kinds that models have."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.helpers import SAMPLE

CONTROL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "[INST]",
    "[/INST]",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
#: Added tokens that are no control tokens.
TAGS = ["<table>", "</b>", "\n\n\n"]

TEXT = SAMPLE + " user assistant system model Reference: INST SYS 0123456789 <>|/[]_.,;:!?'\"\n"


def _bpe(**how: Any) -> Tokenizer:
    return Tokenizer(models.BPE(unk_token="<unk>", **how))


def _trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    return tokenizer


def _letters() -> list[str]:
    return sorted({chr(code) for code in range(33, 127)} | set("▁\n\t"))


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        made,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
        ),
    )


def byte_level_with_a_space_before() -> Tokenizer:
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


def metaspace(scheme: str) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        made = _bpe()
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        made.decoder = decoders.Metaspace(prepend_scheme=scheme)
        return _trained(
            made,
            trainers.BpeTrainer(
                vocab_size=400,
                special_tokens=CONTROL,
                initial_alphabet=_letters(),
                show_progress=False,
            ),
        )

    return make


def sentencepiece_bpe(before: bool) -> Callable[[], Tokenizer]:
    """Llama 2's form (a space put before each stretch of text), or Gemma's (none), with bytes for
    what is in no vocabulary."""

    def make() -> Tokenizer:
        trained = metaspace("never")()
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        parts = json.loads(trained.to_str())["model"]
        vocabulary = [token for token in parts["vocab"] if token != "\n"]
        vocabulary = [*CONTROL, *bytes_, *(t for t in vocabulary if t not in CONTROL)]
        ids = {token: number for number, token in enumerate(vocabulary)}
        merges = [(a, b) for a, b in parts["merges"] if {a, b, a + b} <= ids.keys()]
        made = Tokenizer(
            models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        spaces = normalizers.Replace(" ", "▁")
        made.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if before else spaces
        )
        parts_of_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if before:
            parts_of_text.append(decoders.Strip(" ", 1, 0))
        made.decoder = decoders.Sequence(parts_of_text)
        return made

    return make


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=CONTROL,
        initial_alphabet=_letters(),
        unk_token="<unk>",
        show_progress=False,
    )
    return _trained(made, trainer)


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=CONTROL, initial_alphabet=_letters(), show_progress=False
    )
    return _trained(made, trainer)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, a space before": byte_level_with_a_space_before,
    "metaspace, always": metaspace("always"),
    "metaspace, first": metaspace("first"),
    "metaspace, never": metaspace("never"),
    "sentencepiece, prepended": sentencepiece_bpe(True),
    "sentencepiece": sentencepiece_bpe(False),
    "unigram": unigram,
    "word piece": word_piece,
}

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
        "{% set system = false %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}{% else %}"
        "{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
        "{% if loop.last and system is defined %}[INST] {{ system + '\n\n' + m['content'] }}[/INST]"
        "{% else %}[INST] {{ m['content'] }}[/INST]{% endif %}"
        "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "phi 3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}"
        "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}

#: Puts the system's words into the user's first turn, and elsewhere prints any role it is given.
GEMMA_3 = (
    TEMPLATES["gemma"]
    .replace("{{ raise_exception('no system') }}", "{% set messages = messages[1:] %}", 1)
    .replace(
        "{{ bos_token }}",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set first = messages[0]['content'] + '\n\n' %}{% else %}{% set first = '' %}"
        "{% endif %}",
    )
    .replace(
        "{{ m['content'] | trim }}", "{{ (first if loop.first else '') + m['content'] | trim }}"
    )
)

_made: dict[str, Tokenizer] = {}


def tokenizer_of(kind: str, template: str, stripping: Sequence[str] = ()) -> Any:
    """One of them, with one of the templates. `stripping`: control tokens that take the white space
    behind them (Phi 3)."""
    if kind not in _made:
        _made[kind] = TOKENIZERS[kind]()
    made = Tokenizer.from_str(_made[kind].to_str())
    made.add_special_tokens(
        [AddedToken(token, special=True, rstrip=token in stripping) for token in CONTROL]
    )
    made.add_tokens([AddedToken(token, normalized=False) for token in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATES[template],
    )
