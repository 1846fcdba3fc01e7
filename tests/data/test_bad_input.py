"""Input that cannot be trained on: alone it is refused in a sentence, among good files it is left out and listed."""

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard

from tedlab import progress
from tedlab.config import DataConfig
from tedlab.data import corpus as corpus_module
from tedlab.data import documents, formats
from tedlab.data.corpus import Corpus, prepare_corpus
from tedlab.data.files import LeftOut, find_files, listed
from tedlab.data.module import TextDataModule
from tedlab.report import report_left_out

TEXT = "some words that are good to learn from\n" * 3
ROW = json.dumps({"text": TEXT})


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


# Of one file: its name, its bytes, and why it is not text.
FILES: dict[str, tuple[str, bytes, str]] = {
    "gzip": (
        "a.txt.gz",
        gzip.compress(TEXT.encode()),
        r"it is compressed by gzip and neither JSON lines nor CSV; decompress it first \(gunzip\)",
    ),
    "gzip by another name": ("a.txt", gzip.compress(TEXT.encode()), "it is compressed by gzip"),
    "gzip that is cut": (
        "a.jsonl.gz",
        gzip.compress(ROW.encode() * 99)[:-9],
        r"it is compressed and damaged \(Compressed",
    ),
    "gzip that was changed": (
        "a.jsonl.gz",
        gzip.compress(ROW.encode())[:-8] + b"12345678",
        r"it is compressed and damaged \(CRC check failed",
    ),
    "bzip2": ("a.txt.bz2", bz2.compress(TEXT.encode()), "it is compressed by bzip2"),
    "xz": ("a.txt.xz", lzma.compress(TEXT.encode()), "it is compressed by xz"),
    "zstd": ("a.txt.zst", zstandard.compress(TEXT.encode()), r"it is compressed by zstd .*\(unzstd\)"),
    "zstd that is cut": (
        "a.txt.zst",
        b"\x28\xb5\x2f\xfd\x04\x58",
        r"it is compressed and damaged \(its last frame ends too early\)",
    ),
    "lz4": ("a.lz4", b"\x04\x22\x4d\x18\x64\x40", "it is compressed by lz4"),
    "zip": ("a.zip", _zip(), "it is a ZIP archive"),
    "parquet": ("a.parquet", b"PAR1\x15\x04\x15\x10", "it is a damaged table"),
    "arrow": ("a.arrow", b"ARROW1\0\0\xff\xff", "it is a damaged table"),
    "arrow stream": ("a.arrow", b"\xff\xff\xff\xff\x10\0\0", "it is a damaged table"),
    "numpy": (
        "a.npy",
        _npy(np.eye(3)),
        r"it is a NumPy array of shape \(3, 3\) and dtype float64; token ids are whole",
    ),
    "numpy that is cut": ("a.npy", _npy(np.arange(99))[:-4], "it is no NumPy array that can be mapped"),
    "numpy of objects": ("a.npy", _npy(np.array([{}])), "it is no NumPy array that can be mapped"),
    "sqlite": ("a.db", b"SQLite format 3\0\x10\0", "it is an SQLite database"),
    "pdf": ("a.pdf", b"%PDF-1.7\nstream", "it is a PDF"),
    "hdf5": ("a.h5", b"\x89HDF\r\n\x1a\n\0", "it is an HDF5 file"),
    "utf-16": ("a.txt", TEXT.encode("utf-16"), "it is UTF-16 or UTF-32; convert it to UTF-8"),
    "utf-16 big endian": ("a.txt", b"\xfe\xff\0a", "it is UTF-16; convert"),
    "utf-32 big endian": ("a.txt", b"\0\0\xfe\xff\0\0\0a", "it is UTF-32; convert"),
    "latin-1": ("a.txt", "café au lait".encode("latin-1"), r"it is not UTF-8 \(invalid continuation byte\)"),
    "one bad line": ("a.txt", TEXT.encode() + b"caf\xe9 au\n" + TEXT.encode(), "it is not UTF-8"),
    "a character cut in half": ("a.txt", TEXT.encode() + b"\xc3", r"it is not UTF-8 \(unexpected end"),
    "surrogates as CESU-8": ("a.txt", b"\xed\xa0\xbd\xed\xb8\x80", "it is not UTF-8"),
    "NUL": ("a.txt", b"a\0b", "it holds NUL bytes"),
    "a byte-order mark alone": ("a.txt", b"\xef\xbb\xbf", "it holds a byte-order mark and nothing else"),
    "csv": (
        "a.csv",
        b"id,body\n1,hello\n",
        r"it is a table without a column data.field='text' \(its columns, divided by ',', are 'id', 'body'\)",
    ),
    "csv with semicolons": (
        "a.csv",
        b"id;text\n1;hello\n",
        "it is a table without a column data.field='text' .* are 'id;text'",
    ),
    "tsv": ("a.TSV.gz", gzip.compress(b"id\ttext\n"), "it is a table without rows"),
    "csv with a column twice": ("a.csv", b"text,text\n1,2\n", "it is a table with several columns data.field='text'"),
    "csv whose header is not closed": ("a.csv", b'"id,text\n1,2\n', "by its name it is a table, but .*unexpected end"),
    "csv of blank lines": ("a.csv", b"\n\n", "it is a table without a column data.field='text' .* are none at all"),
    "a list of objects": ("a.json", f"[{ROW}, {ROW}]".encode(), r"it is JSON, .* not one object per line \(jq -c"),
    "an object over lines": ("a.json", json.dumps({"text": TEXT}, indent=2).encode(), "it is JSON, whose syntax"),
    "a JSON string": ("a.json", b'"text"', "it is JSON, whose syntax"),
    "broken JSON": ("a.json", b"{text: no}", "it is JSON, whose syntax"),
    "deeply nested JSON": ("a.json", b'{"a":' * 100_000, "it is JSON, whose syntax"),
    "JSON lines without the field": (
        "a.json",
        b'{"body": "x"}\n' * 2,
        "it holds JSON lines without data.field='text' .* 'body'",
    ),
    "… with another name": ("a.log", b'{"body": "x"}\n{"id": 3}\n', "it holds JSON lines without data.field='text'"),
    "JSON lines of {}": ("a.json", b"{}\n{}\n", "it holds JSON lines .* are none at all"),
}
# Declared to be JSON lines, so that a line that is none is an error also among other files: nothing is lost unsaid.
LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b'{"text": "x"}\nbroken\n', "Line 2 of .* is not JSON"),
    "cut": (f"{ROW}\n{ROW[:20]}".encode(), "Line 2 of .* is not JSON"),
    "a list": (b'["x"]', "Line 1 of .* holds a list, but"),
    "a field that is absent": (
        f'{ROW}\n{{"body": "x"}}'.encode(),
        "Line 2 of .* has no field 'text'; its fields are 'body'",
    ),
    "a field of numbers": (b'{"text": 5}', "holds a int in field 'text', not text"),
    "a field of null": (b'{"text": null}', "holds a NoneType in field 'text', not text"),
    "NUL in an escape": (rb'{"text": "a\u0000b"}', "holds NUL or half a surrogate pair"),
    "half a surrogate pair": (rb'{"text": "a\ud83d"}', "holds NUL or half a surrogate pair"),
    "deep nesting": (b'{"text": "x", "a": ' + b"[" * 100_000, r"Line 1 of .* is not JSON \(it is nested too deeply\)"),
    "a number of 5,000 digits": (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "Line 1 of .* is not JSON"),
    "lines that end with CR alone": (f"{ROW}\r{ROW}".encode(), "Line 1 of .* is not JSON"),
    "two objects in a line": (f"{ROW} {ROW}".encode(), "Line 1 of .* is not JSON"),
    "a list over lines": (f"[\n{ROW},\n{ROW}\n]".encode(), "Line 1 of .* is not JSON"),
}


