"""``tedlab data``: prepared in parts by several processes, killed anywhere, the corpus is the same to the byte."""

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tedlab.commands import data as command
from tedlab.config import DataConfig
from tedlab.data import corpus as corpus_module
from tedlab.data import documents, formats, shards
from tedlab.data import overview as overview_module
from tedlab.data.corpus import prepare_corpora, prepare_corpus
from tedlab.data.overview import overview
from tedlab.data.tokenizers import ByteTokenizer
from tests.commands import _run_module
from tests.test_conf import compose

SEED = int(os.environ.get("TEDLAB_CHAOS_SEED", random.SystemRandom().randrange(10**6)))


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Files of each kind, whose 23 parts are small."""
    monkeypatch.setattr(formats, "PART", 400)
    monkeypatch.setattr(documents, "_BLOCK", 128)
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "long.txt").write_text("".join(f"line {i} of a long text\n" for i in range(200)))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i} é"}) + "\n" for i in range(120)))
    for i in range(12):
        (folder / f"{i}.md").write_text(f"short {i}" * 5)
    return folder


def config(folder, cache, **fields):
    fields = {"tokenizer": "bpe", "bpe_vocab_size": 280, "validation_fraction": 0.2, **fields}
    return DataConfig(path=str(folder), cache_dir=str(folder.parent / cache), **fields)


def content(folder):
    (corpus,) = (folder / "corpora").iterdir()
    return {file.name: file.read_bytes() for file in corpus.iterdir() if file.name != "as_of.json"}  # times


def kills_itself(config, at, moment):
    """Prepares, and is killed by its own hand before, amid or after the part of this number, or while it joins them."""
    done = 0

    def die_at(what):
        if (what, done) == (moment, at):
            os.kill(os.getpid(), signal.SIGKILL)

    write_part, encode, join = shards.write_part, shards._encoded, shards.join

    def write(*arguments):
        nonlocal done
        die_at("before")
        written = write_part(*arguments)
        done += 1
        die_at("after")
        return written

    def encoded(*arguments):
        die_at("amid")
        return encode(*arguments)

    def joined(written, split, path):
        result = join(written, split, path)
        if moment == "join":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    shards.write_part, shards._encoded, corpus_module.join = write, encoded, joined
    prepare_corpus(config, 4)


@pytest.mark.parametrize(("moment", "at"), [("before", 0), ("amid", 3), ("after", 1), ("after", 9), ("join", 0)])
def test_a_killed_preparation_goes_on_and_is_the_same_to_the_byte(text, capsys, moment, at):
    prepare_corpus(config(text, "whole"), 4)
    victim = multiprocessing.get_context("fork").Process(target=kills_itself, args=(config(text, "killed"), at, moment))
    victim.start()
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    (work,) = (text.parent / "killed" / "corpora").glob("*.partial")
    before = {file: file.stat().st_ino for file in work.glob("*.bin")}
    parts = {"before": 0, "amid": 3, "after": at}.get(moment, len(before))
    assert len(before) == parts
    capsys.readouterr()
    redone = []
    write_part = shards.write_part
    shards.write_part = lambda part, *others: (redone.append(part), write_part(part, *others))[1]
    try:
        prepare_corpus(config(text, "killed"), 4)
    finally:
        shards.write_part = write_part
    said = capsys.readouterr().err
    assert (f"{parts} of {len(redone) + parts} parts were done before." in said) == (parts > 0)
    assert len(redone) + parts > 10
    assert content(text.parent / "killed") == content(text.parent / "whole")


def test_a_part_that_is_cut_short_is_done_again(text):
    prepare_corpus(config(text, "whole"), 4)
    victim = multiprocessing.get_context("fork").Process(target=kills_itself, args=(config(text, "cut"), 6, "after"))
    victim.start()
    victim.join(60)
    (work,) = (text.parent / "cut" / "corpora").glob("*.partial")
    os.truncate(sorted(work.glob("*.bin"))[2], 3)
    prepare_corpus(config(text, "cut"), 4)
    assert content(text.parent / "cut") == content(text.parent / "whole")


def test_nothing_of_other_text_is_gone_on_with(text):
    """A file that changes between two starts makes another corpus; what was begun long ago is removed."""
    victim = multiprocessing.get_context("fork").Process(target=kills_itself, args=(config(text, "c"), 6, "after"))
    victim.start()
    victim.join(60)
    (old,) = (text.parent / "c" / "corpora").glob("*.partial")
    (text / "0.md").write_text("other words" * 9)
    prepare_corpus(config(text, "c"), 4)
    assert old.exists()
    os.utime(old, (0, 0))
    (text / "0.md").write_text("still other words" * 9)
    corpus = prepare_corpus(config(text, "c"), 4)
    assert not old.exists()
    prepare_corpus(config(text, "fresh"), 4)
    (fresh,) = (text.parent / "fresh" / "corpora").iterdir()
    for file in fresh.iterdir():
        assert file.name == "as_of.json" or file.read_bytes() == (corpus.directory / file.name).read_bytes()


def test_parts_of_other_files_are_not_gone_on_with(text, monkeypatch):
    """A file that could not be read when a preparation was interrupted can be read when it goes on."""
    examine = documents.examine

    def unreadable(file, *others):
        if file.name == "a.jsonl":
            raise documents.Unusable("it cannot be read (Permission denied)")
        return examine(file, *others)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    bytes_alone = {"tokenizer": "byte"}
    monkeypatch.setattr(documents, "examine", unreadable)
    monkeypatch.setattr(corpus_module, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config(text, "interrupted", **bytes_alone), 4)
    monkeypatch.setattr(documents, "examine", examine)
    monkeypatch.setattr(corpus_module, "join", shards.join)
    prepare_corpus(config(text, "interrupted", **bytes_alone), 4)
    prepare_corpus(config(text, "whole", **bytes_alone), 4)
    assert content(text.parent / "interrupted") == content(text.parent / "whole")


def test_no_command_removes_what_it_goes_on_with_however_old_it_is(text, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(config(text, "c", tokenizer="byte"), 4)
    (work,) = (text.parent / "c" / "corpora").glob("*.partial")
    os.utime(work, (time.time() - 8 * 86400,) * 2)
    prepare_corpus(config(text, "c", tokenizer="byte"), 4)
    assert " parts were done before" in capsys.readouterr().err


def test_parts_that_another_process_removes_meanwhile_do_not_matter(text):
    """Of all that was abandoned, which another process looks through, too."""
    corpora = text.parent / "c" / "corpora"
    corpora.mkdir(parents=True)
    (corpora / "other-0.partial").symlink_to("gone")  # its name is found, and then it is not there
    prepare_corpus(config(text, "c", tokenizer="byte"), 4)


def test_one_process_waits_for_another_and_takes_its_result(text, capsys):
    context = multiprocessing.get_context("fork")
    begun, go_on = context.Event(), context.Event()

    def first():
        write_parts = corpus_module.write_parts
        corpus_module.write_parts = lambda *a: (begun.set(), go_on.wait(30), write_parts(*a))[2]
        prepare_corpus(config(text, "shared"), 4)

    other = context.Process(target=first)
    other.start()
    assert begun.wait(30)
    print_, said = print, []

    def told(*what, **how):
        said.append(str(what[0]))
        go_on.set()
        print_(*what, **how)

    corpus_module.print = told  # type: ignore[attr-defined]
    try:
        prepare_corpus(config(text, "shared"), 4)
    finally:
        del corpus_module.print  # type: ignore[attr-defined]
        other.join(30)
    assert said[0].startswith("Waiting for another process, which prepares")
    assert other.exitcode == 0


@pytest.mark.slow  # the server of its workers imports torch
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_two_processes_write_what_one_writes(text, tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", documents.BLOCK)  # workers do not know what is patched here
    (text / "special.md").write_text("the separator is spelt <|endoftext|> " * 9)
    prepare_corpora(config(text, "one", tokenizer=tokenizer), 4, processes=1)
    prepare_corpora(config(text, "two", tokenizer=tokenizer), 4, processes=2)
    assert content(text.parent / "two") == content(text.parent / "one")
    (text / "a.jsonl").write_text('{"text": "fine"}\n' * 200 + "broken\n" + '{"text": "fine"}\n' * 200)
    with pytest.raises(ValueError, match=r"Line 201 of .*a\.jsonl is not JSON"):
        prepare_corpora(config(text, "two", tokenizer="byte"), 4, processes=2)
    assert len([*(text.parent / "two" / "corpora").iterdir()]) == 1


# ---- the command -----------------------------------------------------------------------------------------------------


def test_inspect_counts_lengths_duplicates_and_what_is_longer_than_a_sample(tmp_path):
    texts = ["a" * 9, "b" * 4, "a" * 9, "", "", "c" * 30, "b" * 4, "d\n\x1b[31md"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("b" * 4, "e")))
    corpus = prepare_corpus(DataConfig(path=str(tmp_path), cache_dir=str(tmp_path / "c"), validation_fraction=0.2), 4)
    found = overview(corpus, 9, 3)
    sizes = sorted([len(text) + 1 for text in [*texts, "b" * 4, "e"]])
    assert (found.documents, found.empty, found.tokens) == (10, 2, sum(sizes))
    assert (found.lengths[0], found.lengths[2], found.lengths[-1]) == (1, sizes[4], 31)
    assert (found.longer, found.tokens_longer) == (3, 10 + 10 + 31)
    assert (found.duplicates, found.tokens_duplicates) == (3, 10 + 5 + 5)
    assert found.leaked == 1
    assert found.samples == ("a" * 9, "", "d [31md")


def test_inspect_reads_a_long_document_in_pieces(monkeypatch):
    tokens = np.full(1 << 22, 7, np.uint16)
    tokens[[2_000_000, 4_000_001]] = 0  # two of 2,000,000 and the rest
    corpus = SimpleNamespace(train=tokens, validation=tokens[:2_000_001], tokenizer=ByteTokenizer())
    monkeypatch.setattr(overview_module, "_CHUNK", 1 << 16)
    tracemalloc.start()
    found = overview(corpus, 9, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.documents, found.duplicates, found.leaked) == (4, 2, 1)
    assert peak < 1 << 20, "a document has 4 MB"


def run(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tedlab data", *arguments])
    command.main()
    return capsys.readouterr()


def given(*overrides):
    return compose(*overrides, name="data")


@pytest.fixture
def books(tmp_path):
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": f"book {i} " * 40}) + "\n" for i in range(30)))
    return [f"data.path={tmp_path}/books.jsonl", f"data.cache_dir={tmp_path}/cache", "processes=1"]


def test_prepare_says_where_the_corpus_is_and_the_second_time_that_it_was_there(books, capsys):
    command.prepare(given(*books))
    said = capsys.readouterr().out
    assert "tokens/s" in said
    command.prepare(given(*books))
    assert "All of it was in the cache." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "each goes on in the next sample, which does not see what came before"),
        (["data.packing=best_fit"], "each is cut into pieces, which are samples of their own"),
    ],
)
def test_inspect_says_what_becomes_of_documents_longer_than_a_sample(books, capsys, overrides, said):
    command.inspect(given(*books, *overrides))
    shown = capsys.readouterr().out
    shown = " ".join(shown.split())
    assert "30 documents are longer than model.sequence_length=128: with data.packing=" in shown
    assert said in shown
    assert "book 0 book 0" in shown


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=/nowhere"], r"data\.path='/nowhere' does not exist"),
        (["++data.sources={a:{path:a,weight:0.5}}", "data.path=null"], r"must sum to 1, but 0\.5 = 0\.5"),
        (["data.module=my.Data"], r"data\.module=my\.Data has data of its own"),
        (["data.field=body"], r"has no field 'body'; its fields are 'text'"),
    ],
)
def test_what_cannot_be_prepared_is_refused_in_a_sentence(books, overrides, said):
    with pytest.raises(command.UsageError, match=said):
        command.prepare(given(*books, *overrides))


def test_another_word_is_no_command(monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"there is no command 'prepre'\. Did you mean 'prepare'\?"):
        run(["prepre"], monkeypatch, capsys)
    assert "tedlab data prepare" in run(["--help"], monkeypatch, capsys).out
    assert "tedlab data inspect" in run(["inspect", "--help"], monkeypatch, capsys).out


def in_small_parts(*arguments):
    formats.PART = 1 << 14  # of the command, which divides; its workers take what they are given
    _run_module(*arguments)


@pytest.mark.slow
def test_a_command_killed_at_random_moments_ends_with_the_same_corpus(tmp_path, monkeypatch):
    """SIGKILL for the command, whose two workers then end by themselves."""
    draw = random.Random(SEED)
    rows = (json.dumps({"text": f"{draw.random()} is a number"}) for _ in range(25_000))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    fields = {"path": f"{tmp_path}/a.jsonl", "tokenizer": "bpe", "bpe_vocab_size": 300}
    monkeypatch.setattr(formats, "PART", 1 << 14)
    prepare_corpus(DataConfig(cache_dir=f"{tmp_path}/whole", **fields), 128)
    values = {**fields, "cache_dir": f"{tmp_path}/killed"}
    arguments = ["data", "prepare", "processes=2", *(f"data.{name}={value}" for name, value in values.items())]
    environment = {**os.environ, "TEDLAB_TEST": str(tmp_path)}
    corpora, parts = tmp_path / "killed" / "corpora", [0]

    def done():
        return len([*corpora.glob("*.partial/*.bin")])

    for kill in (True, True, False):
        process = multiprocessing.get_context("forkserver").Process(
            target=in_small_parts, args=("tedlab", arguments, str(tmp_path), environment, str(tmp_path))
        )
        process.start()
        after = parts[-1] + draw.randrange(1, 25)
        while process.is_alive() and (not kill or done() < after):
            time.sleep(0.002)
        process.kill() if kill else process.join(200)
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if kill else 0), (tmp_path / "stderr").read_text()
        parts.append(done())
    assert 0 < parts[1] < parts[2], f"seed {SEED}"
    assert content(tmp_path / "killed") == content(tmp_path / "whole"), f"seed {SEED}"
    deadline = time.monotonic() + 20
    while (left := _workers_of(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def _workers_of(word):
    """Processes whose environment has a word."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TEDLAB_TEST={word}".encode() in (process / "environ").read_bytes():
                found.append(process.name)
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_run_on_a_mixture_killed_anywhere_reads_the_tokens_of_an_uninterrupted_one(tmp_path):
    """Killed with two data ranks and resumed with one: all steps have the losses of one process."""
    draw = random.Random(SEED)
    for name, documents_ in (("a", 40), ("b", 70), ("c", 9)):
        lines = (
            json.dumps({"text": f"{name} " + " ".join(str(draw.random()) for _ in range(20))})
            for _ in range(documents_)
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join(lines))
    sources = "{a:{path:a,weight:0.5},b:{stream:{dataset:b,tokens:20000},weight:0.3},c:{path:c,weight:0.2,epochs:1}}"
    arguments = [
        *("train", f"data.sources={sources}", "data.batch_size=4", "data.micro_batch_size=2", "logger=csv"),
        *("data.validation_samples=4", "data.cache_dir=cache", "data.validation_fraction=0.2", "moe=dense"),
        *("model.layers=1", "model.hidden=16", "model.heads=2", "model.ffn=16", "model.sequence_length=32"),
        *("trainer.max_steps=30", "trainer.log_every_n_steps=1", "trainer.precision=64-true", "checkpoint.every=3"),
        *("resume=auto", "comm=none"),
    ]

    def start(folder, layout, kill_at=None):
        words = [*arguments, f"hydra.run.dir={folder}", f"parallel={layout}"]
        process = multiprocessing.get_context("forkserver").Process(
            target=_in_a_session, args=("tedlab", words, str(tmp_path), dict(os.environ), str(tmp_path))
        )
        process.start()
        metrics = tmp_path / folder / "metrics.csv"
        while process.is_alive() and (kill_at is None or len(_losses(metrics)) < kill_at):
            time.sleep(0.05)
        if kill_at is not None:
            os.killpg(process.pid, signal.SIGKILL)  # its workers would train on until they notice
        process.join(120)
        assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL), (tmp_path / "stderr").read_text()

    start("whole", "single")
    start("killed", "dp2", draw.randrange(4, 22))
    start("killed", "single")
    whole, killed = (_losses(tmp_path / name / "metrics.csv") for name in ("whole", "killed"))
    assert len(whole) == 30
    np.testing.assert_allclose([killed[step] for step in whole], [*whole.values()], rtol=1e-9, err_msg=f"seed {SEED}")


def _in_a_session(*arguments):
    os.setsid()
    _run_module(*arguments)


def _losses(path):
    """The training losses by step; of a step that was done again, the last."""
    if not path.is_file():
        return {}
    with path.open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")}


def test_ctrl_c_ends_a_sweep_with_a_line(books, monkeypatch, capsys):
    """It is no exit with a message, of which a sweep would go on with the next job."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_module, "prepare_corpora", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.prepare(given(*books))
    assert capsys.readouterr().err == "Interrupted. The same command goes on where this one ended.\n"
