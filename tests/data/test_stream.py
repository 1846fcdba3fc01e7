"""Data sets streamed through Hugging Face datasets give what they hold, once; nothing of them is run."""

import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from tedlab.config import DataConfig, SourceConfig, StreamConfig
from tedlab.data import formats, reading, shards, tokenizers
from tedlab.data.corpus import prepare_corpora, prepare_corpus
from tedlab.data.mixture import check_sources
from tedlab.data.stream import Stream
from tests.test_conf import compose

TEXTS = [f"document {i} é🙂 " + "x" * (i % 7) for i in range(90)]


def lines(texts, path: Path, name: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({name: text, "n": len(text)}) + "\n" for text in texts))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set of two files, of which a part is a few documents."""
    monkeypatch.setattr(formats, "PART", 200)
    lines(TEXTS[:25], tmp_path / "set" / "train-0.jsonl")
    lines(TEXTS[25:], tmp_path / "set" / "train-1.jsonl")
    lines(["other " + text for text in TEXTS[:20]], tmp_path / "set" / "test.jsonl")
    return tmp_path


def streamed(folder, cache="cache", field="text", tokenizer="byte", fraction=0.1, processes=1, **stream):
    stream = StreamConfig(**{"dataset": str(folder / "set"), "tokens": 10**6, **stream})
    config = DataConfig(
        path=None, stream=stream, cache_dir=f"{folder}/{cache}", field=field, tokenizer=tokenizer,
        validation_fraction=fraction, bpe_vocab_size=280,
    )  # fmt: skip
    return prepare_corpus(config, 4, processes)


def texts(tokens):
    return bytes(tokens.tolist()).decode().split("\0")[:-1]


def content(corpus):
    return {file.name: file.read_bytes() for file in corpus.directory.iterdir() if file.name != "as_of.json"}


@pytest.mark.parametrize("written", ["json", "parquet", "csv", "text"])
def test_what_is_streamed_is_what_a_file_of_it_gives(folder, written):
    """The same documents are held out as of one file of JSON lines that has all of them."""
    other = folder / "other"
    other.mkdir()
    table = pa.table({"text": TEXTS, "n": range(len(TEXTS))})
    if written == "parquet":
        (other / "data").mkdir()
        pa.parquet.write_table(table.slice(0, 40), other / "data" / "train-00000.parquet", row_group_size=7)
        pa.parquet.write_table(table.slice(40), other / "data" / "train-00001.parquet", row_group_size=11)
        (other / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/*\n---\n# A set\n")
    elif written == "csv":
        pa.csv.write_csv(table, other / "train.csv")
    elif written == "text":
        (other / "train.txt").write_text("\n".join(TEXTS))
    else:
        other = folder / "set"
    corpus = streamed(folder, dataset=str(other))
    lines(TEXTS, folder / "all" / "all.jsonl")
    whole = prepare_corpus(
        DataConfig(path=f"{folder}/all/all.jsonl", cache_dir=f"{folder}/files", validation_fraction=0.1), 4
    )
    np.testing.assert_array_equal(corpus.train, whole.train)
    np.testing.assert_array_equal(corpus.validation, whole.validation)
    assert (corpus.bytes_per_token, corpus.digest) == (whole.bytes_per_token, whole.digest)
    assert corpus.source_files == {"json": 2, "parquet": 2}.get(written, 1)
    assert texts(corpus.train) + texts(corpus.validation) != TEXTS
    assert sorted(texts(corpus.train) + texts(corpus.validation)) == sorted(TEXTS)


@pytest.mark.parametrize("tokens", [60, 700, 1500])
def test_reading_ends_with_the_document_that_has_the_last_token_asked_for(folder, tokens, monkeypatch):
    whole = streamed(folder).train
    taken = []
    batches = Stream.batches
    monkeypatch.setattr(Stream, "batches", lambda *of: (taken.append(b) or b for b in batches(*of)))
    cut = streamed(folder, tokens=tokens).train
    ends = np.flatnonzero(np.asarray(whole) == 0) + 1
    assert len(cut) == min(end for end in ends if end >= tokens)
    np.testing.assert_array_equal(cut, whole[: len(cut)])
    assert sum(len(batch.texts) for batch in taken) < len(texts(cut)) * 1.2 + 14  # no more is read than is needed


def test_validation_may_have_a_split_of_its_own(folder):
    corpus = streamed(folder, validation="test")
    assert texts(corpus.train) == TEXTS
    assert texts(corpus.validation) == ["other " + text for text in TEXTS[:20]]
    some = streamed(folder, validation="test", tokens=700, fraction=0.3)
    assert 210 <= len(some.validation) < 210 + 2 * 200  # a part at most beyond what was asked for


def test_a_bpe_is_trained_on_the_beginning_of_the_training_text(folder, monkeypatch):
    monkeypatch.setattr("tedlab.data.corpus._LEARNED", 500)
    seen = []
    train_bpe = tokenizers.train_bpe
    monkeypatch.setattr(tokenizers, "train_bpe", lambda of, *rest: train_bpe([seen.append(t) or t for t in of], *rest))
    corpus = streamed(folder, tokenizer="bpe")
    held_out = {1, 11, 21}
    assert seen == [text for i, text in enumerate(TEXTS[: len(seen) + 3]) if i not in held_out][: len(seen)]
    assert 500 <= sum(len(text.encode()) for text in seen) < 550
    assert (
        corpus.tokenizer.decode(corpus.train[:3].tolist()) == TEXTS[0][: len(corpus.tokenizer.decode(corpus.train[:3]))]
    )


def test_rows_without_text_are_left_out_and_counted(folder, capsys):
    rows = [TEXTS[0], None, "a\0b", *TEXTS[1:40]]
    (folder / "some").mkdir()
    pa.parquet.write_table(pa.table({"text": rows}), folder / "some" / "train.parquet")
    corpus = streamed(folder, dataset=str(folder / "some"), fraction=0.5)
    assert sorted(texts(corpus.train) + texts(corpus.validation)) == sorted(TEXTS[:40])
    assert "2 rows of the split 'train' of data.stream.dataset=" in (said := capsys.readouterr().err)
    assert "were left out: they have no text" in said
    assert "has ended after" in said


def kills_itself(folder, at, moment, stream):
    """Prepares, and is killed by its own hand before a part, after it, or between a batch's note and its parts."""
    done = 0
    write_part, write_whole = shards.write_part, reading.write_whole

    def part(*arguments):
        nonlocal done
        if (moment, done) == ("before", at):
            os.kill(os.getpid(), signal.SIGKILL)
        written = write_part(*arguments)
        done += 1
        if (moment, done) == ("after", at):
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def whole(*arguments):
        write_whole(*arguments)
        if moment == "noted" and done >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    shards.write_part, reading.write_whole = part, whole
    streamed(folder, "killed", fraction=0.13, **stream)


