"""Turns splits of a stream into parts on disk, a batch of documents at a time; killed anywhere, it can go on."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tedlab.data.rows import is_held_out
from tedlab.data.shards import Part, Written, done_before, dtype_of, write_in_order
from tedlab.data.stream import Stream, Texts
from tedlab.data.tokenizers import Tokenizer
from tedlab.progress import advancing

_REVISION = "revision.json"  # the commit at which parts are read


class Reading:
    """Reads splits of a stream into parts, and goes on where a reading that was killed has ended.

    A note beside the parts of each batch says where in the stream the next begins.

    Args:
        stream: What is read.
        tokenizer: Turns it into tokens.
        work: The folder of parts and notes, made when there is one.
        processes: How many tokenise at once.
    """

    def __init__(self, stream: Stream, tokenizer: Tokenizer, work: Path, processes: int) -> None:
        self.stream, self.tokenizer, self.work, self.processes = stream, tokenizer, work, processes

    def read(self, name: str, split: str, tokens: int, held_out: float | None = None) -> dict[tuple[str, int], Written]:
        """Reads as many tokens of ``name`` as are asked for, or all there are.

        Args:
            name: What they are for: ``train`` or ``validation``.
            split: The split of the stream.
            tokens: How many.
            held_out: The share of documents that is for ``validation``; None: none is.

        Raises:
            ValueError: If the split has no text.
        """
        done = done_before(self.work, dtype_of(self.tokenizer).itemsize)
        written: dict[tuple[str, int], Written] = {}
        number, read, after = 0, 0, None
        while read < tokens and (note := self._note(name, number)) and all((of, number) in done for of in note["of"]):
            written |= {(of, number): done[of, number] for of in note["of"]}
            read += done[name, number].tokens if name in note["of"] else 0
            number, after = number + 1, note["after"]
        if number:
            print(f"{read:,} tokens were read before.", file=sys.stderr, flush=True)
        with advancing("Streaming", tokens - read) as advance:
            batches = self._parts(name, split, number, after, held_out) if read < tokens else iter(())
            for batch in write_in_order(batches, self.tokenizer, self.work, self.processes):
                for part in batch:
                    of = part.path.name.partition("-")[0]
                    written[of, number] = part
                    read += part.tokens if of == name else 0
                    advance(part.tokens if of == name else 0)
                number += 1
                if read >= tokens:
                    break
        if not written:
            raise ValueError(f"The split {split!r} of {self.stream.name} has no text")
        last = self._note(name, number - 1)["after"]
        if last["left_out"]:
            print(
                f"{last['left_out']:,} rows of the split {split!r} of {self.stream.name} were left out: they have no "
                "text, or NUL in it.",
                file=sys.stderr,
            )
        if read < tokens:
            print(
                f"The split {split!r} of {self.stream.name} has ended after {read:,} of {tokens:,} tokens.",
                file=sys.stderr,
            )
        return written

    def _parts(
        self, name: str, split: str, number: int, after: dict[str, Any] | None, held_out: float | None
    ) -> Iterator[list[Part]]:
        for batch in self.stream.batches(split, after):
            sides: dict[str, list[str]] = {name: []}
            for place, text in enumerate(batch.texts, start=batch.before):
                of = name if held_out is None or not is_held_out(place, held_out) else "validation"
                sides.setdefault(of, []).append(text)
            path = Path(f"{self.stream.config.dataset}")
            sources = {of: Texts(path, tuple(texts)) for of, texts in sides.items() if texts}
            if number == 0:
                self.work.mkdir(exist_ok=True)
                write_whole(self.work / _REVISION, json.dumps(self.stream.revision))
            write_whole(self._place(name, number), json.dumps({"of": [*sources], "after": batch.after}))
            yield [Part(of, number, (source,)) for of, source in sources.items()]
            number += 1

    def _place(self, name: str, number: int) -> Path:
        return self.work / f"{name}-{number:06d}.json"

    def _note(self, name: str, number: int) -> dict[str, Any]:
        """Returns the note of a batch, or nothing if there is none that can be read."""
        try:
            return json.loads(self._place(name, number).read_text())
        except (FileNotFoundError, ValueError):
            return {}


def begun_at(work: Path) -> str | None:
    """Returns at which commit the parts in a folder were read, if there are any that were read at one.

    Without a part, nothing was begun: another commit may have what this one lacked. The folder is removed then, as it
    is if nobody knows of what its parts are.
    """
    if any(work.glob("*.bin")):
        with suppress(FileNotFoundError, ValueError):
            return json.loads((work / _REVISION).read_text())
    shutil.rmtree(work, ignore_errors=True)
    return None


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never seen in part, not even after a crash of the machine."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
