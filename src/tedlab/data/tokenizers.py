"""Tokenizers: plain bytes, a BPE trained on the corpus, or any ``tokenizers`` JSON file.

:func:`build_tokenizer` chooses the one that a configuration names. ``corpus.py`` reads text and stores token ids.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tedlab.config import DataConfig
from tedlab.hints import did_you_mean
from tedlab.launch.locks import scratch

_BPE_SEPARATOR = "<|endoftext|>"
SAVED = "tokenizer.json"  # file name in a run directory
_LARGEST_VOCABULARY = 1 << 24
# The first one in a vocabulary separates documents; the last two are Llama 3's and DeepSeek's.
_SEPARATORS = (_BPE_SEPARATOR, "<eos>", "</s>", "[SEP]", "<|end_of_text|>", "<｜end▁of▁sentence｜>")


class Tokenizer(Protocol):
    """The interface that the rest of the package needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def separator(self) -> int:
        """The id that follows every document; no text encodes to it."""

    @property
    def fingerprint(self) -> str:
        """A short identifier that changes whenever the result of ``encode`` would."""

    def encode(self, text: str) -> np.ndarray:
        """Returns token ids of shape (tokens,) in the smallest unsigned dtype that holds ``vocab_size - 1``."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ``ids``; an incomplete character becomes U+FFFD."""

    def save(self, directory: Path) -> None:
        """Writes the file that :func:`load_tokenizer` reads, if one is needed."""


class ByteTokenizer:
    """Uses UTF-8 bytes as token ids. NUL, which never occurs in text, separates documents."""

    vocab_size = 256
    separator = 0
    fingerprint = "byte"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def save(self, directory: Path) -> None:
        """Writes nothing: the absence of a file means bytes."""


class FileTokenizer:
    """A tokenizer saved by Hugging Face ``tokenizers`` (``tokenizer.json``).

    It neither adds special tokens nor recognises them in text: a document that spells one out is encoded as plain text.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a tokenizer, has none of the usual separator tokens, or has too large an id.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"There is no tokenizer file {path}: data.tokenizer must be an existing JSON file.")
        content = path.read_bytes()
        try:
            self._tokenizer = HuggingFaceTokenizer.from_buffer(content)
        except BaseException as error:  # a Rust panic is not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(
                f"{path} is not a tokenizer saved by Hugging Face tokenizers (usually called tokenizer.json): {error}."
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        separators = [vocabulary[token] for token in _SEPARATORS if token in vocabulary]
        if not separators:
            raise ValueError(
                f"The tokenizer {path} has no token to put between documents: none of {', '.join(_SEPARATORS)} is in "
                f"its vocabulary of {len(vocabulary)} tokens. Add one of them to it as a special token."
            )
        self.separator = separators[0]
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        if self.vocab_size > _LARGEST_VOCABULARY:
            raise ValueError(
                f"The tokenizer {path} has {len(vocabulary):,} tokens with ids of up to {self.vocab_size - 1:,}: the "
                f"model would have an embedding for each id, of which there may be {_LARGEST_VOCABULARY:,} at most."
            )
        self._path, self._content = path, content
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        self._dtype = np.min_scalar_type(self.vocab_size - 1)

    def __reduce__(self) -> tuple[type["FileTokenizer"], tuple[Path]]:
        """Is read anew in another process: a pickled tokenizer would recognise special tokens in text."""
        return FileTokenizer, (self._path,)

    def encode(self, text: str) -> np.ndarray:
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # e.g. a word-level vocabulary without an unknown token
            raise ValueError(f"The tokenizer {self._path} cannot encode the text of data.path: {error}.") from None
        return np.array(ids, dtype=self._dtype)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Writes the file as it was read, so that the copy has the same fingerprint."""
        (directory / SAVED).write_bytes(self._content)


def train_bpe(texts: Iterable[str], vocab_size: int, out: Path) -> FileTokenizer:
    """Trains a byte-level BPE on ``texts`` and saves it as ``out``, which appears only once it is complete.

    The vocabulary holds ``<|endoftext|>``, the 256 bytes and then merges.

    Args:
        texts: Training text, in pieces.
        vocab_size: Number of tokens; there are fewer if the text does not have enough pairs to merge.
        out: JSON file to write.

    Raises:
        ValueError: If ``vocab_size`` is too large, or too small for the bytes and the separator.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 1
    if vocab_size < smallest:
        raise ValueError(
            f"data.bpe_vocab_size={vocab_size} is too small: a byte-level BPE needs {len(alphabet)} bytes and one "
            f"separator, so at least {smallest}. Use data.tokenizer=byte for a smaller vocabulary."
        )
    if vocab_size > _LARGEST_VOCABULARY:
        raise ValueError(f"data.bpe_vocab_size={vocab_size} is too large: it may be {_LARGEST_VOCABULARY:,} at most.")
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_BPE_SEPARATOR], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)

    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch("tokenizer", out.parent) as directory:
        complete = directory / out.name
        tokenizer.save(str(complete))
        os.replace(complete, out)
    return FileTokenizer(out)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Loads the tokenizer that was saved into a run directory."""
    saved = directory / SAVED
    return FileTokenizer(saved) if saved.is_file() else ByteTokenizer()


def build_tokenizer(config: DataConfig, corpus_key: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Returns the tokenizer that ``config.tokenizer`` names, and trains it first if that is necessary.

    Args:
        config: Only ``tokenizer``, ``bpe_vocab_size`` and ``cache_dir`` are read.
        corpus_key: Identifies the text that a BPE is trained on; a cached BPE of the same key is reused.
        texts: Returns that text; called only to train.

    Raises:
        FileNotFoundError: If the name is the path of a file that does not exist.
        ValueError: If the name is neither ``byte`` nor ``bpe`` nor a path, or the file cannot be used.
    """
    name = config.tokenizer
    if name == "byte":
        return ByteTokenizer()
    if name == "bpe":
        trained = Path(config.cache_dir).expanduser() / "tokenizers" / f"bpe-{config.bpe_vocab_size}-{corpus_key}.json"
        with suppress(FileNotFoundError, ValueError):  # absent or damaged: train it again
            return FileTokenizer(trained)
        return train_bpe(texts(), config.bpe_vocab_size, trained)
    if name.endswith(".json") or os.sep in name:
        return FileTokenizer(name)
    raise ValueError(
        f"data.tokenizer={name!r} is not one of byte, bpe, or the path of a tokenizers JSON file."
        + did_you_mean(name.lower(), ("byte", "bpe"))
    )
