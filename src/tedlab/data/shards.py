"""Tokenises sources part by part, in several processes if asked. Parts done before a process was killed stay done.

A part becomes one file, whose name has its number and how many tokens and bytes of text it holds. Files appear under
these names only when they are complete. ``corpus.py`` says where, and joins them.
"""

import multiprocessing
import os
import re
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tedlab.data import formats
from tedlab.data.documents import Source
from tedlab.data.tokenised import refuse_unknown
from tedlab.data.tokenizers import Tokenizer
from tedlab.interrupts import fork_server

_DONE = re.compile(r"(\w+)-(\d+)\.(\d+)\.(\d+)\.bin")
_tokenizer: Tokenizer  # of a worker process


class Part(NamedTuple):
    """What is tokenised at once: sources that follow one another.

    Attributes:
        split: The name of the split that they are of.
        number: How many parts of the split come before.
        sources: The sources.
    """

    split: str
    number: int
    sources: tuple[Source, ...]

    @property
    def size(self) -> int:
        """Number of bytes that are read."""
        return sum(source.size for source in self.sources)


class Written(NamedTuple):
    """A part that is done.

    Attributes:
        path: The file with its tokens.
        tokens: How many there are, separators included.
        text_bytes: UTF-8 bytes of its text; of what was tokenised before, only where it is held out.
    """

    path: Path
    tokens: int
    text_bytes: int


def divide(split: str, sources: Sequence[Source]) -> list[Part]:
    """Divides the sources of a split into parts of about as many bytes. They depend on the sources alone."""
    parts: list[Part] = []
    gathered: list[Source] = []
    size = 0
    for source in sources:
        for part in source.parts():
            if gathered and size + part.size > formats.PART:
                parts.append(Part(split, len(parts), tuple(gathered)))
                gathered, size = [], 0
            gathered.append(part)
            size += part.size
    return [*parts, Part(split, len(parts), tuple(gathered))] if gathered else parts


def done_before(folder: Path, itemsize: int) -> dict[tuple[str, int], Written]:
    """Returns the parts that are done in a folder, by split and number."""
    found = {}
    for path in folder.glob("*.bin"):
        if match := _DONE.fullmatch(path.name):
            split, number, tokens, text_bytes = match[1], *map(int, match.groups()[1:])
            if path.stat().st_size == tokens * itemsize:
                found[split, number] = Written(path, tokens, text_bytes)
    return found


def write_parts(
    parts: Sequence[Part], tokenizer: Tokenizer, folder: Path, processes: int, advance: Callable[[int], object]
) -> dict[tuple[str, int], Written]:
    """Tokenises parts into a folder.

    Args:
        parts: The parts.
        tokenizer: Encodes them.
        folder: Receives a file for each.
        processes: How many work at once; 1: this one alone.
        advance: Called with the size of each part that is done.

    Raises:
        ValueError: If a text cannot be used.
        RuntimeError: If a process died.
    """
    written = {}
    processes = min(processes, len(parts))
    if processes <= 1:
        for part in parts:
            written[part.split, part.number] = write_part(part, tokenizer, folder)
            advance(part.size)
        return written
    with _workers(tokenizer, processes) as pool:
        futures: dict[Future[Written], Part] = {pool.submit(_write_in_worker, part, folder): part for part in parts}
        with _explained(processes):
            for future in as_completed(futures):
                part = futures[future]
                written[part.split, part.number] = future.result()
                advance(part.size)
    return written


