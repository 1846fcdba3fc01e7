"""Reads data sets as streams, through Hugging Face ``datasets``: of each no more is downloaded than is read.

``corpus.py`` turns what is read into tokens in the cache, from which alone a run reads. A position in a stream is that
of ``datasets`` (``IterableDataset.state_dict``): it names the file, and the row in it, so that a reading that goes on
reads the files before that one no more. To count documents would read all of them again.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
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
_GOES_ON = "With a network, the same command goes on where it was; what `tedlab data prepare` has prepared needs none."
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
        self._files: dict[str, int] = {}  # of the splits that have been opened
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
                _folder(config) or config.dataset, config.config, data_files=_files(config), revision=self.revision
            )
        kinds = [kind.__module__ for kind in type(builder).__mro__]
        if "datasets.packaged_modules.cache.cache" in kinds:  # what datasets has prepared takes the place of the Hub
            raise Unreachable(f"{self.name} cannot be reached. {_GOES_ON}")
        if not any(kind.startswith(f"datasets.packaged_modules.{name}.") for name in FORMATS for kind in kinds):
            raise _Refused(
                f"{self.name} is read by the builder {type(builder).__name__}; tedlab reads those of "
                f"{', '.join(FORMATS)} alone, which run nothing"
            )
        self._refuse_others([file for of in (builder.config.data_files or {}).values() for file in of])
        if hasattr(builder.config, "converters"):  # of CSV, whose texts may look like numbers, or like "NA"
            builder.config.converters, builder.config.na_filter = {self.column: str}, False
        if hasattr(builder.config, "columns"):  # of Parquet
            builder.config.columns = [self.column]
        return builder

    def _refuse_others(self, files: Sequence[str]) -> None:
        """Refuses files that only a card can have named; of those on this machine, what the cache does not know."""
        config = self.config
        if is_at_the_hub(config):
            others = [file for file in files if not file.startswith(f"hf://datasets/{config.dataset}@")]
        elif _is_remote(config.files or ""):
            others = [file for file in files if not _is_remote(file)]
        else:
            own = {os.path.realpath(file.path) for file in local_files(config)}
            others = [f for f in files if _is_remote(f) or (os.path.realpath(_place(f)) not in own and not _empty(f))]
        if others:
            raise _Refused(f"{self.name}{_of(config)} names files that are not its own, such as {others[0]}")

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"data.stream.dataset={self.config.dataset}"

    def files(self, split: str) -> int:
        """Returns of how many files a split is."""
        if split not in self._files:
            self._opened(split)
        return self._files[split]

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
        self._files[split] = dataset.num_shards
        self._builder.info.features = None  # else files must all have the same columns
        if not dataset.features:  # only its rows will tell
            return dataset
        if self.column not in dataset.features:
            raise self._no_column(dataset.features)
        kind = getattr(dataset.features[self.column], "dtype", None)
        if kind not in ("string", "large_string"):
            raise _Refused(f"The column {self.column!r} of {self.name} holds {kind or 'no plain values'}, not text")
        dataset = dataset.select_columns([self.column])
        dataset.info.features = None  # else what another file holds, such as dates, would be written as text
        return dataset

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
        except (_Refused, Unreachable):
            raise
        except StopIteration:
            raise _Refused(f"{name}{_of(config)} has no rows") from None
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
                if 400 <= (_status(error) or 0) < 500:
                    raise _Refused(
                        f"{name}{_of(config)} cannot be read{what and f' ({what})'}, as the server says: "
                        f"{_first_line(error)}"
                    ) from None
                missing = isinstance(error, FileNotFoundError) and not is_at_the_hub(config)  # or so datasets says
                raise Unreachable(
                    f"{name} cannot be reached{', or has no such file' if missing else ''}{what and f' ({what})'}: "
                    f"{_first_line(error)}. {_GOES_ON}"
                ) from None
            if what and (isinstance(error, KeyError) or "No match for FieldRef" in f"{error}"):
                raise _Refused(f"{name} ({what}) has a file without the column {self.column!r}") from None
            if isinstance(error, (OSError, ValueError)):
                raise _Refused(
                    f"{name}{_of(config)} cannot be read{what and f' ({what})'}: {_first_line(error)}"
                ) from None
            raise


def is_at_the_hub(config: StreamConfig) -> bool:
    """Tells whether a data set is neither a folder nor files of a format."""
    return config.dataset not in FORMATS and not _folder(config)


def local_files(config: StreamConfig) -> list[SourceFile]:
    """Returns the files on this machine that a data set may be read from: those of its folder, or of ``files``.

    Raises:
        FileNotFoundError: If there are none.
    """
    if is_at_the_hub(config) or _is_remote(config.files or ""):
        return []
    if config.files is None:
        return _found(str(_folder(config)), "dataset")
    return _found(os.path.join(_folder(config) or "", _place(str(_files(config)))), "files")


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
        others = [field.name for field in fields(config) if getattr(config, field.name) != field.default]
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
    remote = is_at_the_hub(config) or _is_remote(config.files or "")
    names = {kind.__name__ for kind in type(error).__mro__}
    return remote and (isinstance(error, OSError) or "TransportError" in names or _status(error) is not None)


def _status(error: Exception) -> int | None:
    """Returns what a server has answered to a client of HTTP, if it is why."""
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _folder(config: StreamConfig) -> str | None:
    """Returns the path of the folder that a data set is, if it is one."""
    folder = os.path.abspath(os.path.expanduser(config.dataset or ""))
    return folder if config.dataset and config.dataset not in FORMATS and os.path.isdir(folder) else None


def _files(config: StreamConfig) -> str | None:
    return config.files and os.path.expanduser(config.files)


def _place(file: str) -> str:
    """Returns where a file is that may be in an archive (``zip://file::archive``)."""
    return file.rpartition("::")[2].removeprefix("file://")


def _is_remote(file: str) -> bool:
    return "://" in _place(file)


def _empty(file: str) -> bool:
    return not os.path.getsize(_place(file))


def _found(path: str, value: str) -> list[SourceFile]:
    try:
        return find_files(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}".replace("data.path", f"data.stream.{value}")) from None


def _of(config: StreamConfig) -> str:
    return "" if config.files is None else f" (data.stream.files={config.files})"


def _first_line(error: BaseException) -> str:
    return (f"{error}".strip() or type(error).__name__).splitlines()[0].rstrip(".:")