def prepare(folder: Path, path: str = "text", sequence_length: int = 4, **fields) -> Corpus:
    config = DataConfig(path=str(folder / path), cache_dir=str(folder / "cache"), **fields)
    return prepare_corpus(config, sequence_length)


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def texts(corpus: Corpus) -> list[set[str]]:
    return [set(bytes(side).decode().rstrip("\0").split("\0")) for side in (corpus.train, corpus.validation)]


@pytest.mark.parametrize(("name", "content", "reason"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_text_is_refused_alone_and_listed_among_others(tmp_path, name, content, reason):
    write(tmp_path, {f"text/{name}": content})
    with pytest.raises(ValueError, match=rf"{name} cannot be used: {reason}"):
        prepare(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} cannot be used: {reason}"):
        prepare(tmp_path, f"text/{name}")
    write(tmp_path, {"text/y.txt": TEXT, "text/z.txt": TEXT * 2})
    for _ in range(2):  # the second time from the cache
        corpus = prepare(tmp_path)
        assert texts(corpus) == [{TEXT * 2}, {TEXT}]
        (left_out,) = corpus.left_out
        assert left_out.name == name
        assert corpus.source_files == 2
        with pytest.raises(ValueError, match=reason):
            raise ValueError(left_out.reason)


@pytest.mark.parametrize(("content", "said"), LINES.values(), ids=LINES)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_a_line_that_is_no_document_is_an_error_that_names_it(tmp_path, suffix, content, said):
    write(tmp_path, {f"text/a{suffix}": content, "text/b.txt": TEXT, "text/c.txt": TEXT * 2})
    with pytest.raises(ValueError, match=said):
        prepare(tmp_path)
    with pytest.raises(ValueError, match=said):
        prepare(tmp_path, f"text/a{suffix}")
    assert [*(tmp_path / "cache" / "corpora").iterdir()] == []


ROWS: dict[str, tuple[str, str]] = {
    "a field too many": ("text,n\nx,1\n\ny,2,3\n", "The row in line 4 of .* has 3 fields, but the header has 2"),
    "a field too few": ('n,text\n1,"a\nb"\n3\n', "The row in line 4 of .* has 1 fields"),
    "quotes in the middle": ('text\nx\n"y" z\n', "Line 3 of .* begins no row of a table .* expected after"),
    "a quote that is not closed": ('text\nx\n"y\nz\n', "Line 3 of .* begins no row of a table .*unexpected end"),
    "lines that end with CR alone": ("text\nx\ry\r", "Line 2 of .* begins no row of a table"),
}


@pytest.mark.parametrize(("content", "said"), ROWS.values(), ids=ROWS)
def test_a_row_that_is_none_is_an_error_that_names_its_line(tmp_path, content, said):
    write(tmp_path, {"text/a.csv": content, "text/b.txt": TEXT})
    with pytest.raises(ValueError, match=said):
        prepare(tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "a.JSONL", "a.txt", "a", "a.log"])
def test_json_lines_are_recognised_whatever_they_are_called(tmp_path, name):
    rows = "".join(json.dumps({"text": f"document {i}", "id": i}) + "\r\n" for i in range(40))
    write(tmp_path, {name: "\ufeff\n" + rows})
    train, validation = texts(prepare(tmp_path, name))
    assert train | validation == {f"document {i}" for i in range(40)}
    assert len(validation) == 2


@pytest.mark.parametrize(
    "text",
    [
        "{\n  braces\n}\n" + TEXT,
        "BZh is how it begins " + TEXT,
        "PAR1 is a gene " + TEXT,
        '{"text": 1}\nand no more JSON\n' + TEXT,
        '{"a": {"b": 1}}',
        "PK\x03 " + TEXT,
        "[" * 100_000,
    ],
)
def test_text_that_looks_a_little_like_something_else_is_text(tmp_path, text):
    write(tmp_path, {"text/a.txt": text, "text/b.txt": TEXT})
    corpus = prepare(tmp_path)
    assert corpus.left_out == ()
    assert set.union(*texts(corpus)) == {text, TEXT}


def test_a_byte_order_mark_is_no_token_and_line_ends_are(tmp_path):
    write(tmp_path, {"text/a.txt": "\ufeff" + "one\r\ntwo\n" * 9, "text/b.txt": TEXT})
    assert "one\r\ntwo\n" * 9 in set.union(*texts(prepare(tmp_path)))
    write(tmp_path, {"one.txt": "\ufeff" + "x" * 100})
    train, validation = prepare(tmp_path, "one.txt").train, prepare(tmp_path, "one.txt").validation
    assert bytes(train) + bytes(validation) == b"x" * 95 + b"\0" + b"x" * 5 + b"\0"


def test_a_line_that_memory_might_not_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LINE", 64)
    write(tmp_path, {"a.jsonl": '{"text": "x"}\n' + json.dumps({"text": "x" * 100})})
    with pytest.raises(ValueError, match=r"Line 2 of .* is longer than 64 bytes"):
        prepare(tmp_path, "a.jsonl")
    write(tmp_path, {"a.csv": "text\nx\n" + '"' + "x\n" * 40 + '"'})
    with pytest.raises(ValueError, match=r"Line 3 of .* begins no row .* larger than field limit \(64\)"):
        prepare(tmp_path, "a.csv")


# ---- which files ----------------------------------------------------------------------------------------------------


def test_what_is_no_file_is_listed_and_never_opened(tmp_path):
    write(tmp_path, {"text/a.txt": TEXT, "text/b.txt": TEXT * 2, "text/empty.txt": ""})
    os.mkfifo(tmp_path / "text" / "pipe")
    (tmp_path / "text" / "broken").symlink_to("nothing")
    (tmp_path / "text" / "itself").symlink_to("itself")
    (tmp_path / "text" / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path / "text")  # the name of a socket may not be long
        server.bind("socket")
        os.chdir(here)
        for path in ("text", "text/*", "text/**"):
            corpus = prepare(tmp_path, path)
            assert {file.name: file.reason for file in corpus.left_out} == {
                "broken": "it is a link to nothing",
                "device": "it is a device",
                "empty.txt": "it is empty",
                "itself": "it cannot be read (Too many levels of symbolic links)",
                "pipe": "it is a pipe",
                "socket": "it is a socket",
            }
            assert corpus.source_files == 2


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("pipe", ValueError, "pipe' is a pipe. It must be a file, a folder or a glob"),
        ("p*", ValueError, "names no file that can be read: pipe: it is a pipe"),
        ("broken", FileNotFoundError, "broken' is a link to nothing"),
        ("x" * 5000, FileNotFoundError, "does not exist"),
        ("a\0b", FileNotFoundError, "does not exist"),
        ("nowhere/**/*.txt", FileNotFoundError, "names no file"),
    ],
)
def test_a_path_that_cannot_be_a_corpus_is_refused(tmp_path, path, error, said):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nothing")
    with pytest.raises(error, match=said):
        prepare(tmp_path, path)


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_working_directory(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"data\.path is empty"):
        find_files(path)