@pytest.mark.parametrize(
    ("moment", "at", "stream"),
    [("before", 0, {}), ("noted", 5, {}), ("after", 4, {"tokens": 1500}), ("after", 13, {"validation": "test"})],
)
def test_a_killed_reading_goes_on_where_it_was_and_is_the_same_to_the_byte(folder, moment, at, stream, monkeypatch):
    whole = streamed(folder, "whole", fraction=0.13, **stream)
    arguments = (folder, at, moment, stream)
    victim = multiprocessing.get_context("fork").Process(target=kills_itself, args=arguments)
    victim.start()
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    begun = []
    batches = Stream.batches
    monkeypatch.setattr(
        Stream, "batches", lambda self, split, after: begun.append(after) or batches(self, split, after)
    )
    again = streamed(folder, "killed", fraction=0.13, **stream)
    assert content(again) == content(whole)
    assert (begun[0] is not None) == (at > 0)
    if at > 0:
        assert begun[0]["read"] > 0
    assert not [*(folder / "killed" / "corpora").glob("*.partial")]


@pytest.fixture
def begun(folder, monkeypatch):
    """Returns what interrupts a reading after some parts, and the folder that holds them."""
    write_part = shards.write_part

    def interrupted(**stream):
        done = []

        def part(*arguments):
            if len(done) == 8:
                raise KeyboardInterrupt
            done.append(written := write_part(*arguments))
            return written

        with monkeypatch.context() as patch:
            patch.setattr(shards, "write_part", part)
            with pytest.raises(KeyboardInterrupt):
                streamed(folder, **stream)
        (work,) = (folder / "cache" / "corpora").glob("*.partial")
        return work

    return interrupted


