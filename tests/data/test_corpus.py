import json
import multiprocessing
import os
import sysconfig
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from tedlab.config import DataConfig
from tedlab.data import corpus as corpus_module
from tedlab.data import documents
from tedlab.data.corpus import prepare_corpus
from tedlab.data.documents import find_files, split


@pytest.fixture
def prepare(tmp_path):
    """Prepares what lies under ``text/`` or the given path of it, with its own cache."""

    def prepare(path="text", sequence_length=4, **fields):
        config = DataConfig(path=str(tmp_path / path), cache_dir=str(tmp_path / "cache"), **fields)
        return prepare_corpus(config, sequence_length)

    return prepare


def _write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def _lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def _documents(corpus):
    """The texts of both splits, as sets."""
    sides = (corpus.train, corpus.validation)
    return [set(corpus.tokenizer.decode(side.tolist()).rstrip("\0").split("\0")) for side in sides]


def _names(path):
    return [file.name for file in find_files(str(path))]


TREE = {
    "b.txt": "b",
    "a/c.md": "c",
    "a/d.py": "d",
    "a/deep/e.jsonl": _lines({"text": "e"}),
    "a/.hidden": "no",
    ".git/config": "no",
    "empty.txt": "",
}


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("", ["a/c.md", "a/d.py", "a/deep/e.jsonl", "b.txt"]),
        ("a", ["c.md", "d.py", "deep/e.jsonl"]),
        ("b.txt", ["b.txt"]),
        ("a/*.md", ["c.md"]),
        ("**/*.*", ["a/c.md", "a/d.py", "a/deep/e.jsonl", "b.txt"]),
        ("**/**/*.py", ["a/d.py"]),
        ("a/deep/[ef].*", ["e.jsonl"]),
    ],
)
def test_a_file_a_folder_and_a_glob_find_text_and_nothing_hidden(tmp_path, path, names):
    _write(tmp_path, TREE)
    assert _names(tmp_path / path) == names


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path):
    _write(tmp_path, {"a[1].txt": "x"})
    assert _names(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_no_path_is_the_standard_library_without_its_tests():
    names = [Path(file.name) for file in find_files(None)]
    assert Path("argparse.py") in names
    assert {name.suffix for name in names} == {".py"}
    assert not any({"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(name.parts) for name in names)
    assert all(Path(sysconfig.get_paths()["stdlib"], name).is_file() for name in names)


def test_every_document_is_in_one_split_with_a_separator_after_it(tmp_path, prepare):
    texts = {f"{i}.txt": f"text number {i} é" for i in range(40)}
    _write(tmp_path / "text", texts)
    corpus = prepare(validation_fraction=0.25)
    train, validation = _documents(corpus)
    assert train | validation == set(texts.values())
    assert not train & validation
    assert corpus.train[-1] == corpus.validation[-1] == 0
    assert np.count_nonzero(corpus.train == 0) == len(train)
    assert (len(train), len(validation)) == (30, 10)


def test_binary_files_among_others_are_left_out(tmp_path, prepare):
    _write(tmp_path / "text", {"a.txt": "some text", "b.txt": "other text", "c.bin": b"a\0b", "d.txt": b"caf\xe9 au"})
    train, validation = _documents(prepare())
    assert train | validation == {"some text", "other text"}


def test_the_split_depends_on_names_and_sizes_only(tmp_path):
    files = {f"{i}/x.txt": "x" * (10 + i) for i in range(50)}
    held_out = []
    for root, order in ((tmp_path / "one", sorted(files)), (tmp_path / "two", sorted(files, reverse=True))):
        _write(root, {name: files[name] for name in order})
        _, validation = split(find_files(str(root)), 0.1, "text")
        held_out.append([source.path.relative_to(root) for source in validation])
    assert held_out[0] == held_out[1] != []


@pytest.mark.parametrize(
    ("sizes", "fraction"),
    [
        ([100] * 200, 0.05),
        ([100] * 200, 0.5),
        ([10_000] + [100] * 100, 0.05),  # a file too large to be held out must not end the search for smaller ones
        ([*range(1, 200)], 0.1),
    ],
)
def test_the_share_of_bytes_held_out_is_near_the_fraction(tmp_path, sizes, fraction):
    _write(tmp_path, {f"{i}.txt": f"{i}".rjust(size, "x")[:size] for i, size in enumerate(sizes)})
    train, validation = split(find_files(str(tmp_path)), fraction, "text")
    assert sum(source.size for source in train) + sum(source.size for source in validation) == sum(sizes)
    assert sum(source.size for source in validation) == pytest.approx(fraction * sum(sizes), rel=0.1)


def test_of_few_files_the_smallest_is_held_out(tmp_path):
    _write(tmp_path, {"a.txt": "x" * 90, "b.txt": "x" * 70, "c.txt": "x" * 80})
    train, validation = split(find_files(str(tmp_path)), 0.05, "text")
    assert [source.size for source in train] == [90, 80]
    assert [source.size for source in validation] == [70]


@pytest.mark.parametrize("shift", range(4))
def test_of_one_text_file_the_end_is_held_out_at_a_whole_character(tmp_path, prepare, shift):
    text = "." * shift + "🙂" * 50
    _write(tmp_path, {"one.txt": text})
    corpus = prepare("one.txt", validation_fraction=0.2)
    (train,), (validation,) = _documents(corpus)
    assert train + validation == text
    assert len(validation) == pytest.approx(10, abs=1)


def test_of_one_jsonl_file_documents_are_held_out_evenly(tmp_path, prepare):
    _write(tmp_path, {"one.jsonl": "\n" + _lines(*({"body": f"document {i}", "id": i} for i in range(60)))})
    train, validation = _documents(prepare("one.jsonl", field="body", validation_fraction=0.1))
    assert validation == {f"document {i}" for i in range(1, 60, 10)}
    assert train == {f"document {i}" for i in range(60)} - validation


def test_a_jsonl_file_among_others_is_held_out_as_a_whole(tmp_path, prepare):
    _write(tmp_path / "text", {"a.jsonl": _lines({"text": "one"}, {"text": "two"}), "b.txt": "y" * 200})
    assert _documents(prepare()) == [{"y" * 200}, {"one", "two"}]


def test_text_longer_than_a_block_is_stored_as_it_is(tmp_path, prepare, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", 7)
    text = "short\r\n" + "a line without an end é🙂" * 20
    _write(tmp_path / "text", {"a.txt": text, "b.txt": "short, and held out"})
    assert _documents(prepare())[0] == {text}


def test_blocks_end_with_a_line_so_that_no_word_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", 8)
    _write(tmp_path, {"a.txt": "abc defg\nhij\nklm nopq rst\n"})
    (blocks,) = documents.Text(tmp_path / "a.txt", 0, 26).documents(lambda size: None)
    assert list(blocks) == ["abc defg\n", "hij\nklm nopq rst", "\n"]


def test_bytes_per_token_counts_separators_as_tokens(tmp_path, prepare):
    _write(tmp_path, {"one.txt": "x" * 90 + "é" * 5})
    corpus = prepare("one.txt", validation_fraction=0.1)
    assert bytes(corpus.validation) == ("é" * 5).encode() + b"\0"
    assert corpus.bytes_per_token == 10 / 11


def test_a_bpe_corpus_decodes_to_its_text(tmp_path, prepare):
    text = "the quick brown fox jumps over the lazy dog\n" * 30
    _write(tmp_path, {"one.txt": text})
    corpus = prepare("one.txt", tokenizer="bpe", bpe_vocab_size=300)
    assert corpus.train.dtype == np.uint16
    assert corpus.train[-1] == corpus.validation[-1] == corpus.tokenizer.separator
    assert corpus.tokenizer.decode([*corpus.train[:-1], *corpus.validation[:-1]]) == text
    assert corpus.bytes_per_token > 1


@pytest.fixture
def count_tokenisations(monkeypatch):
    runs = []
    write_parts = corpus_module.write_parts
    monkeypatch.setattr(corpus_module, "write_parts", lambda *args: (runs.append(1), write_parts(*args))[1])
    return runs


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_the_second_time_nothing_is_tokenised(tmp_path, prepare, count_tokenisations, tokenizer):
    _write(tmp_path / "text", {"a.txt": "a b c d e", "b.txt": "f g h i j"})
    first = prepare(tokenizer=tokenizer, bpe_vocab_size=260)
    second = prepare(tokenizer=tokenizer, bpe_vocab_size=260, sequence_length=2)
    assert first.directory == second.directory
    assert len(count_tokenisations) == 1
    np.testing.assert_array_equal(first.train, second.train)


def test_nobody_waits_for_a_corpus_that_is_there(tmp_path, prepare, monkeypatch):
    _write(tmp_path / "text", {"a.txt": "a b c d e", "b.txt": "f g h i j"})
    prepare()
    monkeypatch.delattr(corpus_module, "_alone_with")
    prepare()


@pytest.mark.parametrize(
    "change",
    [
        lambda text, fields: (text / "c.txt").write_text("new file"),
        lambda text, fields: (text / "a.txt").write_text("another size"),
        lambda text, fields: os.utime(text / "a.txt", (1, 1)),
        lambda text, fields: (text / "a.txt").rename(text / "z.txt"),
        lambda text, fields: fields.update(validation_fraction=0.4),
        lambda text, fields: fields.update(tokenizer="bpe"),
        lambda text, fields: fields.update(field="body"),
    ],
    ids=["file added", "size", "mtime", "name", "fraction", "tokenizer", "field"],
)
def test_whatever_the_tokens_depend_on_leads_to_another_folder(tmp_path, prepare, change):
    _write(tmp_path / "text", {"a.txt": "a b c d e", "b.txt": "f g h i j"})
    fields = {"tokenizer": "byte", "bpe_vocab_size": 260}
    before = prepare(**fields).directory
    change(tmp_path / "text", fields)
    assert prepare(**fields).directory != before


def test_files_of_equal_names_sizes_and_times_elsewhere_are_another_corpus(tmp_path, prepare):
    for folder, word in (("one", "ones"), ("two", "twos")):
        _write(tmp_path / folder, {"a.txt": word * 9, "b.txt": f"{word} " * 9})
        for file in (tmp_path / folder).iterdir():
            os.utime(file, (1, 1))
    (tmp_path / "now").symlink_to("one")
    assert "ones" in "".join(set.union(*_documents(prepare("now"))))
    (tmp_path / "now").unlink()
    (tmp_path / "now").symlink_to("two")
    assert "twos" in "".join(set.union(*_documents(prepare("now"))))


def _race(barrier, config, results):
    barrier.wait(timeout=20)
    corpus = prepare_corpus(config, 4)
    results.put((str(corpus.directory), len(corpus.train), int(corpus.train.sum())))


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_processes_that_prepare_at_once_all_succeed_with_one_result(tmp_path, tokenizer):
    _write(tmp_path / "text", {f"{i}.txt": f"some text {i}\n" * 500 for i in range(20)})
    config = DataConfig(
        path=str(tmp_path / "text"), tokenizer=tokenizer, bpe_vocab_size=300, cache_dir=str(tmp_path / "cache")
    )
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_race, args=(barrier, config, results)) for _ in range(3)]
    for process in processes:
        process.start()
    outcomes = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(timeout=20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    ((directory, _, _),) = outcomes
    assert [str(entry) for entry in (tmp_path / "cache" / "corpora").iterdir()] == [directory]  # nothing temporary


def test_the_slower_of_two_processes_uses_what_the_faster_one_wrote(tmp_path, prepare, monkeypatch):
    _write(tmp_path / "text", {"a.txt": "aaaaaaaa", "b.txt": "bbbbbbbb"})
    write_parts = corpus_module.write_parts

    def overtaken(*args):
        monkeypatch.setattr(corpus_module, "write_parts", write_parts)
        faster = prepare()
        (faster.directory / "by the faster one").touch()
        return write_parts(*args)

    monkeypatch.setattr(corpus_module, "_alone_with", lambda directory: nullcontext())  # files cannot be locked
    monkeypatch.setattr(corpus_module, "write_parts", overtaken)
    assert (prepare().directory / "by the faster one").exists()


def test_an_interrupted_preparation_leaves_nothing_behind(tmp_path, prepare):
    _write(tmp_path / "text", {"a.txt": "a" * 20, "b.jsonl": _lines({"text": "fine"}) + "broken"})
    with pytest.raises(ValueError, match="not JSON"):
        prepare()
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


ERRORS = {
    "missing": ({}, "nowhere", {}, FileNotFoundError, r"nowhere' does not exist\. It must be a file, a folder or"),
    "no match": ({}, "*.txt", {}, FileNotFoundError, r"\*\.txt' names no file"),
    "empty folder": ({"text/.hidden": "x"}, "text", {}, FileNotFoundError, "names no file. Hidden files are left out"),
    "empty files": ({"text/a": "", "text/b": ""}, "text", {}, ValueError, "names 2 files, all of them empty"),
    "nul": (
        {"a.txt": b"a\0b"},
        "a.txt",
        {},
        ValueError,
        r"a\.txt cannot be used: it holds NUL bytes\. A corpus is UTF-8",
    ),
    "latin-1": ({"a.txt": b"caf\xe9 au"}, "a.txt", {}, ValueError, r"a\.txt cannot be used: it is not UTF-8 \(invalid"),
    "cut": ({"a.txt": b"caf\xc3"}, "a.txt", {}, ValueError, r"a\.txt cannot be used: it is not UTF-8 \(unexpected end"),
    "all binary": ({"text/a": b"\0", "text/b": b"\xff"}, "text", {}, ValueError, "Nor can the 1 other files"),
    "short": (
        {"a.txt": "x" * 100},
        "a.txt",
        {"sequence_length": 8},
        ValueError,
        r"too short: it has 96 training and 6 validation tokens, and one sample of model.sequence_length=8 needs 9",
    ),
    "one document": (
        {"a.jsonl": _lines({"text": "x" * 50})},
        "a.jsonl",
        {},
        ValueError,
        "51 training and 0 validation",
    ),
    "no field": (
        {"a.jsonl": "\n" + _lines({"text": "fine"}, {"body": "x", "id": 1})},
        "a.jsonl",
        {},
        ValueError,
        r"Line 3 of .*a\.jsonl has no field 'text'; its fields are 'body', 'id'\. Set data\.field",
    ),
    "no fields": ({"a.jsonl": _lines({})}, "a.jsonl", {}, ValueError, "its fields are none at all"),
    "not json": ({"a.jsonl": "{'text': 1}"}, "a.jsonl", {}, ValueError, r"Line 1 of .*a\.jsonl is not JSON \(.*\)\. A"),
    "not an object": ({"a.jsonl": '["text"]'}, "a.jsonl", {}, ValueError, r"Line 1 of .* holds a list, but"),
    "not text": ({"a.jsonl": _lines({"text": 5})}, "a.jsonl", {}, ValueError, "holds a int in field 'text', not text"),
    "nul escape": ({"a.jsonl": _lines({"text": "a\0b"})}, "a.jsonl", {}, ValueError, "Line 1 of .* holds NUL or half"),
    "surrogate": ({"a.jsonl": _lines({"text": "\ud800"})}, "a.jsonl", {}, ValueError, "half a surrogate pair"),
    "fraction": ({"a.txt": "x"}, "a.txt", {"validation_fraction": 1.0}, ValueError, r"fraction=1\.0 must lie strictly"),
}


@pytest.mark.parametrize(("files", "path", "fields", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_a_corpus_that_cannot_be_used_says_why(tmp_path, prepare, files, path, fields, error, message):
    _write(tmp_path, files)
    with pytest.raises(error, match=message) as caught:
        prepare(path, **fields)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
