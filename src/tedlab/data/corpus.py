"""The tokenised corpus: two memory-mapped files, written once and cached under a fingerprint of all they depend on.

``files.py`` finds the source files, ``documents.py`` decides what is held out, ``shards.py`` tokenises, and
``packing.py`` cuts tokens into samples. A file that holds tokens already is mapped where it lies. ``stream.py`` reads
data sets from elsewhere, as many tokens as are asked for. Nothing here needs torch.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from tedlab.config import DataConfig
from tedlab.data.documents import Copies, Source, divided, document_cut, not_read, text_of, usable
from tedlab.data.extra import installed
from tedlab.data.files import LeftOut, SourceFile, find_files, listed
from tedlab.data.reading import Reading, begun_at
from tedlab.data.rows import is_held_out
from tedlab.data.shards import bytes_of, divide, done_before, dtype_of, join, write_parts
from tedlab.data.stream import Stream, Unreachable, check_stream, local_files
from tedlab.data.tokenised import (
    DamagedTokens,
    digest_of,
    holds_tokens,
    is_index,
    open_tokens,
    refuse_unknown,
    whole_pair,
)
from tedlab.data.tokenizers import SAVED, Tokenizer, build_tokenizer
from tedlab.launch.locks import Lock, scratch
from tedlab.progress import advancing

_FORMAT = 5  # increase it whenever the same text and tokenizer would give different files or other parts of them
_META, _LEFT_OUT, _AS_OF = "meta.json", "left_out.json", "as_of.json"
_BEGUN = ".partial"  # how the name of a folder with parts ends
_SPLITS = ("train", "validation")
_DECODED = 1 << 22  # tokens of a mapped file from which its bytes per token are taken
_LEARNED = 1 << 26  # bytes of a stream's text that a BPE is trained on
_ABANDONED_S = 7 * 24 * 3600  # after so long without a new part, nobody goes on with an unfinished corpus
_ERRORS = (FileNotFoundError, Unreachable, ValueError)  # that are of a source


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: documents end to end, each followed by ``tokenizer.separator``.

    Attributes:
        train: Training tokens, shape (tokens,), in the dtype of ``tokenizer.encode``, or in that of a mapped file.
        validation: Validation tokens, likewise.
        tokenizer: Encodes and decodes the tokens.
        bytes_per_token: Mean UTF-8 bytes per validation token, separators included; of a mapped file, of its first
            4,194,304. A loss in nats per token divided by ``bytes_per_token · ln 2`` is in bits per byte.
        directory: Holds the token files, or says which file is mapped.
        left_out: Files and folders that ``data.path`` names but the corpus does not contain.
        source_files: Number of files that the corpus contains.
        digest: Hash of the training tokens; empty: unknown.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    bytes_per_token: float
    directory: Path
    left_out: tuple[LeftOut, ...] = ()
    source_files: int = 1
    digest: str = ""


def prepare_corpus(config: DataConfig, sequence_length: int, processes: int = 1) -> Corpus:
    """Prepares the one corpus of a configuration without ``sources``; see :func:`prepare_corpora`."""
    (corpus,) = prepare_corpora(config, sequence_length, processes).values()
    return corpus


def prepare_corpora(config: DataConfig, sequence_length: int, processes: int = 1) -> dict[str, Corpus]:
    """Tokenises the text that ``config`` names, unless the cache already holds the result, and opens the result.

    Any number of processes may call this at once; one of them works. If it is killed, what it has done is not done
    again. Memory stays bounded however large the corpus is. A damaged corpus in the cache is built again.

    Args:
        config: Every field is read but ``batch_size``, ``micro_batch_size``, ``validation_samples``, ``num_workers``.
        sequence_length: Each split must hold at least one sample of this many inputs.
        processes: How many tokenise at once.

    Returns:
        The corpus of each of ``config.sources``, or that of ``config.path`` under an empty name.

    Raises:
        FileNotFoundError: If a path or ``tokenizer`` names a file that does not exist.
        ValueError: If there is too little text or none, if the text or ``config`` cannot be used, or if a file changes
            while it is read.
    """
    if not 0 < config.validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction={config.validation_fraction} must lie strictly between 0 and 1, as 0.05 does."
        )
    corpora = Path(config.cache_dir).expanduser() / "corpora"
    found: dict[str, _Cached | _Prepared] = {}
    for name, alone in alone_by_name(config).items():
        with _named(name):
            if alone.stream.dataset is not None:
                found[name] = _Streamed(alone)
            else:
                found[name] = _Prepared(alone) if is_prepared(alone.path) else _Found(alone)
    try:
        corpora.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir={config.cache_dir!r} cannot be written: {error.strerror}.") from None
    keys = [source.key for source in found.values()]
    key = keys[0] if len(keys) == 1 else _key(sorted(keys))
    tokenizer = build_tokenizer(config, key, lambda: _text_of_all(found))
    opened = {}
    for name, source in found.items():
        with _named(name):
            opened[name] = source.corpus(tokenizer, corpora, sequence_length, processes)
    return opened


def alone_by_name(config: DataConfig) -> dict[str, DataConfig]:
    """Returns the configuration of each source by itself, or the configuration under an empty name without sources."""
    if not config.sources:
        return {"": config}
    return {
        name: replace(config, path=source.path, field=source.field or config.field, stream=source.stream, sources={})
        for name, source in config.sources.items()
    }


def is_prepared(path: str | None) -> bool:
    """Tells whether a path is a folder of tokens that tedlab has written; others, too, may have a ``meta.json``."""
    return path is not None and all(os.path.isfile(Path(path).expanduser() / name) for name in (_META, _LEFT_OUT))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the name of a source before what is said of it."""
    try:
        yield
    except _ERRORS as error:
        if not name:
            raise
        kind = next(kind for kind in _ERRORS if isinstance(error, kind))
        said = re.sub(r"data\.(path=|stream)", r"\1", str(error))
        raise kind(f"data.sources.{name}: {said}") from None


