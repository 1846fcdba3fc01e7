"""The tokenised corpus: two memory-mapped files, written once and cached under a fingerprint of all they depend on.

``files.py`` finds the source files, ``documents.py`` decides what is held out, and ``packing.py`` cuts tokens into
samples. Nothing here needs torch.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tedlab.config import DataConfig
from tedlab.data.documents import Source, split
from tedlab.data.files import LeftOut, SourceFile, find_files, listed
from tedlab.data.tokenizers import Tokenizer, build_tokenizer
from tedlab.launch.locks import scratch
from tedlab.progress import advancing

_FORMAT = 2  # increase it whenever the same text and tokenizer would give different files
_META, _LEFT_OUT = "meta.json", "left_out.json"
_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: documents end to end, each followed by ``tokenizer.separator``.

    Attributes:
        train: Training tokens, shape (tokens,), in the dtype of ``tokenizer.encode``.
        validation: Validation tokens, likewise.
        tokenizer: Encodes and decodes the tokens.
        bytes_per_token: Mean UTF-8 bytes per validation token, separators included. A loss in nats per token divided
            by ``bytes_per_token · ln 2`` is in bits per byte.
        directory: Holds the token files.
        left_out: Files and folders that ``data.path`` names but the corpus does not contain.
        source_files: Number of files that the corpus contains.
    """

    train: np.memmap
    validation: np.memmap
    tokenizer: Tokenizer
    bytes_per_token: float
    directory: Path
    left_out: tuple[LeftOut, ...] = ()
    source_files: int = 1


def prepare_corpus(config: DataConfig, sequence_length: int) -> Corpus:
    """Tokenises the text that ``config`` names, unless the cache already holds the result, and opens the result.

    Any number of processes may call this at once. Memory stays bounded however large the corpus is. A damaged corpus
    in the cache is built again.

    Args:
        config: Every field is read but ``batch_size``, ``micro_batch_size``, ``validation_samples``, ``num_workers``.
        sequence_length: Each split must hold at least one sample of this many inputs.

    Raises:
        FileNotFoundError: If ``path`` or ``tokenizer`` names a file that does not exist.
        ValueError: If there is too little text or none, if the text or ``config`` cannot be used, or if a file changes
            while it is read.
    """
    if not 0 < config.validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction={config.validation_fraction} must lie strictly between 0 and 1, as 0.05 does."
        )
    cache_dir = Path(config.cache_dir).expanduser()
    no_files: list[LeftOut] = []
    files = find_files(config.path, no_files, cache_dir)
    text_key = _key([[f.name, f.size, f.modified_ns] for f in files], config.field, config.validation_fraction)
    no_text: list[LeftOut] = []

    @cache
    def sides() -> tuple[list[Source], list[Source]]:
        with advancing("Reading", _size(files)) as advance:
            return split(files, config.validation_fraction, config.field, no_text, advance)

    def training_text() -> Iterator[str]:
        train, _ = sides()
        with advancing("Training the tokenizer", _size(train)) as advance:
            yield from chain.from_iterable(chain.from_iterable(source.documents(advance) for source in train))
        _refuse_changed(files)

    corpora = cache_dir / "corpora"
    try:
        corpora.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir={config.cache_dir!r} cannot be written: {error.strerror}.") from None
    tokenizer = build_tokenizer(config, text_key, training_text)
    directory = corpora / _key(text_key, tokenizer.fingerprint)
    if damage := _damage(directory, tokenizer):
        print(f"The cached corpus {directory} is made anew: {damage}.", file=sys.stderr)
        _set_aside(directory)
    if not directory.exists():
        with scratch("corpus", corpora) as temporary:
            complete = temporary / directory.name
            complete.mkdir()
            train, validation = sides()
            _tokenise(train, validation, tokenizer, complete)
            _refuse_changed(files)
            (complete / _LEFT_OUT).write_text(json.dumps([astuple(file) for file in no_text], indent=2) + "\n")
            try:
                complete.rename(directory)
            except OSError:
                if not directory.exists():  # else another process was faster and wrote the same files
                    raise
    return _open(directory, tokenizer, sequence_length, files, no_files)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:16]


