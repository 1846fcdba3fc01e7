"""Named sets of texts: reads them, and computes a model's loss, perplexity and bits per byte."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tedlab.config import EvalDocuments
from tedlab.data.documents import sources, text_of
from tedlab.data.files import LeftOut, find_files, listed
from tedlab.data.tokenizers import Tokenizer
from tedlab.evaluation.scoring import Score
from tedlab.evaluation.windows import Window, windows


class TextSet(NamedTuple):
    """A named set of texts as tokens.

    Attributes:
        name: Its name, which is part of its metrics' names.
        documents: Token ids of each document, without separators.
        bytes: Size of all documents in UTF-8.
        digest: Of all documents in their order: another one means other text.
        left_out: Files that its path names, but that could not be used.
    """

    name: str
    documents: Sequence[np.ndarray]
    bytes: int
    digest: str
    left_out: Sequence[LeftOut] = ()


@dataclass(frozen=True)
class SetResult:
    """How likely a model finds a set of texts.

    Attributes:
        tokens: How many tokens were predicted, each once, separators at the ends of documents included.
        documents: How many documents there are.
        bytes: Their size in UTF-8.
        windows: How many windows they were cut into.
        loss: The mean loss in nats per token.
        bytes_per_token: The mean of all tokens of the set, separators included, even if not all are predicted.
    """

    tokens: int
    documents: int
    bytes: int
    windows: int
    loss: float
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that exceeds the largest number."""
        return math.exp(self.loss) if self.loss < 709 else self.loss * math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss by the bytes of its text, in bits."""
        return self.loss / (math.log(2) * self.bytes_per_token)

    def metrics(self, name: str, kind: str = "eval") -> dict[str, float]:
        """Returns what is logged of the set of this name, by the names of metrics."""
        values = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return {f"{kind}/{name}/{metric}": value for metric, value in values.items()}


def read_set(name: str, path: str, field: str, tokenizer: Tokenizer) -> TextSet:
    """Reads all documents of a file, folder or glob, as a corpus of training is read.

    Args:
        name: The set's name.
        path: Text files, of which each is a document, or JSONL, of which each line is one.
        field: The field of a JSONL line that holds the text.
        tokenizer: Turns texts into tokens.

    Raises:
        FileNotFoundError: If the path does not exist or names no file.
        ValueError: If it names no text.
    """
    left_out: list[LeftOut] = []
    try:
        files = find_files(path, left_out)
        documents, size, digest = [], 0, hashlib.sha256()
        for source in sources(files, field, left_out):
            for document in text_of(source):
                text = "".join(document)
                written = text.encode()
                size += len(written)
                digest.update(
                    len(written).to_bytes(8, "little") + written
                )  # with lengths: documents may be cut elsewhere
                documents.append(tokenizer.encode(text))
    except (OSError, ValueError) as error:
        said = str(error).replace("data.path=", "its path ").replace("data.field", "field").replace("data.path", "path")
        raise type(error)(f"set {name!r}: {said}") from None
    documents = [document for document in documents if len(document)]
    if not documents:
        raise ValueError(f"set {name!r} has no text: all documents of {path} are empty")
    return TextSet(name, documents, size, digest.hexdigest()[:16], left_out)


def said_of_files(texts: TextSet) -> str | None:
    """Says which files of a set could not be used; None if all were."""
    if not texts.left_out:
        return None
    return f"set {texts.name!r} is without {len(texts.left_out)} of its files: {listed(texts.left_out)}"


def windows_of(texts: TextSet, separator: int, documents: str, context: int, stride: int) -> list[Window]:
    """Cuts a set into windows that predict each token once, and the separator at the end of each document.

    Before the first token stands a separator, which is not predicted, as there would be one in training.

    Args:
        texts: The set.
        separator: The token that ends each document.
        documents: Whether documents are cut one by one, or all end to end.
        context, stride: See :func:`tedlab.evaluation.windows.windows`.
    """
    ending = np.array([separator], dtype=np.int64)
    ended = [np.concatenate([document, ending]) for document in texts.documents]
    streams = [np.concatenate([ending, *ended])] if documents == EvalDocuments.PACKED else None
    apart = streams or [np.concatenate([ending, document]) for document in ended]
    return [window for stream in apart for window in windows(stream, context, stride)]


def result_of(texts: TextSet, found: Sequence[Score]) -> SetResult:
    """Adds up the scores of a set's windows, in their order and without rounding."""
    tokens = sum(score.tokens for score in found)
    total = math.fsum(score.log_likelihood for score in found)
    bytes_per_token = texts.bytes / sum(len(document) + 1 for document in texts.documents)
    return SetResult(tokens, len(texts.documents), texts.bytes, len(found), -total / max(tokens, 1), bytes_per_token)
