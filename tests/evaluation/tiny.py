"""A small random OLMoE, as transformers writes it and as tedlab imports it, with a tokenizer of letters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tedlab.exchange.imports import import_folder
from tedlab.exchange.verify import _wide
from tests.exchange.families import CONFIGS

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.!?\n"
SEPARATOR = 0
CONTEXT = CONFIGS["olmoe"]["max_position_embeddings"]


Follows = Callable[[list[int]], Tensor]


class Tiny(NamedTuple):
    """The folder of transformers and the run directory."""

    folder: Path
    run: Path

    def judge(self) -> Follows:
        """Returns what the model of transformers says follows tokens: log-probabilities (V,), in float64."""
        import transformers

        options = {"dtype": torch.float64, "attn_implementation": "eager", "experts_implementation": "eager"}
        with _wide(torch.float64):
            model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, **options).eval()

        @torch.no_grad()
        def follows(tokens: list[int]) -> Tensor:
            with _wide(torch.float64):
                return model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)

        return follows


def tiny(place: Path) -> Tiny:
    """Makes both."""
    import transformers

    config = transformers.AutoConfig.for_model("olmoe", **dict(CONFIGS["olmoe"]))
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.3, generator=generator)
    model.save_pretrained(place / "folder")
    letters(place / "folder" / "tokenizer.json")
    import_folder(place / "folder", place / "run")
    return Tiny(place / "folder", place / "run")


def letters(path: Path) -> None:
    """Writes a tokenizer of which each letter is a token, after the separator of documents."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<|endoftext|>", *LETTERS])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path))


def ids(text: str) -> list[int]:
    return [1 + LETTERS.index(letter) for letter in text]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