def _text_of_all(found: "dict[str, _Cached | _Prepared]") -> Iterator[str]:
    for name, source in found.items():
        with _named(name):
            yield from source.text()


class _Prepared:
    """A folder that tedlab has written."""

    def __init__(self, config: DataConfig) -> None:
        assert config.path is not None
        self.directory, self.named = Path(config.path).expanduser(), config.tokenizer
        self.key = str(self.directory.resolve())

    def text(self) -> Iterator[str]:
        raise ValueError(
            f"data.tokenizer=bpe is trained on text, but {self.directory} holds tokens; use data.tokenizer="
            f"{self.directory / SAVED}, with which they were made."
        )

    def corpus(self, tokenizer: Tokenizer, corpora: Path, sequence_length: int, processes: int) -> Corpus:
        if damage := _damage(self.directory, tokenizer):
            raise ValueError(f"{self.directory} cannot be used: {damage}.")
        return _open(self.directory, tokenizer, sequence_length, [])


class _Cached(ABC):
    """Text whose tokens are kept in the cache."""

    key: str  # of all that they depend on, but the tokenizer
    files: list[SourceFile]  # those of this machine, which must stay as they are

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.no_files: list[LeftOut] = []  # what the search left out, and what turned out to be no text
        self.no_text: list[LeftOut] = []

    @abstractmethod
    def text(self) -> Iterator[str]:
        """Yields training text, to train a tokenizer on it."""

    @abstractmethod
    def written(self, tokenizer: Tokenizer, complete: Path, directory: Path, processes: int) -> dict[str, Any]:
        """Writes tokens into ``complete``, which is to become ``directory``; returns what there is to know of them."""

    def corpus(self, tokenizer: Tokenizer, corpora: Path, sequence_length: int, processes: int) -> Corpus:
        directory = corpora / _key(self.key, tokenizer.fingerprint)
        if not directory.exists() or _damage(directory, tokenizer):  # else nobody need wait for anybody
            with _alone_with(directory):
                if damage := directory.exists() and _damage(directory, tokenizer):
                    print(f"The cached corpus {directory} is made anew: {damage}.", file=sys.stderr)
                    _set_aside(directory)
                if not directory.exists():
                    try:
                        self._build(tokenizer, directory, processes)
                    except OSError:
                        if not directory.exists():  # else, where files cannot be locked, another process was faster
                            raise
        return _open(directory, tokenizer, sequence_length, self.no_files)

    def _build(self, tokenizer: Tokenizer, directory: Path, processes: int) -> None:
        with scratch("corpus", directory.parent) as temporary:
            complete = temporary / directory.name
            complete.mkdir()
            meta = self.written(tokenizer, complete, directory, processes)
            _refuse_changed(self.files)
            meta |= {
                "tokenizer": tokenizer.fingerprint,
                "digests": [digest_of(tokens) for tokens in _tokens_of(complete, meta, tokenizer)],
            }
            as_of = [[name, *_size_and_time(complete / name)] for name in _files_of(meta)]
            (complete / _AS_OF).write_text(json.dumps(as_of) + "\n")
            (complete / _META).write_text(json.dumps(meta, indent=2) + "\n")
            (complete / _LEFT_OUT).write_text(json.dumps([astuple(file) for file in self.no_text], indent=2) + "\n")
            tokenizer.save(complete)
            complete.rename(directory)
            _forget_begun(directory)


