"""Finds the files that ``data.path`` names, each real file once however many links lead to it, without opening any.

The search follows links to files and folders, in folders as in globs, except those that lead back to where it began or
above. ``formats.py`` determines what a file holds and whether it can be used.
"""

import fnmatch
import glob
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

EMPTY = "it is empty"
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_KINDS = {  # file type → what it is called; opening any of these may block for ever
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, order=True)
class SourceFile:
    """A file of the corpus. ``name`` is its path relative to the corpus, which is the same on every machine."""

    name: str
    path: Path
    size: int
    modified_ns: int


@dataclass(frozen=True, order=True)
class LeftOut:
    """A file or folder that ``data.path`` names but the corpus does not use; ``reason`` is a clause, "it …"."""

    name: str
    reason: str


def find_files(
    path: str | None, left_out: list[LeftOut] | None = None, cache_dir: Path | None = None
) -> list[SourceFile]:
    """Finds the files that ``path`` names, without reading any of them.

    Args:
        path: A file, a folder (all of it but what is hidden), a glob (``**`` for any folders), or None for the source
            text of the Python standard library, which every machine has.
        left_out: List that receives what cannot be used: empty files, pipes, sockets, devices, broken links, and
            folders that may not be read.
        cache_dir: tedlab's own cache; the search skips what tedlab keeps there, even if it lies below ``path``.

    Returns:
        The files, sorted by name.

    Raises:
        FileNotFoundError: If ``path`` does not exist or names no file.
        ValueError: If no file that ``path`` names can be used, or if ``path`` is a pipe, socket or device.
    """
    left_out = [] if left_out is None else left_out
    skip: frozenset[str] = frozenset()
    pattern = ["**"]
    if path is None:
        root, pattern, skip = Path(sysconfig.get_paths()["stdlib"]), ["**", "*.py"], _NOT_LIBRARY
    elif not path.strip():
        raise FileNotFoundError("data.path is empty. It must be a file, a folder or a glob.")
    else:
        root = Path(path).expanduser()
        if os.path.isfile(root):
            root, pattern = root.parent, [glob.escape(root.name)]
        elif not os.path.isdir(root):
            if os.path.exists(root):
                raise ValueError(f"data.path={path!r} is {_kind(root.stat())}. It must be a file, a folder or a glob.")
            if not glob.has_magic(path):
                broken = " is a link to nothing" if os.path.islink(root) else " does not exist"
                raise FileNotFoundError(f"data.path={path!r}{broken}. It must be a file, a folder or a glob.")
            parts = root.parts
            first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            root, pattern = Path(*parts[:first]), [*parts[first:]]
    found = [*_Search(root, skip, cache_dir, left_out).matches(root, pattern)]

    real_folder = cache(os.path.realpath)
    by_real_path: dict[str, tuple[bool, str, Path]] = {}
    for file in found:
        name = file.relative_to(root).as_posix()
        real = os.path.realpath(file) if file.is_symlink() else os.path.join(real_folder(file.parent), file.name)
        own = os.path.normpath(os.path.join(real_folder(root), name))
        candidate = (real != own, name, file)  # a file's own path wins over a link's
        by_real_path[real] = min(candidate, by_real_path.get(real, candidate))
    files = []
    for _, name, file in by_real_path.values():
        try:
            status = file.stat()
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            left_out.append(LeftOut(name, "it is a link to nothing" if gone else cannot_be_read(error)))
            continue
        if not stat.S_ISREG(status.st_mode):
            left_out.append(LeftOut(name, f"it is {_kind(status)}"))
        elif not status.st_size:
            left_out.append(LeftOut(name, EMPTY))
        else:
            files.append(SourceFile(name, file, status.st_size, status.st_mtime_ns))
    if not files:
        if not left_out:
            raise FileNotFoundError(f"data.path={path!r} names no file. Hidden files are left out.")
        if all(file.reason == EMPTY for file in left_out):
            raise ValueError(f"data.path={path!r} names {len(left_out)} files, all of them empty.")
        raise ValueError(f"data.path={path!r} names no file that can be read: {listed(left_out)}.")
    return sorted(files)


def cannot_be_read(error: OSError) -> str:
    """Returns the reason for leaving out the file or folder that raised ``error``."""
    return f"it cannot be read ({error.strerror})"


def listed(left_out: Sequence[LeftOut], most: int = 3) -> str:
    """Lists the first ``most`` with their reasons, then counts the remaining ones by reason."""
    text = "; ".join(f"{file.name}: {file.reason}" for file in left_out[:most])
    rest = Counter(file.reason for file in left_out[most:])
    if not rest:
        return text
    kinds = ", ".join(f"{count} × {reason}" for reason, count in rest.most_common(most))
    return f"{text}; and {rest.total()} more ({kinds}{', …' if len(rest) > most else ''})"


class _Search:
    """Walks folders along a pattern, and notes the folders that it cannot list."""

    def __init__(self, root: Path, skip: frozenset[str], cache_dir: Path | None, left_out: list[LeftOut]) -> None:
        self.root, self.skip, self.left_out = root, skip, left_out
        self._around = {os.path.realpath(root), *map(str, Path(os.path.realpath(root)).parents)}
        names = () if cache_dir is None else ("corpora", "tokenizers")
        self._cache = {os.path.realpath(Path(cache_dir or "", name)) for name in names}
        self._unreadable: set[Path] = set()

    def matches(self, folder: Path, pattern: Sequence[str]) -> Iterator[Path]:
        """Yields everything below ``folder`` that matches and is not a folder, some of it perhaps repeatedly."""
        part, *rest = pattern
        if part == "**":
            while rest and rest[0] == "**":
                rest = rest[1:]
            for below in self._folders(folder):
                yield from self.matches(below, rest or ["*"])
            return
        matching = re.compile(fnmatch.translate(part)).match
        for entry in self._entries(folder, hidden=part.startswith((".", "[.]"))) if glob.has_magic(part) else ():
            if not matching(entry.name):
                continue
            if not _is_folder(entry):
                if not rest:
                    yield Path(entry.path)
            elif rest:
                yield from self.matches(Path(entry.path), rest)
        if not glob.has_magic(part):
            path = folder / part
            if rest and path.is_dir():
                yield from self.matches(path, rest)
            elif not rest and os.path.lexists(path) and not path.is_dir():
                yield path

    def _folders(self, folder: Path) -> Iterator[Path]:
        """Yields ``folder`` and all folders below, each real one once, by its own path or else the first link."""
        seen = set(self._cache)
        links = [folder] if folder.is_dir() else []
        while links:
            within = [links.pop(0)]
            if within[0] != folder and os.path.realpath(within[0]) in self._around:
                continue
            while within:
                current = within.pop()
                real = os.path.realpath(current)
                if real in seen:
                    continue
                seen.add(real)
                yield current
                folders = [e for e in self._entries(current) if _is_folder(e) and e.name not in self.skip]
                links += [Path(entry.path) for entry in folders if entry.is_symlink()]
                within += [Path(entry.path) for entry in reversed(folders) if not entry.is_symlink()]

    def _entries(self, folder: Path, hidden: bool = False) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted((e for e in entries if hidden or not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            if folder not in self._unreadable:
                self._unreadable.add(folder)
                name = folder.relative_to(self.root).as_posix() + "/"
                self.left_out.append(LeftOut(name, cannot_be_read(error)))
            return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tells whether an entry is a folder or a link to one. ``DirEntry.is_dir`` raises for a link to itself."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