def test_a_file_that_may_not_be_read_and_a_folder_that_may_not_be_listed_are_left_out(tmp_path, monkeypatch):
    """As the operating system would say to a user without the right; the superuser has it always."""
    write(tmp_path, {"text/a.txt": TEXT, "text/b.txt": TEXT * 2, "text/secret.txt": "x", "text/closed/c.txt": "x"})
    scandir, opened = os.scandir, Path.open

    def refuse(path: object) -> None:
        if str(path).endswith(("secret.txt", "closed")):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) or scandir(path))
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: refuse(self) or opened(self, *a, **k))
    reason = "it cannot be read (Permission denied)"
    assert prepare(tmp_path).left_out == (LeftOut("closed/", reason), LeftOut("secret.txt", reason))
    with pytest.raises(ValueError, match=r"secret\.txt cannot be used: it cannot be read \(Permission denied\)"):
        prepare(tmp_path, "text/secret.txt")


def _to_its_folder(text: Path) -> None:
    (text / "sub" / "loop").symlink_to("..")


def _to_itself(text: Path) -> None:
    (text / "loop").symlink_to(".")


def _to_its_parent(text: Path) -> None:
    (text / "loop").symlink_to("..")


def _to_a_neighbour(text: Path) -> None:
    (text / "again").symlink_to("sub")
    (text / "a-link.txt").symlink_to("b.txt")
    (text / "sub" / "c-link.txt").symlink_to("../c.txt")


