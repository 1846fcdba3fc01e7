"""Reads data sets as streams, through Hugging Face ``datasets``: of each no more is downloaded than is read.

``corpus.py`` turns what is read into tokens in the cache, from which alone a run reads. A position in a stream is that
of ``datasets`` (``IterableDataset.state_dict``): it names the file, and the row in it, so that a reading that goes on
opens no file before that one. To count documents would read all of them again.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import Version

from tedlab.config import StreamConfig
from tedlab.data import formats
from tedlab.data.extra import needed
from tedlab.data.files import SourceFile, find_files
from tedlab.hints import did_you_mean

FORMATS = ("json", "csv", "parquet", "arrow", "text")  # of which reading runs nothing; others may unpickle
_OLDEST = Version("5.2")  # of datasets; versions before 4 run scripts of data sets
_PATIENCE_S = 10.0  # for the Hub's first answer
_AT_THE_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Unreachable(ConnectionError):
    """The Hub, or what has the files, does not answer; the message is a sentence."""


class _Refused(ValueError):
    """What is wrong with a data set; the message is a sentence."""


class Batch(NamedTuple):
    """Documents that follow one another.

    Attributes:
        texts: Their texts.
        before: How many documents of the stream come before them.
        after: Where the next begins, for :meth:`Stream.batches`, in plain values.
    """

    texts: tuple[str, ...]
    before: int
    after: dict[str, Any]


@dataclass(frozen=True)
class Texts:
    """Documents that are in memory, as a :class:`tedlab.data.documents.Source`."""

    path: Path
    texts: tuple[str, ...]
    ends = True

    @property
    def size(self) -> int:
        return sum(len(text.encode()) for text in self.texts)

    def documents(self, advance: Any) -> Iterator[list[str]]:
        for text in self.texts:
            yield [text]
        advance(self.size)

    def parts(self) -> "Iterator[Texts]":
        yield self


class Stream:
    """A data set, of which each split can be read from any position.

    Args:
        config: Which it is.
        column: The column that holds the text.
        revision: The commit to read at the Hub; None: that of ``config``.

    Raises:
        MissingExtra: If ``datasets`` is not installed.
        Unreachable: If the Hub does not answer.
        ValueError: If there is no such data set, or reading it might run something.
    """

    def __init__(self, config: StreamConfig, column: str, revision: str | None = None) -> None:
        self.config, self.column = config, column
        self._datasets = needed("datasets", "data.stream")
        if Version(self._datasets.__version__) < _OLDEST:
            raise ValueError(
                f"data.stream needs datasets {_OLDEST} or later, which runs no scripts of data sets; here is "
                f"{self._datasets.__version__}: pip install 'tedlab[data]'"
            )
        self.revision = revision
        if is_at_the_hub(config) and revision is None:
            with self._explained():
                hub = needed("huggingface_hub", "data.stream").HfApi()
                self.revision = hub.dataset_info(config.dataset, revision=config.revision, timeout=_PATIENCE_S).sha

    @cached_property
    def _builder(self) -> Any:
        config = self.config
        with self._explained():
            builder = self._datasets.load_dataset_builder(
                config.dataset, config.config, data_files=config.files, revision=self.revision
            )
        kinds = [kind.__module__ for kind in type(builder).__mro__]
        if not any(kind.startswith(f"datasets.packaged_modules.{name}.") for name in FORMATS for kind in kinds):
            raise _Refused(
                f"{self.name} is read by the builder {type(builder).__name__}; tedlab reads those of "
                f"{', '.join(FORMATS)} alone, which run nothing"
            )
        if is_at_the_hub(config):
            own = f"hf://datasets/{config.dataset}@"
            files = [file for of in (builder.config.data_files or {}).values() for file in of]
            if others := [file for file in files if not file.startswith(own)]:
                raise _Refused(f"{self.name} names files that are not its own, such as {others[0]}")
        return builder

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"data.stream.dataset={self.config.dataset}"

    def files(self, split: str) -> int:
        """Returns of how many files a split is."""
        return self._opened(split).num_shards

    def batches(self, split: str, begun: Mapping[str, Any] | None = None) -> Iterator[Batch]:
        """Yields the documents of a split in batches of about ``formats.PART`` bytes.

        Rows without text, or with NUL in it, are no documents; ``after["left_out"]`` counts them.

        Args:
            split: The split.
            begun: What ``after`` of a batch was, to go on after it; None: from the beginning.

        Raises:
            Unreachable: If the files cannot be reached any more.
            ValueError: If there is no such split or column, or something in it is not text.
        """
        dataset = self._opened(split)
        read, left_out = 0, 0
        if begun is not None:
            dataset.load_state_dict(begun["state"])
            read, left_out = begun["read"], begun["left_out"]
        texts: list[str] = []
        size = 0
        with self._explained(f"the split {split!r}, after {read:,} documents"):
            for row in dataset:
                text = self._text(row, split, read + left_out)
                if text is None:
                    left_out += 1
                    continue
                texts.append(text)
                read, size = read + 1, size + len(text.encode())
                if size >= formats.PART:
                    after = {"state": dataset.state_dict(), "read": read, "left_out": left_out}
                    yield Batch(tuple(texts), read - len(texts), after)
                    texts, size = [], 0
            if texts:
                after = {"state": dataset.state_dict(), "read": read, "left_out": left_out}
                yield Batch(tuple(texts), read - len(texts), after)

    def _opened(self, split: str) -> Any:
        with self._explained():
            try:
                dataset = self._builder.as_streaming_dataset(split=split)
            except ValueError as error:
                known = re.search(r"Available splits: \[(.*)\]", f"{error}")
                if known is None:
                    raise
                raise _Refused(f"{self.name} has no split {split!r}; its splits are {known[1]}") from None
        if dataset.features is None:  # only its rows will tell
            return dataset
        if self.column not in dataset.features:
            raise self._no_column(dataset.features)
        kind = getattr(dataset.features[self.column], "dtype", None)
        if kind not in ("string", "large_string"):
            raise _Refused(f"The column {self.column!r} of {self.name} holds {kind or 'no plain values'}, not text")
        return dataset.select_columns([self.column])

    def _no_column(self, columns: Any) -> _Refused:
        listed = ", ".join(map(repr, columns)) or "none at all"
        return _Refused(
            f"{self.name} has no column {self.column!r}; its columns are {listed}. Set data.field to the one that "
            "holds the text"
        )

    def _text(self, row: Mapping[str, Any], split: str, number: int) -> str | None:
        if self.column not in row:
            raise self._no_column(row)
        text = row[self.column]
        if text is not None and not isinstance(text, str):
            raise _Refused(
                f"Row {number + 1} of the split {split!r} of {self.name} holds a {type(text).__name__} in column "
                f"{self.column!r}, not text"
            )
        return None if text is None or "\0" in text else text

    @contextmanager
    def _explained(self, what: str = "") -> Iterator[None]:
        """Turns what ``datasets`` and its client of the Hub raise into sentences."""
        errors = needed("huggingface_hub.errors", "data.stream")
        config, name = self.config, self.name
        try:
            yield
        except _Refused:
            raise
        except errors.RevisionNotFoundError:
            raise _Refused(f"{name} has no revision {config.revision}") from None
        except (errors.RepositoryNotFoundError, self._datasets.exceptions.DatasetNotFoundError):
            raise _Refused(
                f"{name}: the Hub has no such data set, or shows it to some users alone (`hf auth login`)"
            ) from None
        except self._datasets.exceptions.DatasetsError as error:
            raise _Refused(f"{name}{_of(config)} has no file that can be read: {_first_line(error)}") from None
        except errors.HfHubHTTPError as error:
            raise Unreachable(f"{name} cannot be read{what and f' ({what})'}: {_first_line(error)}.") from None
        except RuntimeError as error:
            if "script" not in f"{error}":
                raise
            raise _Refused(
                f"{name} is a script, which tedlab does not run. data.stream.revision=refs/convert/parquet may have "
                "its rows"
            ) from None
        except Exception as error:
            if known := re.search(r"BuilderConfig .* not found. Available: \[(.*)\]", f"{error}"):
                raise _Refused(
                    f"{name} has no configuration {config.config!r}; its configurations are {known[1]}"
                ) from None
            if known := re.search(r"among the available configs: \[(.*)\]", f"{error}"):
                raise _Refused(f"{name} has several configurations: data.stream.config is one of {known[1]}") from None
            if _is_of_the_network(error, config):
                raise Unreachable(
                    f"{name} cannot be reached{what and f' ({what})'}: {_first_line(error)}. With a network, the same "
                    "command goes on where it was; what `tedlab data prepare` has prepared needs none."
                ) from None
            if isinstance(error, (OSError, ValueError)):
                raise _Refused(
                    f"{name}{_of(config)} cannot be read{what and f' ({what})'}: {_first_line(error)}"
                ) from None
            raise


def is_at_the_hub(config: StreamConfig) -> bool:
    """Tells whether a data set is neither a folder nor files of a format."""
    return config.dataset not in FORMATS and not _folder(config)


def local_files(config: StreamConfig) -> list[SourceFile]:
    """Returns the files of a data set, if they are on this machine.

    Raises:
        FileNotFoundError: If there are none.
    """
    if config.dataset in FORMATS and config.files is not None and "://" not in config.files:
        return _found(config.files)
    return _found(str(config.dataset)) if _folder(config) else []


def check_stream(config: StreamConfig, where: str = "data.") -> None:
    """Checks what can be known of a stream without opening it.

    Args:
        config: The stream.
        where: What stands before the names of its values.

    Raises:
        ValueError: If values are missing, or are given in vain.
    """
    where = f"{where}stream"
    if config.dataset is None:
        others = [name for name in ("config", "files", "validation", "revision", "tokens") if getattr(config, name)]
        if others:
            raise ValueError(f"{where}.{others[0]} is given, but no {where}.dataset")
        return
    if not config.dataset:
        raise ValueError(
            f"{where}.dataset has no value yet: the name of a data set at the Hub, a folder, or a format "
            f"({', '.join(FORMATS)})"
        )
    if config.tokens is None:
        raise ValueError(
            f"{where}.tokens has no value: how many tokens of {config.dataset} are to be trained on; they are read "
            "before training begins, and kept in data.cache_dir"
        )
    if config.dataset in FORMATS and config.files is None:
        raise ValueError(f"{where}.dataset={config.dataset} is a format: {where}.files says which files have it")
    if is_at_the_hub(config) and not _AT_THE_HUB.fullmatch(config.dataset):
        raise ValueError(
            f"{where}.dataset={config.dataset} is neither a folder, nor the name of a data set at the Hub "
            f"(owner/name), nor a format ({', '.join(FORMATS)}){did_you_mean(config.dataset, FORMATS)}"
        )
    if config.revision is not None and not is_at_the_hub(config):
        raise ValueError(
            f"{where}.revision={config.revision} is of a data set at the Hub, which {config.dataset} is not"
        )
    if config.validation == config.split:
        raise ValueError(
            f"{where}.split and {where}.validation are both {config.split!r}, but validation needs other text; leave "
            f"{where}.validation out to hold documents out"
        )


def _is_of_the_network(error: Exception, config: StreamConfig) -> bool:
    """Tells whether a network, or the lack of one, is why; the Hub's client has others' errors for some of it."""
    remote = is_at_the_hub(config) or "://" in (config.files or "")
    names = {kind.__name__ for kind in type(error).__mro__}
    return remote and (isinstance(error, OSError) or "TransportError" in names)


def _folder(config: StreamConfig) -> bool:
    return Path(config.dataset or "").expanduser().is_dir()


def _found(path: str) -> list[SourceFile]:
    try:
        return find_files(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}".replace("data.path", "data.stream")) from None


def _of(config: StreamConfig) -> str:
    return "" if config.files is None else f" (data.stream.files={config.files})"


def _first_line(error: BaseException) -> str:
    return (f"{error}".strip() or type(error).__name__).splitlines()[0].rstrip(".:")