def test_no_error_loses_what_was_read(folder, begun, monkeypatch, capsys):
    """Neither a token of the Hub that has run out, nor a missing package, nor a disk that fails, nor time."""
    import datasets

    work = begun()
    parts = sorted(work.glob("*.bin"))
    assert len(parts) == 8
    os.utime(work, (time.time() - 8 * 86400,) * 2)

    def gated(*arguments, **options):
        raise datasets.exceptions.DatasetNotFoundError("it is gated")

    def broken(self):
        raise OSError(5, "Input/output error")

    for owner, name, value, said in (
        (datasets, "load_dataset_builder", gated, "the Hub has no such data set"),
        (datasets.IterableDataset, "__iter__", broken, "Input/output error"),
        (sys.modules, "datasets", None, "pip install"),
    ):
        with monkeypatch.context() as patch:
            (patch.setitem if owner is sys.modules else patch.setattr)(owner, name, value)
            with pytest.raises(ValueError, match=said):
                streamed(folder)
        assert sorted(work.glob("*.bin")) == parts
    capsys.readouterr()
    assert content(streamed(folder)) == content(streamed(folder, "whole"))
    assert "tokens were read before" in capsys.readouterr().err
    assert not work.exists()


@pytest.mark.parametrize("note", ["train-000002.json", "revision.json"])
def test_a_note_that_cannot_be_read_is_as_none(folder, begun, note, capsys):
    """Without one of a batch, reading goes on before that batch; without that of the commit, it begins anew."""
    (begun() / note).write_text("")
    capsys.readouterr()
    assert content(streamed(folder)) == content(streamed(folder, "whole"))
    assert ("tokens were read before" in capsys.readouterr().err) == (note != "revision.json")


def test_notes_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("renamed") or replace(*paths))
    reading.write_whole(tmp_path / "note.json", "12345")
    assert done == [5, "renamed"]


def test_what_is_wrong_before_a_part_leaves_nothing(folder):
    with pytest.raises(ValueError, match="has no split"):
        streamed(folder, split="nope")
    assert not [*(folder / "cache" / "corpora").iterdir()]


def test_reading_goes_on_without_opening_the_files_between(folder, monkeypatch):
    """Files are opened for their columns, the first, and where reading was; not those before."""
    for number in range(5):
        lines([f"{number} {text}" for text in TEXTS[:30]], folder / "five" / f"train-{number}.jsonl")
    config = StreamConfig(dataset=str(folder / "five"), tokens=9)
    *_, last = (batch for batch in Stream(config, "text").batches("train") if batch.texts[-1].startswith("3 "))
    opened, really = set(), open
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, *rest, **o: opened.add(Path(path).name) or really(path, *rest, **o))
        following = next(Stream(config, "text").batches("train", last.after))
    assert following.before == last.before + len(last.texts)
    read = {name for name in opened if name.startswith("train-")}
    assert {"train-0.jsonl", "train-3.jsonl"} <= read <= {f"train-{n}.jsonl" for n in (0, 2, 3, 4)}


def test_the_bar_of_a_tokenizer_counts_each_byte_once(folder, monkeypatch):
    told = []

    @contextmanager
    def advancing(description, total, **options):
        yield lambda amount: told.append(amount) if description == "Training the tokenizer" else None

    monkeypatch.setattr("tedlab.data.corpus.advancing", advancing)
    corpus = streamed(folder, tokenizer="bpe")
    assert sum(told) == len("".join(t for t in TEXTS if t not in texts_of_validation(corpus)).encode())


def texts_of_validation(corpus):
    separator = corpus.tokenizer.separator
    ends = [-1, *np.flatnonzero(np.asarray(corpus.validation) == separator)]
    return {corpus.tokenizer.decode(corpus.validation[a + 1 : b].tolist()) for a, b in pairwise(ends)}


CSV = [f"document {i}" for i in range(40)] + ["NA", "null", "None", "nan", "007", "1e5", "2020-01-01", "TRUE", " x"]


def test_texts_of_csv_that_look_like_something_else_are_text(folder):
    (folder / "csv").mkdir()
    (folder / "csv" / "train-0.csv").write_text("text\n" + "".join(f"{text}\n" for text in CSV[:45]))
    (folder / "csv" / "train-1.csv").write_text("n,text\n" + "".join(f"a,{text}\n" for text in CSV[45:]))
    corpus = streamed(folder, dataset=str(folder / "csv"))
    assert sorted(texts(corpus.train) + texts(corpus.validation)) == sorted(CSV)
    digits = folder / "digits.csv"
    digits.write_text("text\n" + "".join(f"{i:04}\n" for i in range(30)))
    assert texts(streamed(folder, dataset="csv", files=str(digits)).train)[0] == "0000"
    with pytest.raises(ValueError, match=r"has no column 'txt'; its columns are 'text'"):
        streamed(folder, dataset="csv", files=str(digits), field="txt")