def _to_each_other(text: Path) -> None:
    for name, other in (("x", "y"), ("y", "x")):
        (text / name).mkdir()
        (text / name / "to").symlink_to(f"../{other}")


@pytest.mark.parametrize("link", [_to_its_folder, _to_itself, _to_its_parent, _to_a_neighbour, _to_each_other])
@pytest.mark.parametrize("path", ["text", "text/**", "text/**/*.txt", "te*/**/*.txt", "**/*.txt"])
def test_each_real_file_is_read_once_by_its_own_name(tmp_path, link: Callable[[Path], None], path):
    write(tmp_path, {"text/b.txt": TEXT, "text/c.txt": TEXT * 2, "text/sub/d.txt": TEXT * 3})
    link(tmp_path / "text")
    assert [file.path for file in find_files(str(tmp_path / path))] == [
        tmp_path / "text" / name for name in ("b.txt", "c.txt", "sub/d.txt")
    ]


@pytest.mark.parametrize("path", ["text", "text/**", "text/**/*.txt", "text/*/*.txt", "text/**/link/*"])
def test_a_link_to_a_folder_elsewhere_is_followed_in_folders_and_globs(tmp_path, path):
    write(tmp_path, {"elsewhere/a.txt": TEXT, "text/.hidden/b.txt": TEXT})
    (tmp_path / "text" / "link").symlink_to("../elsewhere")
    (tmp_path / "text" / "other-link").symlink_to("../elsewhere")
    (file,) = find_files(str(tmp_path / path))
    assert file.path == tmp_path / "text" / "link" / "a.txt"