def write_in_order(
    batches: Iterator[Sequence[Part]], tokenizer: Tokenizer, folder: Path, processes: int
) -> Iterator[list[Written]]:
    """Tokenises batches of parts into a folder, a few ahead of what is asked for.

    Args:
        batches: The parts of each batch, made as they are needed.
        tokenizer: Encodes them.
        folder: Receives a file for each part.
        processes: How many work at once; 1: this one alone.

    Yields:
        What was written of each batch.

    Raises:
        ValueError: If a text cannot be used.
        RuntimeError: If a process died.
    """
    if processes <= 1:
        for batch in batches:
            yield [write_part(part, tokenizer, folder) for part in batch]
        return
    with _workers(tokenizer, processes) as pool:
        ahead: deque[list[Future[Written]]] = deque()
        with _explained(processes):
            while True:
                for batch in islice(batches, 2 * processes - len(ahead)):
                    ahead.append([pool.submit(_write_in_worker, part, folder) for part in batch])
                if not ahead:
                    return
                yield [future.result() for future in ahead.popleft()]


def write_part(part: Part, tokenizer: Tokenizer, folder: Path) -> Written:
    """Tokenises a part into a file of a folder."""
    tokens = text_bytes = 0
    separator = np.array([tokenizer.separator], dtype=dtype_of(tokenizer))
    descriptor, unfinished = tempfile.mkstemp(dir=folder, suffix=".unfinished")
    with os.fdopen(descriptor, "wb") as file:
        for source in part.sources:
            for document in source.documents(lambda size: None):
                last = None
                for block in document:
                    ids, size = _encoded(block, tokenizer, source, part.split)
                    text_bytes += size
                    file.write(ids.tobytes())
                    last = ids[-1] if len(ids) else last
                if source.ends and last != tokenizer.separator:  # what was tokenised before may have it
                    file.write(separator.tobytes())
        tokens = file.tell() // separator.itemsize
        file.flush()
        os.fsync(file.fileno())
    path = folder / f"{part.split}-{part.number:06d}.{tokens}.{text_bytes}.bin"
    os.replace(unfinished, path)
    return Written(path, tokens, text_bytes)


def join(written: Mapping[tuple[str, int], Written], split: str, path: Path) -> tuple[int, int]:
    """Writes the parts of a split into one file, in order; returns the numbers of tokens and of bytes of text."""
    tokens = text_bytes = 0
    with path.open("wb") as file:
        for _, part in sorted((key, part) for key, part in written.items() if key[0] == split):
            with part.path.open("rb") as content:
                shutil.copyfileobj(content, file, 1 << 20)
            tokens, text_bytes = tokens + part.tokens, text_bytes + part.text_bytes
    return tokens, text_bytes


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Returns the dtype of token files: the smallest unsigned integer that holds every id."""
    return np.dtype(np.min_scalar_type(tokenizer.vocab_size - 1))


def bytes_of(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """Returns how many UTF-8 bytes the text of tokens has, without their separators."""
    return len(tokenizer.decode(tokens[tokens != tokenizer.separator].tolist()).encode())


def _encoded(block: str | np.ndarray, tokenizer: Tokenizer, source: Source, split: str) -> tuple[np.ndarray, int]:
    """Returns the tokens of a block, and how many bytes of text it has."""
    if isinstance(block, str):
        return tokenizer.encode(block), len(block.encode())
    refuse_unknown(block, tokenizer.vocab_size, source.path)
    return block.astype(dtype_of(tokenizer)), bytes_of(block, tokenizer) if split != "train" else 0


@contextmanager
def _explained(processes: int) -> Iterator[None]:
    """Says in a sentence that a worker process died."""
    try:
        yield
    except BrokenProcessPool:
        raise RuntimeError(
            f"One of {processes} processes that tokenise died, perhaps for want of memory. What is done stays "
            "done: start again, with fewer processes if need be."
        ) from None


@contextmanager
def _workers(tokenizer: Tokenizer, processes: int) -> Iterator[Executor]:
    """Provides processes, forked from one that, unlike this one, has no threads and has all imports done."""
    pool = ProcessPoolExecutor(processes, fork_server([__name__]), _begin, (tokenizer,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone; it would wait for ever for something to do."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_in_worker(part: Part, folder: Path) -> Written:
    return write_part(part, _tokenizer, folder)
