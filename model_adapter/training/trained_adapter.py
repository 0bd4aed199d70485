"""An adapter while it is trained: peft's LoRA layers in a copy of the model that shares its
weights. So the base model stays as it is beside it, and nothing is switched on and off."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from memdb import InvalidInputError
from model_adapter.models import observing
from model_adapter.models.adapters import RECIPE, WEIGHTS, sharing_copy
from model_adapter.models.language_model import LanguageModel
from model_adapter.training.recipe import Recipe


class TrainedAdapter:
    """A new adapter for a model, with small random weights; it changes nothing yet.

    Args:
        model: without an adapter; its weights get no gradients from now on.
        recipe: which layers, and how.

    Attributes:
        model: the causal language model with the adapter in it.

    Raises:
        InvalidInputError: the model has no such layers.
    """

    def __init__(self, model: LanguageModel, recipe: Recipe) -> None:
        self._language = model
        self._recipe = recipe
        names = _linears(model, recipe)
        self._build(names)
        if recipe.path == "write":
            useful = self._useful()
            if len(useful) < len(names):
                self._build(useful)

    def _build(self, names: list[str]) -> None:
        from peft import LoraConfig, get_peft_model

        self._config = LoraConfig(
            r=self._recipe.rank,
            lora_alpha=self._recipe.scale,
            target_modules=names,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(self._recipe.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = get_peft_model(sharing_copy(self._language.base), self._config)
        self._peft: Any = made.eval()
        self.model: Any = made.get_base_model()

    def _useful(self) -> list[str]:
        """The layers that change a key or value of a memory layer: not those behind the last."""
        names, weights = [], []
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_A"):
                names.append(name)
                weights.append(module.lora_B["default"].weight)
        vocabulary = int(self.model.config.vocab_size)
        tokens = [token % vocabulary for token in range(3, 7)]
        keys, values = observing.encode(
            self.model, observing.KeyValues(), [tokens], self._language.memory_layers
        )
        reached = torch.autograd.grad(keys.sum() + values.sum(), weights, allow_unused=True)
        return [name for name, found in zip(names, reached, strict=True) if found is not None]

    @property
    def reader(self) -> Any:
        """The model that reads."""
        return self._language.base if self._recipe.path == "write" else self.model

    @property
    def writer(self) -> Any:
        """The model that writes memories."""
        return self._language.base if self._recipe.path == "read" else self.model

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def prefix(self, tokens: tuple[int, ...]) -> observing.KeyValues:
        """Key-values of a prefix as they are now, with gradients."""
        return observing.key_values(self.model, tokens)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights by name."""
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(weights[name])

    def save(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Write the adapter: what peft writes, and the recipe.

        Args:
            folder: where; it is made.
            recipe: what `recipe.json` says.
        """
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        dtype = getattr(torch, self._recipe.dtype)
        state = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        held = {name: w.detach().to("cpu", dtype).contiguous() for name, w in state.items()}
        save_file(held, folder / WEIGHTS)
        self._config.base_model_name_or_path = str(recipe["model"])
        self._config.inference_mode = True
        self._config.save_pretrained(str(folder))
        text = json.dumps(recipe, indent=2, ensure_ascii=False)
        (folder / RECIPE).write_text(text + "\n", encoding="utf-8")


def _linears(model: LanguageModel, recipe: Recipe) -> list[str]:
    """Names of the linear layers that are to be changed."""
    head = model.base.get_output_embeddings()
    there = [
        name
        for name, module in model.base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    kinds = sorted({name.rpartition(".")[2] for name in there})
    unknown = [target for target in recipe.targets if target not in kinds]
    if unknown or not there:
        raise InvalidInputError(
            f"the model '{model.name}' has no linear layers called {', '.join(unknown) or 'so'}; "
            f"it has: {', '.join(kinds)}"
        )
    wanted = set(recipe.targets or kinds)
    return [name for name in there if name.rpartition(".")[2] in wanted]