def test_files_with_the_same_content_are_held_out_together_or_not_at_all(tmp_path):
    files = {f"text/{i}.txt": f"number {i % 10} " * 20 for i in range(40)}
    write(tmp_path, files)
    train, validation = texts(prepare(tmp_path, validation_fraction=0.3))
    assert len(train) == 7
    assert len(validation) == 3
    assert not train & validation


def test_several_files_of_one_content_are_one(tmp_path):
    write(tmp_path, {"text/a.txt": TEXT, "text/b.txt": TEXT})
    corpus = prepare(tmp_path)
    assert corpus.left_out == (LeftOut("b.txt", "it holds the same as a.txt"),)
    assert "".join([*texts(corpus)[0], *texts(corpus)[1]]) == TEXT


def test_the_cache_is_no_text_also_if_it_lies_in_the_corpus(tmp_path):
    write(tmp_path, {"a.txt": TEXT, "b.txt": TEXT * 2})
    config = DataConfig(path=str(tmp_path), cache_dir=str(tmp_path / "cache"), tokenizer="bpe", bpe_vocab_size=260)
    first = prepare_corpus(config, 4)
    second = prepare_corpus(config, 4)
    assert first.directory == second.directory
    assert second.left_out == ()


def test_a_short_corpus_says_what_was_left_out_of_it(tmp_path):
    write(tmp_path, {"text/a.txt": "ab", "text/b.txt": "c", "text/c.gz": gzip.compress(TEXT.encode())})
    with pytest.raises(ValueError, match=r"too short.*1 files were left out: c.gz: it is compressed by gzip"):
        prepare(tmp_path)


def test_a_long_list_is_shown_by_its_first_and_by_kinds():
    files = [LeftOut(f"{i}.bin", "it holds NUL bytes" if i % 3 else "it is empty") for i in range(9)]
    assert listed(files) == (
        "0.bin: it is empty; 1.bin: it holds NUL bytes; 2.bin: it holds NUL bytes; and 6 more (4 × it holds NUL bytes, "
        "2 × it is empty)"
    )


def test_a_run_keeps_the_whole_list_and_shows_its_beginning(tmp_path, capsys):
    write(tmp_path, {"text/a.txt": TEXT, "text/b.txt": TEXT * 2, "text/empty": ""})
    report_left_out({"": prepare(tmp_path)}, tmp_path)
    assert (tmp_path / "left_out.txt").read_text() == "empty: it is empty\n"
    assert capsys.readouterr().err == ""  # nothing is lost with it
    write(tmp_path, {f"text/{i}.bin": b"\0" for i in range(9)})
    report_left_out({"": prepare(tmp_path)}, tmp_path)
    assert len((tmp_path / "left_out.txt").read_text().splitlines()) == 10
    said = capsys.readouterr().err
    assert "9 of 11 files of data.path were left out: 0.bin: it holds NUL bytes; " in said
    assert "and 6 more (6 × it holds NUL bytes)" in said
    write(tmp_path, {"other/a.txt": TEXT, "other/b.txt": TEXT * 2})
    report_left_out({"": prepare(tmp_path, "other")}, tmp_path)
    assert not (tmp_path / "left_out.txt").exists()


