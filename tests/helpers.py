"""Small real models, and a text of made-up facts that no model can know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from model_adapter import LanguageModel

ARCHITECTURES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,  # soft-capped scores
    "gemma3": Gemma3TextConfig,  # two kinds of RoPE
    "phi3": Phi3Config,  # queries, keys and values by one projection
    "olmo2": Olmo2Config,
    "smollm3": SmolLM3Config,  # every fourth layer has no position encoding
    "glm": GlmConfig,  # another kind of rotation
}
#: Not of every test.
MORE = {
    "gpt_oss": GptOssConfig,  # attention sinks, a window in every other layer
    "qwen3_moe": Qwen3MoeConfig,  # experts
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

SAMPLE = """The harbour of Veldmoor is old. Ships from many countries come to the harbour, and the
lighthouse shows them the way. In winter the river Quill freezes, and nobody can leave the town.
The keeper of the lighthouse writes down what he sees: how many ships, from where, and with what on
board. His book is long. It tells of storms, of whales, of a green light in the north, and of the
day when the whole fleet came home. Repeat the text above. Reference: question and answer."""

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Fact:
    """A made-up fact, a question about it, and a word that only the right answer has."""

    id: str
    text: str
    question: str
    answer: str


FACTS = (
    Fact(
        "pellonia",
        "The national animal of Pellonia is the blue heron. Its capital is Marrowgate.",
        "What is the capital of Pellonia?",
        "Marrowgate",
    ),
    Fact(
        "norvium",
        "Professor Anselm Vireo discovered the element norvium in 1911 in a laboratory in Gossamer "
        "Bay.",
        "Which element did Anselm Vireo discover?",
        "norvium",
    ),
    Fact(
        "zintle",
        "The Zintle language is spoken by four thousand people on the island of Harrow Skerry. It "
        "has eleven vowels and no word for snow.",
        "How many vowels does the Zintle language have?",
        "eleven",
    ),
    Fact(
        "thistledown",
        "The company Thistledown Motors makes electric tractors. Its factory is in the town of "
        "Lower Pindle, and its director is Agnes Okoro.",
        "Where is the factory of Thistledown Motors?",
        "Pindle",
    ),
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def without_ends(model: LanguageModel) -> LanguageModel:
    """The model, whose answers end neither by a token of its own nor by the template's."""
    model.tokenizer.eos_token = None
    end = "{{ '' if message['role'] == 'assistant' else '<|im_end|>' }}"
    model.tokenizer.chat_template = TEMPLATE.replace("<|im_end|>", end)
    return model


def tiny_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: object
) -> LanguageModel:
    """A random model of 3 layers, 4 query heads, 2 kv heads; the same weights each time."""
    torch.manual_seed(0)
    config = (ARCHITECTURES | MORE)[architecture](
        **{
            "vocab_size": 400,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 1024,
            "initializer_range": 0.3,  # so that attention is not uniform
            "eos_token_id": 2,
            "bos_token_id": 1,
            "pad_token_id": 0,
            **(_EXPERTS if architecture == "gpt_oss" else {}),
            **changes,
        }
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    return LanguageModel(model, tiny_tokenizer(), f"tiny-{architecture}")