class _Found(_Cached):
    """The files of a source."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        path = config.path and whole_pair(config.path)
        self.files = find_files(path, self.no_files, Path(config.cache_dir).expanduser())
        if len(self.files) == 1 and path is not None and holds_tokens(self.files[0].path):
            self.files += _index_of(self.files[0])
        described = [[file.name, file.size, file.modified_ns] for file in self.files]
        root = path and os.path.realpath(os.path.expanduser(path))  # copies may have other content under equal names
        self.key = _key(root, described, config.field, config.validation_fraction, installed())

    @cached_property
    def copies(self) -> list[Copies]:
        with advancing("Reading", _size(self.files)) as advance:
            copies = usable(self.files, self.config.field, self.no_text, advance)
        self.no_text += not_read(copies)
        return copies

    @cached_property
    def sides(self) -> tuple[list[Source], list[Source]]:
        return divided(self.copies, self.config.validation_fraction, self.config.field)

    @override
    def text(self) -> Iterator[str]:
        for file in self.files:
            if holds_tokens(file.path):
                raise ValueError(
                    f"data.tokenizer=bpe is trained on text, but {file.path} holds tokens; name the tokenizer that has "
                    "made them (a JSON file), or byte."
                )
        train, _ = self.sides
        with advancing("Training the tokenizer", _size(train)) as advance:
            for source in train:
                yield from chain.from_iterable(text_of(source, advance))
        _refuse_changed(self.files)

    @override
    def written(self, tokenizer: Tokenizer, complete: Path, directory: Path, processes: int) -> dict[str, Any]:
        try:
            meta = self._mapped(tokenizer) or self._written(tokenizer, complete, directory, processes)
        except (ValueError, FileNotFoundError):  # what is wrong with the text must change, and with it all parts
            _forget_begun(directory)
            raise
        meta["source_files"] = sum(not is_index(file.path) for file in self.files) - len(self.no_text)
        return meta

    def _mapped(self, tokenizer: Tokenizer) -> dict[str, Any] | None:
        """Says how a single file of tokens is divided; None if it is not one, or lacks separators to be added."""
        files = [file for file in self.files if not is_index(file.path)]
        if len(files) > 1 and any(holds_tokens(file.path) for file in files):
            files = [group[0][0] for group in self.copies]  # the others may be no text, or its copies
        if len(files) > 1 or not holds_tokens(files[0].path):
            return None
        path, fraction = files[0].path, self.config.validation_fraction
        try:
            found = open_tokens(path)
        except DamagedTokens as error:
            raise ValueError(f"{path} cannot be used: {error}.") from None
        refuse_unknown(found.tokens, tokenizer.vocab_size, path)
        if found.ends is None:
            cut = _separator_after(found.tokens, tokenizer.separator, round(len(found.tokens) * (1 - fraction)))
        else:
            without = int((found.tokens[found.ends - 1] != tokenizer.separator).sum())
            if without:
                print(
                    f"{path}: {without:,} of {len(found.ends):,} documents do not end with the separator "
                    f"({tokenizer.separator}), which a copy in the cache adds.",
                    file=sys.stderr,
                )
                return None
            cut = document_cut(found.ends, fraction)
        decoded = found.tokens[cut : cut + _DECODED]
        return {
            "train": cut,
            "validation": len(found.tokens) - cut,
            "bytes_per_token": bytes_of(decoded, tokenizer) / max(1, len(decoded)),
            "mapped": str(path.resolve()),
        }

    def _written(self, tokenizer: Tokenizer, complete: Path, directory: Path, processes: int) -> dict[str, Any]:
        """Writes ``train.bin`` and ``validation.bin``."""
        parts = [part for name, side in zip(_SPLITS, self.sides, strict=True) for part in divide(name, side)]
        # A part is known by its number, so those done before count only if the files in them are the same: one that
        # could not be read then may be readable now.
        work = directory.with_name(f"{directory.name}-{_key(repr(parts))}{_BEGUN}")
        _forget_abandoned(directory.parent, but=work)
        work.mkdir(exist_ok=True)
        written = done_before(work, dtype_of(tokenizer).itemsize)
        left = [part for part in parts if (part.split, part.number) not in written]
        if written:
            print(f"{len(written)} of {len(parts)} parts were done before.", file=sys.stderr, flush=True)
        with advancing("Tokenising", sum(part.size for part in left)) as advance:
            written |= write_parts(left, tokenizer, work, processes, advance)
        _refuse_changed(self.files)
        (train, _), (validation, size) = (join(written, name, complete / f"{name}.bin") for name in _SPLITS)
        return {"train": train, "validation": validation, "bytes_per_token": size / max(1, validation)}


class _Streamed(_Cached):
    """A data set that is read as a stream, up to a number of tokens."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        stream = config.stream
        check_stream(stream)
        self.files = local_files(stream)
        described = [[os.path.realpath(file.path), file.size, file.modified_ns] for file in self.files]
        self.key = _key("stream", asdict(stream), described, config.field, config.validation_fraction)

    @override
    def text(self) -> Iterator[str]:
        stream, size = Stream(self.config.stream, self.config.field), 0
        held_out = self._held_out
        with advancing("Training the tokenizer", _LEARNED) as advance:
            for batch in stream.batches(self.config.stream.split):
                for number, text in enumerate(batch.texts, start=batch.before):
                    if held_out is None or not is_held_out(number, held_out):
                        yield text
                        learned = len(text.encode())
                        advance(learned)
                        size += learned
                        if size >= _LEARNED:
                            return

    @property
    def _held_out(self) -> float | None:
        """The share of documents that is held out; None: validation has a split of its own."""
        return self.config.validation_fraction if self.config.stream.validation is None else None

    @override
    def written(self, tokenizer: Tokenizer, complete: Path, directory: Path, processes: int) -> dict[str, Any]:
        """Whatever goes wrong, what has been read stays: it may be a token of the Hub that has run out."""
        work = directory.with_name(f"{directory.name}-stream{_BEGUN}")
        _forget_abandoned(directory.parent, but=work)
        stream = Stream(self.config.stream, self.config.field, begun_at(work))
        config, dtype = self.config.stream, dtype_of(tokenizer)
        assert config.tokens is not None
        reading = Reading(stream, tokenizer, work, processes)
        written = reading.read("train", config.split, config.tokens, self._held_out)
        if config.validation is not None:
            enough = max(1, round(config.tokens * self.config.validation_fraction))
            written |= reading.read("validation", config.validation, enough)
        (train, _), (validation, size) = (join(written, name, complete / f"{name}.bin") for name in _SPLITS)
        if train > config.tokens:
            tokens = np.memmap(complete / "train.bin", dtype, "r")
            train = _end_of_document(tokens, tokenizer.separator, config.tokens - 1) or train
            os.truncate(complete / "train.bin", train * dtype.itemsize)
        return {
            "train": train,
            "validation": validation,
            "bytes_per_token": size / max(1, validation),
            "source_files": stream.files(config.split),
            "stream": {**asdict(config), "revision": stream.revision},
        }


