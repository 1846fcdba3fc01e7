"""The corpus as tokens: two memory-mapped files, written once and found again by a fingerprint of all they depend on.

Which files there are and what is held out is decided in ``documents.py``; how tokens become samples in ``packing.py``.
Nothing here needs torch.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from tedlab.config import DataConfig
from tedlab.data.documents import Source, find_files, split
from tedlab.data.tokenizers import Tokenizer, build_tokenizer
from tedlab.locks import scratch

_FORMAT = 1  # increase when the same text and tokenizer would give other files


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: documents end to end, each followed by ``tokenizer.separator``.

    ``train`` and ``validation`` have shape (tokens,) and the dtype of ``tokenizer.encode``. ``bytes_per_token`` is the
    mean number of UTF-8 bytes of a validation token, separators counted as tokens: a loss in nats per token divided by
    ``bytes_per_token · ln 2`` is in bits per byte. ``directory`` holds the files.
    """

    train: np.memmap
    validation: np.memmap
    tokenizer: Tokenizer
    bytes_per_token: float
    directory: Path


def prepare_corpus(config: DataConfig, sequence_length: int) -> Corpus:
    """Tokenise the text that ``config`` names, unless that has been done before, and open the result.

    Any number of processes may call this at once. Memory stays bounded however large the corpus is.

    Args:
        config: All but ``batch_size``, ``micro_batch_size``, ``validation_samples`` and ``num_workers`` is read.
        sequence_length: Each split must hold at least one sample of this many inputs.

    Raises:
        FileNotFoundError: ``path`` or ``tokenizer`` names a file that does not exist.
        ValueError: There is no text, too little of it, or something in it or in ``config`` cannot be used.
    """
    if not 0 < config.validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction={config.validation_fraction} must lie strictly between 0 and 1, as 0.05 does."
        )
    files = find_files(config.path)
    text_key = _key([[f.name, f.size, f.modified_ns] for f in files], config.field, config.validation_fraction)

    def training_text() -> Iterator[str]:
        train, _ = split(files, config.validation_fraction, config.field)
        with _progress("Training the tokenizer", train) as advance:
            yield from chain.from_iterable(chain.from_iterable(source.documents(advance) for source in train))

    tokenizer = build_tokenizer(config, text_key, training_text)
    corpora = Path(config.cache_dir).expanduser() / "corpora"
    directory = corpora / _key(text_key, tokenizer.fingerprint)
    if not directory.exists():
        train, validation = split(files, config.validation_fraction, config.field)
        corpora.mkdir(parents=True, exist_ok=True)
        with scratch("corpus", corpora) as temporary:
            complete = temporary / directory.name
            complete.mkdir()
            _tokenise(train, validation, tokenizer, complete)
            try:
                complete.rename(directory)
            except OSError:
                if not directory.exists():  # otherwise another process was faster, and its files are the same
                    raise
    return _open(directory, tokenizer, sequence_length)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:16]


def _tokenise(train: list[Source], validation: list[Source], tokenizer: Tokenizer, directory: Path) -> None:
    """Write ``train.bin``, ``validation.bin`` and what :func:`_open` needs to know of them."""
    sizes = {}
    with _progress("Tokenising", [*train, *validation]) as advance:
        for name, sources in (("train", train), ("validation", validation)):
            sizes[name] = _write(directory / f"{name}.bin", sources, tokenizer, advance)
    meta = {name: {"tokens": tokens, "bytes": size} for name, (tokens, size) in sizes.items()}
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _write(
    path: Path, sources: list[Source], tokenizer: Tokenizer, advance: Callable[[int], object]
) -> tuple[int, int]:
    """Write the tokens of ``sources``; returns how many there are and the UTF-8 bytes they stand for."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    separator = np.array([tokenizer.separator], dtype=dtype).tobytes()
    size = 0
    with path.open("wb") as file:
        for source in sources:
            for document in source.documents(advance):
                for text in document:
                    size += len(text.encode())
                    file.write(tokenizer.encode(text).tobytes())
                file.write(separator)
        return file.tell() // dtype.itemsize, size


def _open(directory: Path, tokenizer: Tokenizer, sequence_length: int) -> Corpus:
    meta = json.loads((directory / "meta.json").read_text())
    needed = sequence_length + 1
    if any(meta[name]["tokens"] < needed for name in ("train", "validation")):
        raise ValueError(
            f"The corpus is too short: it has {meta['train']['tokens']} training and "
            f"{meta['validation']['tokens']} validation tokens, and one sample of model.sequence_length="
            f"{sequence_length} needs {needed} in each split. Use more text, a shorter sequence_length, or another "
            f"data.validation_fraction."
        )
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    return Corpus(
        train=np.memmap(directory / "train.bin", dtype=dtype, mode="r"),
        validation=np.memmap(directory / "validation.bin", dtype=dtype, mode="r"),
        tokenizer=tokenizer,
        bytes_per_token=meta["validation"]["bytes"] / meta["validation"]["tokens"],
        directory=directory,
    )


@contextmanager
def _progress(description: str, sources: list[Source]) -> Iterator[Callable[[int], object]]:
    """A bar over the bytes of ``sources``, on a terminal; gives the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(description, total=sum(source.size for source in sources))
        yield lambda size: progress.advance(task, size)
