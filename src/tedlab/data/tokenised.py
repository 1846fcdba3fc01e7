"""Opens files that hold tokens already: Megatron's pairs of ``.bin`` and ``.idx``, and NumPy's ``.npy``.

They are mapped, not read. ``corpus.py`` checks that their tokens are of ``data.tokenizer``.

Source of the layout of an index: Megatron-Core's ``indexed_dataset`` (version 1), little-endian throughout: nine bytes
``MMIDIDX``, the version (8 bytes), a code of the tokens' dtype (1), the numbers of sequences and of document boundaries
(8 each), the length of each sequence (4), where in the ``.bin`` it begins, in bytes (8), and the number of sequences
before each boundary of documents (8). A byte for each sequence may follow.
"""

import os
import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

MEGATRON = b"MMIDIDX\0\0"
_NUMPY = b"\x93NUMPY"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = (6, 7)
_CHUNK = 1 << 22  # tokens checked at a time


class DamagedTokens(ValueError):
    """A file of tokens cannot be used; the message is a clause that begins with "it" or "its index"."""


@dataclass(frozen=True)
class TokenFile:
    """Tokens in a file.

    Attributes:
        tokens: Shape (tokens,), any integer dtype, mapped.
        ends: How many tokens there are up to the end of each document, int64, shape (documents,); None: the file does
            not say, and documents are what separators divide.
    """

    tokens: np.ndarray
    ends: np.ndarray | None = None


def is_index(path: Path) -> bool:
    """Tells whether a file is the index of a file of tokens beside it, by the names of both."""
    return path.suffix == ".idx" and path.with_suffix(".bin").is_file()


def holds_tokens(path: Path) -> bool:
    """Tells whether a file is said to hold tokens by its name, and for a ``.bin`` by an index beside it."""
    return path.suffix == ".npy" or (path.suffix == ".bin" and path.with_suffix(".idx").is_file())


def whole_pair(path: str) -> str:
    """Returns the ``.bin`` that a path means, if it is that of an index, or what both files' names begin with."""
    given = Path(path).expanduser()
    stem = given.with_suffix("") if given.suffix == ".idx" else given
    pair = [Path(f"{stem}{suffix}") for suffix in (".bin", ".idx")]
    return str(pair[0]) if all(map(os.path.isfile, pair)) else path


def open_tokens(path: Path) -> TokenFile:
    """Maps a file of tokens.

    Args:
        path: A ``.npy`` file, or a ``.bin`` with its ``.idx`` beside it.

    Raises:
        DamagedTokens: If the file or its index is damaged, or holds something else.
        OSError: If it cannot be read.
    """
    return _numpy(path) if path.suffix == ".npy" else _megatron(path)


def _numpy(path: Path) -> TokenFile:
    with path.open("rb") as file:
        head = file.read(len(_NUMPY))
    if head != _NUMPY:
        raise DamagedTokens(f"it is no NumPy array: it begins with {head!r} in place of {_NUMPY!r}")
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a header is an expression, in which anything may stand
        raise DamagedTokens(
            f"it is no NumPy array that can be mapped ({str(error).partition(chr(10))[0].rstrip('.')})"
        ) from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise DamagedTokens(
            f"it is a NumPy array of shape {tokens.shape} and dtype {tokens.dtype}; token ids are whole numbers in one "
            "dimension"
        )
    if not len(tokens):
        raise DamagedTokens("it holds no tokens")
    return TokenFile(tokens)


def _megatron(path: Path) -> TokenFile:
    content = path.with_suffix(".idx").read_bytes()
    if len(content) < _HEADER.size:
        raise DamagedTokens(f"its index has {len(content)} bytes, fewer than the {_HEADER.size} of a header")
    magic, version, code, sequences, boundaries = _HEADER.unpack_from(content)
    if magic != MEGATRON:
        raise DamagedTokens(f"its index begins with {magic!r} in place of {MEGATRON!r}, so that it is not Megatron's")
    if version != 1:
        raise DamagedTokens(f"its index is of version {version}; version 1 can be read")
    if code not in _DTYPES:
        what = "floating-point numbers" if code in _FLOATS else "a dtype that is unknown"
        known = ", ".join(map(str, _DTYPES))
        raise DamagedTokens(f"its index says {what} (code {code}); codes of whole numbers are {known}")
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if len(content) not in (expected, expected + sequences):
        raise DamagedTokens(
            f"its index has {len(content):,} bytes, but {sequences:,} sequences and {boundaries:,} boundaries of "
            f"documents take {expected:,}: it is cut short, or not all of it was written"
        )
    dtype = np.dtype(_DTYPES[code])
    lengths = np.frombuffer(content, "<i4", sequences, _HEADER.size).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", sequences, _HEADER.size + 4 * sequences)
    documents = np.frombuffer(content, "<i8", boundaries, _HEADER.size + 12 * sequences)
    after = np.cumsum(lengths)
    if (lengths < 0).any() or not np.array_equal(pointers, (after - lengths) * dtype.itemsize):
        wrong = int(np.argmax((lengths < 0) | (pointers != (after - lengths) * dtype.itemsize)))
        raise DamagedTokens(f"its index says of sequence {wrong:,} that it begins where the one before does not end")
    if not boundaries or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise DamagedTokens(f"its index divides {sequences:,} sequences into documents that are not one after another")
    total, size = int(after[-1]) if sequences else 0, path.stat().st_size
    if size != total * dtype.itemsize:
        raise DamagedTokens(
            f"it has {size:,} bytes, but its index says {total:,} tokens of {dtype.itemsize} bytes, so "
            f"{total * dtype.itemsize:,}"
        )
    if not total:
        raise DamagedTokens("it holds no tokens")
    ends = np.concatenate([[0], after])[documents[1:]]
    return TokenFile(np.memmap(path, dtype, "r"), np.unique(ends[ends > 0]))


def refuse_unknown(tokens: np.ndarray, vocab_size: int, path: Path, before: int = 0) -> None:
    """Checks that ids are those of a tokenizer.

    Args:
        tokens: Ids, shape (tokens,).
        vocab_size: One more than the largest id.
        path: The file that they are of.
        before: How many tokens of the file come before them.

    Raises:
        ValueError: naming the first id that is not.
    """
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        if int(chunk.max()) >= vocab_size or int(chunk.min()) < 0:
            first = int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
            raise ValueError(
                f"Token {before + start + first:,} of {path} is {chunk[first]}, but the ids of data.tokenizer are 0 to "
                f"{vocab_size - 1:,}: another tokenizer has made them."
            )


def digest_of(tokens: np.ndarray) -> str:
    """Returns a hash of tokens, shape (tokens,), and of their dtype."""
    digest = blake2b(tokens.dtype.str.encode(), digest_size=16)
    for start in range(0, len(tokens), _CHUNK):
        digest.update(tokens[start : start + _CHUNK].data)
    return digest.hexdigest()