def test_a_process_that_sees_another_corpus_than_the_first_one_does_not_train(tmp_path):
    write(tmp_path, {f"{place}/{file}": TEXT * times for place in "ab" for file, times in (("1.txt", 1), ("2.txt", 2))})
    write(tmp_path, {"c/1.txt": TEXT, "c/2.txt": TEXT.swapcase() * 2})
    told = []

    def module(place):
        data = TextDataModule(DataConfig(path=str(tmp_path / place), cache_dir=str(tmp_path / "cache")), 4, seed=0)
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda own: told[0] if told else own))
        return data

    first = module("a")
    first.trainer.strategy.broadcast = lambda own: told.append(own) or own
    first.setup("fit")
    module("b").setup("fit")  # a copy at another place, as on another node
    with pytest.raises(ValueError, match=r"found different files below data\.path"):
        module("c").setup("fit")


def test_a_log_that_is_no_terminal_has_lines_while_a_corpus_is_read(tmp_path, monkeypatch, capsys):
    write(tmp_path, {"text/a.txt": TEXT * 10_000, "text/b.txt": TEXT * 9_000})
    prepare(tmp_path)
    assert capsys.readouterr().err == ""  # it took less than five seconds
    for name in ("_FIRST_S", "_LONGEST_S", "_REFRESH_S"):
        monkeypatch.setattr(progress, name, 0.0)
    prepare(tmp_path, validation_fraction=0.4, tokenizer="bpe", bpe_vocab_size=260)
    lines = capsys.readouterr().err.splitlines()
    assert list(dict.fromkeys(line.split("  ")[0] for line in lines)) == [
        "Reading",
        "Training the tokenizer",
        "Tokenising",
    ]
    assert lines[-1].startswith("Tokenising  100%")


# ---- files that change, and the cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["longer", "shorter", "gone", "other"])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_file_that_changes_while_it_is_read_is_an_error_and_nothing_is_kept(tmp_path, monkeypatch, change, tokenizer):
    write(tmp_path, {"text/a.txt": TEXT, "text/b.txt": TEXT * 2})
    examine = documents.examine

    def examine_then_change(file, *arguments):
        content = examine(file, *arguments)
        if file.name == "b.txt":
            if change == "gone":
                file.path.unlink()
            else:
                old = file.path.read_text()
                new = {"longer": old + "x", "shorter": old[:-9], "other": old.upper()}[change]
                file.path.write_text(new)
        return content

    monkeypatch.setattr(documents, "examine", examine_then_change)
    with pytest.raises((ValueError, FileNotFoundError), match=r"b\.txt"):
        prepare(tmp_path, tokenizer=tokenizer, bpe_vocab_size=260)
    assert [*(tmp_path / "cache" / "corpora").iterdir()] == []
    assert [*(tmp_path / "cache").glob("tokenizers/*")] == []


def _cut(directory: Path) -> None:
    with (directory / "train.bin").open("r+b") as file:
        file.truncate(3)


def _remove(directory: Path) -> None:
    (directory / "validation.bin").unlink()


def _empty_meta(directory: Path) -> None:
    (directory / "meta.json").write_text("")


def _other_meta(directory: Path) -> None:
    (directory / "meta.json").write_text('{"train": []}')


def _grow(directory: Path) -> None:
    with (directory / "validation.bin").open("ab") as file:
        file.write(b"more")


def _no_list(directory: Path) -> None:
    (directory / "left_out.json").unlink()