def _index_of(file: SourceFile) -> list[SourceFile]:
    index = file.path.with_suffix(".idx")
    if not index.is_file():
        return []
    status = index.stat()
    return [SourceFile(index.name, index, status.st_size, status.st_mtime_ns)]


def _separator_after(tokens: np.ndarray, separator: int, start: int) -> int:
    """Returns where the first document after ``start`` begins, or ``start`` if no other does."""
    end = _end_of_document(tokens, separator, start)
    return start if end in (None, len(tokens)) else end


def _end_of_document(tokens: np.ndarray, separator: int, start: int) -> int | None:
    """Returns how many tokens there are up to the first separator from ``start`` on, which counts, if there is one."""
    for first in range(start, len(tokens), _DECODED):
        places = np.flatnonzero(tokens[first : first + _DECODED] == separator)
        if len(places):
            return first + int(places[0]) + 1
    return None


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:16]


@contextmanager
def _alone_with(directory: Path) -> Iterator[None]:
    """Waits until no other process works on a folder of the cache."""
    path = directory.with_suffix(".lock")
    waiting = False
    while (lock := Lock.on(path)) is None:
        if not waiting:
            print(f"Waiting for another process, which prepares {directory}.", file=sys.stderr, flush=True)
            waiting = True
        time.sleep(0.1)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def _forget_begun(directory: Path) -> None:
    """Removes the parts of a corpus."""
    for work in directory.parent.glob(f"{directory.name}-*{_BEGUN}"):
        shutil.rmtree(work, ignore_errors=True)