def _tokenise(train: list[Source], validation: list[Source], tokenizer: Tokenizer, directory: Path) -> None:
    """Writes ``train.bin``, ``validation.bin``, and their numbers of tokens and bytes for :func:`_open`."""
    sizes = {}
    with advancing("Tokenising", _size([*train, *validation])) as advance:
        for name, sources in zip(_SPLITS, (train, validation), strict=True):
            sizes[name] = _write(directory / f"{name}.bin", sources, tokenizer, advance)
    meta = {name: {"tokens": tokens, "bytes": size} for name, (tokens, size) in sizes.items()}
    (directory / _META).write_text(json.dumps(meta, indent=2) + "\n")


def _write(
    path: Path, sources: list[Source], tokenizer: Tokenizer, advance: Callable[[int], object]
) -> tuple[int, int]:
    """Writes the tokens of ``sources``; returns their number, separators included, and the text's UTF-8 bytes."""
    dtype = _dtype(tokenizer)
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


def _damage(directory: Path, tokenizer: Tokenizer) -> str | None:
    """Says what is wrong with a cached corpus; returns None if it is sound or absent.

    A killed process cannot leave a truncated file; a failing disk or machine, or somebody editing by hand, can.
    """
    if not directory.exists():
        return None
    try:
        meta = json.loads((directory / _META).read_text())
        json.loads((directory / _LEFT_OUT).read_text())
        for name in _SPLITS:
            size = (directory / f"{name}.bin").stat().st_size
            expected = meta[name]["tokens"] * _dtype(tokenizer).itemsize
            if size != expected:
                return f"{name}.bin has {size:,} bytes in place of {expected:,}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error) or type(error).__name__
    return None


def _set_aside(directory: Path) -> None:
    """Removes a folder in one rename, which several processes may attempt at once."""
    with scratch("corpus", directory.parent) as temporary, suppress(FileNotFoundError):
        directory.rename(temporary / directory.name)


def _refuse_changed(files: Sequence[SourceFile]) -> None:
    """Raises ``ValueError`` if a file's size or time has changed since the search found it."""
    for file in files:
        try:
            status = file.path.stat()
        except OSError:
            status = None
        if status is None or (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):
            raise ValueError(
                f"{file.path} changed while it was read. Copy it to where nothing writes to it, or start again when it "
                "is complete."
            )


def _open(
    directory: Path, tokenizer: Tokenizer, sequence_length: int, files: Sequence[SourceFile], no_files: list[LeftOut]
) -> Corpus:
    meta = json.loads((directory / _META).read_text())
    no_text = [LeftOut(*file) for file in json.loads((directory / _LEFT_OUT).read_text())]
    left_out = sorted([*no_files, *no_text])
    needed = sequence_length + 1
    if any(meta[name]["tokens"] < needed for name in _SPLITS):
        missing = f" {len(left_out)} files were left out: {listed(left_out)}." if left_out else ""
        raise ValueError(
            f"The corpus is too short: it has {meta['train']['tokens']} training and "
            f"{meta['validation']['tokens']} validation tokens, and one sample of model.sequence_length="
            f"{sequence_length} needs {needed} in each split. Use more text, a shorter sequence_length, or another "
            f"data.validation_fraction.{missing}"
        )
    dtype = _dtype(tokenizer)
    return Corpus(
        train=np.memmap(directory / "train.bin", dtype=dtype, mode="r"),
        validation=np.memmap(directory / "validation.bin", dtype=dtype, mode="r"),
        tokenizer=tokenizer,
        bytes_per_token=meta["validation"]["bytes"] / meta["validation"]["tokens"],
        directory=directory,
        left_out=tuple(left_out),
        source_files=len(files) - len(no_text),
    )


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    """Returns the dtype of the token files: the smallest unsigned integer that holds every id."""
    return np.dtype(np.min_scalar_type(tokenizer.vocab_size - 1))


def _size(files: Sequence[SourceFile | Source]) -> int:
    """Returns the bytes of some files."""
    return sum(file.size for file in files)