@pytest.mark.parametrize("written", ["json", "parquet"])
def test_other_columns_may_differ_from_file_to_file(folder, written):
    rows = [[{"text": t, "n": 1} for t in TEXTS[:40]], [{"z": [1], "text": t} for t in TEXTS[40:]]]
    other = folder / "other"
    other.mkdir()

    def save(number, rows):
        if written == "parquet":
            pa.parquet.write_table(pa.Table.from_pylist(rows), other / f"train-{number}.parquet")
        else:
            (other / f"train-{number}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    for number, some in enumerate(rows):
        save(number, some)
    if written == "json":
        (other / "train-.jsonl").write_text("\n\n")  # the first, without a row that tells columns
    corpus = streamed(folder, dataset=str(other))
    assert sorted(texts(corpus.train) + texts(corpus.validation)) == sorted(TEXTS)
    (other / "train-.jsonl").unlink(missing_ok=True)
    save(1, [{"z": 1}] * 9)
    with pytest.raises(ValueError, match=r"has a file without the column 'text'$"):
        streamed(folder, dataset=str(other))
    if written == "json":
        save(1, [{"text": "2020-01-01"}] * 9)
        with pytest.raises(ValueError, match=r"Row 41 of .* holds a datetime in column 'text', not text$"):
            streamed(folder, dataset=str(other))


@pytest.mark.parametrize("named", ["{folder}/secret.jsonl", "../secret.jsonl", ".hidden.jsonl"])
def test_a_card_in_a_folder_names_only_what_is_in_it(folder, named):
    for path in ("secret.jsonl", "set/.hidden.jsonl"):
        lines(["secret " + text for text in TEXTS], folder / path)
    named = named.format(folder=folder)
    (folder / "set" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {named}\n---\n")
    with pytest.raises(ValueError, match=r"set names files that are not its own, such as .*\.jsonl$"):
        streamed(folder)
    assert texts(streamed(folder, files=named).train)[0].startswith("secret")  # of the user's own will


def test_a_card_in_a_folder_names_no_url(folder):
    stream = Stream(StreamConfig(dataset=str(folder / "set"), tokens=9), "text")
    for url in ("https://elsewhere.org/x.jsonl", "zip://x.jsonl::https://elsewhere.org/x.zip"):
        with pytest.raises(ValueError, match="names files that are not its own"):
            stream._refuse_others([f"{folder}/set/train-0.jsonl", url])
    stream._refuse_others([f"{folder}/set/train-0.jsonl"])


def test_a_card_at_the_hub_names_only_its_own():
    stream = Stream(StreamConfig(dataset="who/set", tokens=9), "text", "a" * 40)
    stream._refuse_others([f"hf://datasets/who/set@{'a' * 40}/x.jsonl"])
    for other in ("hf://datasets/who/other@main/x.jsonl", "/etc/passwd", "https://elsewhere.org/x.jsonl"):
        with pytest.raises(ValueError, match="names files that are not its own"):
            stream._refuse_others([other])


def test_how_many_files_there_are_is_known_once_they_are_read(folder, monkeypatch):
    """Else a network that is lost at the end of a long reading would be missed."""
    stream = Stream(StreamConfig(dataset=str(folder / "set"), tokens=9), "text")
    assert sum(len(batch.texts) for batch in stream.batches("train")) == len(TEXTS)
    monkeypatch.setattr(Stream, "_opened", None)
    assert stream.files("train") == 2


def test_files_outside_of_the_folder_that_change_are_read_anew(folder):
    lines(TEXTS, folder / "elsewhere" / "x.jsonl")
    before = streamed(folder, files="../elsewhere/*.jsonl")
    lines(["new", *TEXTS], folder / "elsewhere" / "x.jsonl")
    assert texts(before.train)[0] != texts(streamed(folder, files="../elsewhere/*.jsonl").train)[0] == "new"


def test_the_home_folder_may_be_written_short(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    expected = texts(streamed(folder).train)
    assert texts(streamed(folder, dataset="~/set").train) == expected
    assert texts(streamed(folder, dataset="json", files="~/set/train-*.jsonl").train) == expected
    with pytest.raises(FileNotFoundError, match=r"data.stream.files='.*/set/no.jsonl' does not exist"):
        streamed(folder, dataset="json", files="~/set/no.jsonl")


def test_messages_of_the_network_say_once_what_is_wrong(folder):
    stream = Stream(StreamConfig(dataset="json", files="https://elsewhere.org/x.jsonl", tokens=9), "text")

    def said(error):
        with pytest.raises((ValueError, OSError)) as caught, stream._explained("here"), stream._explained():
            raise error
        return f"{type(caught.value).__name__} {caught.value}"

    assert said(ConnectionError("no route")).count("cannot be reached") == 1
    assert "cannot be reached, or has no such file: x. With" in said(FileNotFoundError("x"))
    for status, kind in ((404, "_Refused"), (403, "_Refused"), (500, "Unreachable")):
        answered = type("ClientResponseError", (Exception,), {"status": status})
        assert said(answered("of a client")).startswith(kind)
    assert said(StopIteration()).endswith("has no rows")


def test_what_datasets_has_cached_does_not_take_the_place_of_the_hub(monkeypatch):
    import datasets

    class Cache:
        __module__ = "datasets.packaged_modules.cache.cache"

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *arguments, **options: Cache())
    with pytest.raises(ConnectionError, match=r"=who/set cannot be reached\. With a network"):
        Stream(StreamConfig(dataset="who/set", tokens=9), "text", "a" * 40).files("train")


@pytest.mark.slow  # the server of its workers imports torch
def test_two_processes_read_what_one_reads(folder):
    for stream in ({"tokens": 1500}, {"validation": "test"}):
        assert content(streamed(folder, "two", processes=2, **stream)) == content(streamed(folder, "one", **stream))


def test_a_stream_is_one_of_several_sources(folder):
    sources = {
        "web": {"stream": StreamConfig(dataset=str(folder / "set"), tokens=900)},
        "files": {"path": f"{folder}/set"},
    }
    config = DataConfig(
        path=None, cache_dir=f"{folder}/cache", mixing="tokens",
        sources={name: SourceConfig(**source) for name, source in sources.items()},
    )  # fmt: skip
    found = prepare_corpora(config, 4)
    np.testing.assert_array_equal(found["web"].train, streamed(folder, fraction=0.05, tokens=900).train)


def test_a_file_that_changes_is_read_anew(folder):
    before = streamed(folder)
    lines([*TEXTS[:24], "new"], folder / "set" / "train-0.jsonl")
    after = streamed(folder)
    assert (before.directory, "new" in texts(before.train)) != (after.directory, "new" in texts(after.train))
    assert "new" in texts(after.train)


# ---- what cannot be read ---------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict, str]] = {
    "split": ({"split": "nope"}, r"has no split 'nope'; its splits are 'train', 'test'"),
    "slice": ({"split": "train[:5]"}, r"has no split 'train\[:5\]'"),
    "column": ({"field": "txt"}, r"has no column 'txt'; its columns are 'text', 'n'"),
    "numbers": ({"field": "n"}, r"The column 'n' of .* holds int64, not text"),
    "configuration": ({"config": "en"}, r"has no configuration 'en'; its configurations are 'default'"),
    "files": ({"files": "no*.jsonl"}, r"data.stream.files='.*/no\*.jsonl' names no file"),
    "format without files": ({"dataset": "json"}, r"data.stream.dataset=json is a format: data.stream.files says"),
    "neither": ({"dataset": "/no/where"}, r"=/no/where is neither a folder, nor the name of a data set at the Hub"),
    "misspelt": ({"dataset": "a/b/parquets"}, r"neither a folder"),
    "revision": ({"revision": "main"}, r"data.stream.revision=main is of a data set at the Hub, which .* is not"),
    "same split": ({"validation": "train"}, r"are both 'train', but validation needs other text"),
    "no name": ({"dataset": ""}, r"data.stream.dataset has no value yet"),
    "no number": ({"tokens": None}, r"data.stream.tokens has no value: how many tokens of"),
}


@pytest.mark.parametrize(("fields", "said"), WRONG.values(), ids=WRONG)
def test_what_a_data_set_does_not_have_is_an_error_that_lists_what_it_has(folder, fields, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        streamed(folder, **fields)
    assert "\n" not in f"{caught.value}"


def test_of_several_configurations_one_must_be_named(folder):
    for name in ("en", "de"):
        lines([f"{name} {text}" for text in TEXTS], folder / "set" / name / "train.jsonl")
    (folder / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en/*\n- config_name: de\n  data_files: de/*\n---\n"
    )
    with pytest.raises(ValueError, match=r"several configurations: data.stream.config is one of 'en', 'de'"):
        streamed(folder)
    assert texts(streamed(folder, config="de").train)[0] == f"de {TEXTS[0]}"


def test_a_damaged_file_is_told_in_a_sentence(folder):
    (folder / "bad").mkdir()
    pa.parquet.write_table(pa.table({"text": TEXTS}), folder / "bad" / "train.parquet")
    damaged = bytearray((folder / "bad" / "train.parquet").read_bytes())
    damaged[10:400] = b"\xff" * 390
    (folder / "bad" / "train.parquet").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"data.stream.dataset=\S+bad cannot be read") as caught:
        streamed(folder, dataset=str(folder / "bad"))
    assert "\n" not in f"{caught.value}"


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_of_a_data_set_is_run(folder, monkeypatch):
    """Neither a script that has the folder's name, nor a pickle, nor what a builder of other formats would decode."""
    canary = folder / "canary"
    script = folder / "scripted" / "scripted.py"
    script.parent.mkdir()
    script.write_text(f"open({str(canary)!r}, 'w')\n")
    pickled = folder / "train.pkl"
    pickled.write_bytes(pickle.dumps(_Canary(canary)))
    packed = folder / "packed" / "train.tar"
    packed.parent.mkdir()
    with tarfile.open(packed, "w") as archive:
        archive.add(pickled, "0.pyd")
    with pytest.raises(ValueError, match="is a script, which tedlab does not run"):
        streamed(folder, dataset=str(script.parent))
    with pytest.raises(ValueError, match=r"is read by the builder Webdataset.*; tedlab reads those of json, csv"):
        streamed(folder, dataset=str(packed.parent))
    pandas = StreamConfig(dataset="pandas", files=str(pickled), tokens=9)
    monkeypatch.setattr("tedlab.data.stream.is_at_the_hub", lambda config: False)  # else nothing of it is looked at
    with pytest.raises(ValueError, match=r"is read by the builder Pandas"):
        Stream(pandas, "text").files("train")
    assert not canary.exists()
    pickle.loads(pickled.read_bytes())
    assert canary.exists()


def test_without_datasets_a_sentence_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data.stream needs datasets: pip install 'tedlab\[data\]'"):
        streamed(folder)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="3.6.0"))
    with pytest.raises(ValueError, match=r"data.stream needs datasets 5.2 or later, .* here is 3.6.0"):
        streamed(folder)


@pytest.mark.parametrize(
    ("overrides", "said"),
    {
        "two": (
            ["data.path=text", "data.stream.dataset=x/y", "data.stream.tokens=9"],
            r"data.path=.* and data.stream.dataset=x/y both",
        ),
        "in vain": (
            ["data.stream.tokens=9"],
            r"data.stream.tokens is given, but no data.str",
        ),
        "split in vain": (["data.stream.split=test"], r"data.stream.split is given, but no data.stream.dataset"),
        "source of neither": (["+data.sources={a:{weight:1.0}}"], r"data.sources.a has neither a path"),
        "source of both": (
            ["+data.sources={a:{path:x,weight:1.0,stream:{dataset:x/y,tokens:9}}}"],
            r"data.sources.a has a path \(x\) and a stream \(x/y\)",
        ),
        "source without a number": (
            ["+data.sources={a:{weight:1.0,stream:{dataset:x/y}}}"],
            r"data.sources.a.stream.tokens has no value",
        ),
    }.values(),
)
def test_values_that_contradict_are_refused_before_anything_is_read(overrides, said):
    with pytest.raises(ValueError, match=said):
        check_sources(compose(*overrides).data)


# ---- the Hub ---------------------------------------------------------------------------------------------------------


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as streaming asks for: one repository of data, by branch and by commit."""

    files: dict[str, bytes] = {}
    commit = hashlib.sha1(b"first").hexdigest()
    asked: list[str] = []

    def log_message(self, *arguments) -> None:
        pass

    def _answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length") or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value) -> None:
        self._answer(json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        asked = json.loads(sent)["paths"] if sent.startswith("{") else parse_qs(sent).get("paths", [])
        self._json([self._entry(path) for path in asked if path in self.files or path in ("data", "")])

    def _entry(self, path: str) -> dict:
        if path not in self.files:
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        content = self.files[path]
        return {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        type(self).asked.append(f"{self.command} {path}")
        if not path.startswith(("/api/datasets/who/set", "/datasets/who/set")):
            self._answer(b"", 401, X_Error_Code="RepoNotFound")
        elif path.startswith("/api/datasets/who/set/tree/"):
            inside = path.split("/tree/", 1)[1].partition("/")[2]
            names = [n for n in self.files if n.startswith(f"{inside}/" if inside else "")]
            folders = sorted({n.split("/")[0] for n in names if "/" in n}) if not inside else []
            here = [n for n in names if inside or "/" not in n]
            self._json([self._entry(name) for name in (*folders, *here)])
        elif path.startswith("/api/datasets/who/set"):
            if "/revision/" in path and path.rpartition("/")[2] not in ("main", self.commit):
                self._answer(b"", 404, X_Error_Code="RevisionNotFound")
                return
            siblings = [{"rfilename": name} for name in self.files]
            self._json({"id": "who/set", "sha": self.commit, "siblings": siblings, "private": False, "tags": []})
        else:
            name = path.split("/resolve/", 1)[1].partition("/")[2]
            if name not in self.files:
                self._answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)
                return
            content = self.files[name]
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
                ranged = {"Content_Range": f"bytes {first}-{last}/{len(content)}"}
                self._answer(content[first : last + 1], 206, ETag=tag, X_Repo_Commit=self.commit, **ranged)
            else:
                length = {"length": str(len(content))} if self.command == "HEAD" else {}
                self._answer(content, ETag=tag, X_Repo_Commit=self.commit, **length)


def _reads_the_hub(folder: Path, pipe: Connection) -> None:
    """Prepares from the Hub; when told to, again without it."""

    def tried(**stream):
        begun = time.monotonic()
        try:
            return texts(streamed(folder, **{"dataset": "who/set", "tokens": 800, **stream}).train)
        except (ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - begun

    pipe.send([tried(), tried(split="dev"), tried(revision="v9"), tried(dataset="who/nothing")])
    pipe.recv()
    answers = [tried(), tried(tokens=900)]
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    pipe.send([*answers, tried(tokens=900)])


@pytest.mark.slow  # the other process imports everything anew
def test_a_data_set_of_the_hub_is_streamed_once_and_then_needs_no_network(tmp_path, monkeypatch):
    """A server of this test stands in for the Hub, through HF_ENDPOINT."""
    for number in range(3):
        file = tmp_path / f"{number}.jsonl"
        lines(TEXTS[number * 30 : number * 30 + 30], file)
        _Hub.files[f"data/train-{number}.jsonl"] = file.read_bytes()
    _Hub.files["README.md"] = b"---\nconfigs:\n- config_name: default\n  data_files: data/*\n---\n"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", f"{tmp_path}/hf")
    ours, theirs = multiprocessing.Pipe()
    reader = multiprocessing.get_context("spawn").Process(target=_reads_the_hub, args=(tmp_path, theirs))
    reader.start()
    theirs.close()
    try:
        found, split, revision, nothing = ours.recv()
    finally:
        server.shutdown()
        server.server_close()
    ours.send("closed")
    again, unreachable, offline = ours.recv()
    reader.join(60)
    assert found == again == [text for i, text in enumerate(TEXTS) if i % 10 != 1][: len(found)]
    assert len(found) > 10
    assert "has no split 'dev'; its splits are 'train'" in split[0]
    assert "has no revision v9" in revision[0]
    assert "the Hub has no such data set" in nothing[0]
    for said, seconds in (unreachable, offline):
        assert said.startswith("Unreachable: data.stream.dataset=who/set cannot be reached: ")
        assert seconds < 10
    assert "offline mode is enabled" in offline[0]
    read = [asked for asked in _Hub.asked if "/resolve/" in asked and "jsonl" in asked]
    assert any("train-0" in asked for asked in read)
    assert all(_Hub.commit in asked for asked in read)
    (corpus,) = (tmp_path / "cache" / "corpora").iterdir()
    assert json.loads((corpus / "meta.json").read_text())["stream"]["revision"] == _Hub.commit