def _forget_abandoned(corpora: Path, but: Path) -> None:
    """Removes what was begun long ago and never finished, such as of text that has changed since, but for one."""
    for work in {*corpora.glob(f"*{_BEGUN}")} - {but}:
        with suppress(FileNotFoundError):  # another process removes its own
            if time.time() - work.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(work, ignore_errors=True)


def _damage(directory: Path, tokenizer: Tokenizer) -> str | None:
    """Says what is wrong with a prepared corpus; returns None if it is sound.

    A killed process cannot leave a truncated file; a failing disk or machine, or somebody editing by hand, can. Files
    with the size and time that they had are sound. If the time is another, as in a copy, all tokens are read.
    """
    try:
        meta = json.loads((directory / _META).read_text())
        json.loads((directory / _LEFT_OUT).read_text())
        if meta["tokenizer"] != tokenizer.fingerprint:
            known = directory / SAVED
            return (
                f"its tokens are of the tokenizer {meta['tokenizer']}, and data.tokenizer is {tokenizer.fingerprint}; "
                f"data.tokenizer={known if known.is_file() else 'byte'} is the one"
            )
        touched = None
        for name, size, modified_ns in json.loads((directory / _AS_OF).read_text()):
            now, when = _size_and_time(directory / name)
            if now != size:
                return f"{name} has {now:,} bytes in place of {size:,}"
            touched = name if when != modified_ns else touched
        if touched and meta["digests"] != [digest_of(tokens) for tokens in _tokens_of(directory, meta, tokenizer)]:
            return f"{touched} has changed since its ids were checked"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error) or type(error).__name__
    return None


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _files_of(meta: dict[str, Any]) -> list[str]:
    """Returns the files that hold the tokens of a corpus, as seen from its folder."""
    if "mapped" not in meta:
        return [f"{name}.bin" for name in _SPLITS]
    index = Path(meta["mapped"]).with_suffix(".idx")
    return [meta["mapped"], *([str(index)] if is_index(index) else [])]


def _tokens_of(directory: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Maps the tokens of training and of validation."""
    if "mapped" in meta:
        tokens = open_tokens(Path(meta["mapped"])).tokens
        return tokens[: meta["train"]], tokens[meta["train"] :]
    dtype = dtype_of(tokenizer)
    train, validation = (
        np.memmap(directory / f"{name}.bin", dtype, "r") if meta[name] else np.empty(0, dtype) for name in _SPLITS
    )
    return train, validation


def _set_aside(directory: Path) -> None:
    """Removes a folder in one rename."""
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


def _open(directory: Path, tokenizer: Tokenizer, sequence_length: int, no_files: list[LeftOut]) -> Corpus:
    meta = json.loads((directory / _META).read_text())
    no_text = [LeftOut(*file) for file in json.loads((directory / _LEFT_OUT).read_text())]
    left_out = sorted([*no_files, *no_text])
    needed = sequence_length + 1
    if any(meta[name] < needed for name in _SPLITS):
        missing = f" {len(left_out)} files were left out: {listed(left_out)}." if left_out else ""
        raise ValueError(
            f"The corpus is too short: it has {meta['train']} training and {meta['validation']} validation tokens, and "
            f"one sample of model.sequence_length={sequence_length} needs {needed} in each split. Use more text, a "
            f"shorter sequence_length, or another data.validation_fraction.{missing}"
        )
    train, validation = _tokens_of(directory, meta, tokenizer)
    return Corpus(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        bytes_per_token=meta["bytes_per_token"],
        directory=directory,
        left_out=tuple(left_out),
        source_files=meta["source_files"],
        digest=meta["digests"][0],
    )


def _size(files: Sequence[SourceFile | Source]) -> int:
    """Returns the bytes of some files."""
    return sum(file.size for file in files)