@pytest.mark.parametrize("damage", [_cut, _remove, _empty_meta, _other_meta, _grow, _no_list])
def test_a_damaged_corpus_in_the_cache_is_made_anew(tmp_path, capsys, damage):
    write(tmp_path, {"text/a.txt": TEXT, "text/b.txt": TEXT * 2})
    before = prepare(tmp_path)
    tokens = before.train.copy()
    damage(before.directory)
    after = prepare(tmp_path)
    assert f"The cached corpus {before.directory} is made anew: " in capsys.readouterr().err
    np.testing.assert_array_equal(after.train, tokens)
    assert [*(tmp_path / "cache" / "corpora").iterdir()] == [after.directory]
    prepare(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_damaged_tokenizer_in_the_cache_is_trained_anew(tmp_path):
    write(tmp_path, {"text/a.txt": TEXT, "text/b.txt": TEXT * 2})
    before = prepare(tmp_path, tokenizer="bpe", bpe_vocab_size=260)
    (file,) = (tmp_path / "cache" / "tokenizers").iterdir()
    whole = file.read_text()
    for content in ("", "{}", whole[:100]):
        file.write_text(content)
        assert prepare(tmp_path, tokenizer="bpe", bpe_vocab_size=260).directory == before.directory
        assert file.read_text() == whole


def test_what_a_killed_process_left_in_the_cache_is_removed(tmp_path):
    write(tmp_path, {"text/a.txt": TEXT, "text/b.txt": TEXT * 2})
    corpora = tmp_path / "cache" / "corpora"
    write(corpora, {"tedlab-corpus-x/.owner": "", "tedlab-corpus-x/half/train.bin": "x"})
    corpus = prepare(tmp_path)
    assert [*corpora.iterdir()] == [corpus.directory]


def test_a_corpus_of_another_version_is_not_opened(tmp_path, monkeypatch):
    write(tmp_path, {"text/a.txt": TEXT, "text/b.txt": TEXT * 2})
    before = prepare(tmp_path).directory
    monkeypatch.setattr(corpus_module, "_FORMAT", corpus_module._FORMAT + 1)
    assert prepare(tmp_path).directory != before


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    write(tmp_path, {"text/a.txt": TEXT, "cache": "a file"})
    with pytest.raises(ValueError, match=r"data\.cache_dir='.*cache' cannot be written: Not a directory"):
        prepare(tmp_path)


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def _tokenizer(vocabulary: dict[str, int], **model) -> str:
    return json.dumps(
        {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>", **model}}
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not a tokenizer saved by"),
        ("{}", "is not a tokenizer saved by"),
        ("[" * 100_000, "is not a tokenizer saved by"),
        (b"\xff\xfe\0", "is not a tokenizer saved by"),
        (gzip.compress(b"{}"), "is not a tokenizer saved by"),
        (_tokenizer({"a": 0}), "has no token to put between documents"),
        (_tokenizer({}), "has no token to put between documents"),
        (
            _tokenizer({"a": 0, "<eos>": 4_294_967_295}),
            r"has 2 tokens with ids of up to 4,294,967,295: the model would",
        ),
        (_tokenizer({"a": 0, "<eos>": 2**24}), "of which there may be 16,777,216 at most"),
        (_tokenizer({"a": 0, "<eos>": 2**40}), "is not a tokenizer saved by"),
        (_tokenizer({"a": -1, "<eos>": 1}), "is not a tokenizer saved by"),
        (_tokenizer({"a": 0, "<eos>": 1}), "cannot encode the text of data.path: .*UNK"),
    ],
    ids=range(12),
)
def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path, content, said):
    write(tmp_path, {"text/a.txt": TEXT, "text/b.txt": TEXT * 2, "tokenizer.json": content})
    with pytest.raises(ValueError, match=said):
        prepare(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("size", [-1, 0, 256, 2**24 + 1, 10**12])
def test_an_absurd_vocabulary_is_refused_before_any_text_is_read(tmp_path, size):
    write(tmp_path, {"text/a.txt": TEXT, "text/b.txt": TEXT * 2})
    with pytest.raises(ValueError, match=rf"data\.bpe_vocab_size={size} is too (small|large)"):
        prepare(tmp_path, tokenizer="bpe", bpe_vocab_size=size)
