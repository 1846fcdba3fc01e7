"""``tedlab data prepare`` and ``tedlab data inspect``: tokenise a corpus for training, and look at its documents."""

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tedlab.commands.application import hydra_entry
from tedlab.config import Packing, TrainConfig
from tedlab.errors import UsageError
from tedlab.hints import did_you_mean
from tedlab.ranges import whole

if TYPE_CHECKING:
    from tedlab.data.corpus import Corpus

_WIDE = 100  # characters of a document that are shown


@dataclass
class DataCommandConfig(TrainConfig):
    """The whole configuration of ``tedlab data``."""

    processes: int | None = whole(None, least=1, most=1024)  # how many tokenise at once; None: one for each core
    samples: int = whole(3, least=0, most=1000)  # documents of each source whose beginnings inspect shows


def prepare(config: DataCommandConfig) -> None:
    """Tokenises what is not in the cache yet, and says what is there."""
    from rich.text import Text

    from tedlab.console import output
    from tedlab.tables import FittingTable

    start = time.perf_counter()
    corpora, made = _prepared(config)
    seconds = time.perf_counter() - start
    table = FittingTable(title="Prepared")
    for name in ("source", "files", "train tokens", "validation tokens", "bytes/token", "folder"):
        table.add_column(name, justify="left" if name in ("source", "folder") else "right")
    for name, corpus in corpora.items():
        sizes = f"{corpus.source_files:,}", f"{len(corpus.train):,}", f"{len(corpus.validation):,}"
        cells = (name or _only(config), *sizes, f"{corpus.bytes_per_token:.3f}", str(corpus.directory))
        table.add_row(*(Text(cell) for cell in cells))
    console = output()
    console.print(table)
    tokens = sum(len(corpora[name].train) + len(corpora[name].validation) for name in made)
    if made:
        console.print(f"{tokens:,} tokens in {seconds:,.1f} s, all reading included: {tokens / seconds:,.0f} tokens/s")
    else:
        console.print("All of it was in the cache.")


def inspect(config: DataCommandConfig) -> None:
    """Prints what there is to know about the documents of each source."""
    from rich.text import Text

    from tedlab.console import output
    from tedlab.data.overview import QUANTILES, overview
    from tedlab.progress import advancing
    from tedlab.tables import FittingTable

    corpora, _ = _prepared(config)
    console, length = output(), config.model.sequence_length
    for name, corpus in corpora.items():
        tokens = len(corpus.train) + len(corpus.validation)
        with advancing("Looking at documents", tokens) as advance:
            found = overview(corpus, length, config.samples, advance)
        table = FittingTable(title=name or _only(config), show_header=False)
        table.add_column()
        table.add_column()
        quantiles = ", ".join(f"{q:.0%} {size:,}" for q, size in zip(QUANTILES, found.lengths, strict=True))
        held_out = len(corpus.validation) / tokens
        duplicates = (
            f"{found.duplicates:,} documents equal one before them, {found.tokens_duplicates / tokens:.2%} of all"
        )
        rows = {
            "documents": f"{found.documents:,}, of which {found.empty:,} are empty",
            "tokens": f"{found.tokens:,}, of which {held_out:.1%} are held out",
            "lengths": f"{quantiles} (quantiles, in tokens with the separator)",
            "longer than a sample": _longer(found.longer, found.documents, found.tokens_longer / tokens, length),
            "duplicates": f"{duplicates} tokens; {found.leaked:,} held out are in training as well",
        }
        for what, said in rows.items():
            table.add_row(what, Text(said))
        for number, text in enumerate(found.samples, start=1):
            table.add_row(f"document {number}", Text(text if len(text) <= _WIDE else f"{text[: _WIDE - 1]}…"))
        console.print(table)
        if found.longer:
            console.print(_becomes(config, found.longer))


def _only(config: DataCommandConfig) -> str:
    """Returns what the one source is called."""
    return "data.path" if config.data.stream.dataset is None else "data.stream"


def _longer(longer: int, documents: int, share: float, length: int) -> str:
    return (
        f"{longer:,} documents ({longer / documents:.1%}) have more than {length:,} tokens, {share:.1%} of all tokens"
    )


def _becomes(config: DataCommandConfig, longer: int) -> str:
    """Says what becomes of documents that are longer than a sample."""
    if config.data.packing == Packing.BEST_FIT:
        what = "each is cut into pieces, which are samples of their own"
    else:
        what = "each goes on in the next sample, which does not see what came before"
    return (
        f"{longer:,} documents are longer than model.sequence_length={config.model.sequence_length}: with data.packing="
        f"{config.data.packing}, {what}."
    )


def _prepared(config: DataCommandConfig) -> "tuple[dict[str, Corpus], list[str]]":
    """Returns all corpora, and the names of those that were not in the cache."""
    from tedlab.data.corpus import prepare_corpora
    from tedlab.data.mixture import check_sources

    if config.data.module != "tedlab.data.TextDataModule":
        raise UsageError(f"data.module={config.data.module} has data of its own, which tedlab data does not know")
    before = time.time()
    try:
        check_sources(config.data)
        corpora = prepare_corpora(config.data, config.model.sequence_length, config.processes or _cores())
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on where this one ended.", file=sys.stderr, flush=True)
        raise  # a sweep ends with it
    except (ValueError, OSError, RuntimeError) as error:
        raise UsageError(f"{error}") from None
    made = [name for name, corpus in corpora.items() if corpus.directory.stat().st_ctime >= before]
    return corpora, made


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_ENTRIES = {
    name: hydra_entry(task, "data", DataCommandConfig) for name, task in (("prepare", prepare), ("inspect", inspect))
}


def main() -> None:
    """Passes the rest of the command line to the command that its first word names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        sys.argv[1:] = ["--help"]
        name = "prepare"
    elif name not in _ENTRIES:
        sys.exit(f"tedlab data: there is no command '{name}'.{did_you_mean(name, _ENTRIES)}\nValid: prepare, inspect")
    else:
        del sys.argv[1]
    _ENTRIES[name]()
