"""Files that others have written give the texts or tokens that are in them; damaged ones are refused in a sentence."""

import csv
import gzip
import hashlib
import io
import json
import os
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from tedlab.config import DataConfig
from tedlab.data import compressed, documents, formats, tables, tokenised
from tedlab.data.corpus import Corpus, prepare_corpus
from tedlab.data.documents import find_files, sources
from tedlab.data.extra import MissingExtra, needed
from tedlab.data.shards import divide, join, write_parts
from tedlab.data.tokenizers import ByteTokenizer

TEXTS = [f"document {i} é🙂" for i in range(60)]
LINES = "".join(json.dumps({"text": text, "n": len(text)}) + "\n" for text in TEXTS).encode()


def prepare(path: Path, sequence_length: int = 4, **fields) -> Corpus:
    return prepare_corpus(DataConfig(path=str(path), cache_dir=str(path.parent / ".cache"), **fields), sequence_length)


def texts(corpus: Corpus) -> list[list[str]]:
    return [bytes(side.tolist()).decode().rstrip("\0").split("\0") for side in (corpus.train, corpus.validation)]


def parquet(path: Path, column: str = "text") -> None:
    pa.parquet.write_table(pa.table({"id": range(60), column: TEXTS}), path, row_group_size=7)


def arrow_stream(path: Path) -> None:
    table = pa.table({"text": pa.array(TEXTS, pa.large_string())})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=11)


def datasets_folder(path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(60))}).save_to_disk(path, num_shards=1)


def two_frames(path: Path) -> None:
    half = len(LINES) // 2
    path.write_bytes(zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]))


def separated(path: Path) -> None:
    pa.csv.write_csv(pa.table({"id": range(60), "text": TEXTS}), path, pa.csv.WriteOptions(batch_size=7))


def tabs(path: Path) -> None:
    content = io.StringIO(newline="")
    csv.writer(content, dialect="excel-tab").writerows([["text", "n"], *zip(TEXTS, range(60), strict=True)])
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf\r\n" + content.getvalue().encode()))


WRITERS = {
    "rows.csv": separated,
    "rows.tsv.gz": tabs,
    "lines.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "two members.json.gz": lambda path: path.write_bytes(gzip.compress(LINES[:500]) + gzip.compress(LINES[500:])),
    "with a mark.gz": lambda path: path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + LINES)),
    "lines.jsonl.zst": lambda path: path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(LINES)),
    "two frames.zst": two_frames,
    "rows.parquet": parquet,
    "zstd.parquet": lambda path: pa.parquet.write_table(pa.table({"text": TEXTS}), path, compression="zstd"),
    "dictionary.parquet": lambda path: pa.parquet.write_table(
        pa.table({"text": pa.array(TEXTS).dictionary_encode()}), path
    ),
    "stream.arrow": arrow_stream,
    "file.arrow": lambda path: pa.feather.write_feather(pa.table({"text": TEXTS}), path, compression="uncompressed"),
    "packed.feather": lambda path: pa.feather.write_feather(pa.table({"text": TEXTS}), path, compression="zstd"),
    "saved by datasets": datasets_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_others_have_written_gives_its_texts(tmp_path, name):
    """One file: documents are held out evenly. Beside others: it is held out whole, or not at all."""
    WRITERS[name](tmp_path / name)
    corpus = prepare(tmp_path / name, validation_fraction=0.1)
    train, validation = texts(corpus)
    assert validation == TEXTS[1::10]
    assert train == [text for text in TEXTS if text not in validation]
    assert corpus.left_out == ()
    (tmp_path / "other.txt").write_text("x" * 9)
    beside = texts(prepare(tmp_path))
    assert sorted(beside, key=len) == [["x" * 9], TEXTS]


def test_what_zstd_has_made_very_small_is_decompressed_in_pieces(tmp_path):
    content = LINES + b"\n" * (1 << 27)
    (tmp_path / "a.zst").write_bytes(zstandard.compress(content))
    with compressed.opened(tmp_path / "a.zst", "zstd") as stream:
        tracemalloc.start()
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert digest.digest() == hashlib.sha256(content).digest()
    assert peak < 96 << 20  # all of it would be 128 MiB, and that twice


def test_a_window_that_zstd_refuses_is_no_damage(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(LINES) + stream.flush())
    with pytest.raises(ValueError, match=r"a window of more than 128 MiB \(zstd --long\).*compress it again without"):
        prepare(tmp_path / "a.jsonl.zst")


def test_other_columns_and_fields_are_chosen_by_name(tmp_path):
    parquet(tmp_path / "a.parquet", "content")
    assert texts(prepare(tmp_path / "a.parquet", field="content"))[0][0] == TEXTS[0]


TABLES = {
    "no such column": (
        {"id": [1], "body": ["x"]},
        r"a table without a column data.field='text' \(its columns are 'id', 'body'\)",
    ),
    "numbers": ({"text": [1, 2]}, "a table whose column 'text' holds int64, not text"),
    "no rows": ({"text": pa.array([], pa.string())}, "a table without rows"),
    "nothing": ({"text": ["fine", None]}, r"Row 2 of .* holds a NoneType in column 'text', not text"),
    "NUL": ({"text": ["fine", "a\0b"]}, r"Row 2 of .* holds NUL in column 'text'"),
}


@pytest.mark.parametrize(("columns", "said"), TABLES.values(), ids=TABLES)
def test_a_table_that_cannot_be_used_says_why(tmp_path, columns, said):
    pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=said):
        prepare(tmp_path / "a.parquet")


@pytest.mark.parametrize("part", ["page", "footer", "end"])
def test_a_damaged_table_is_refused(tmp_path, part):
    """A page only if its writer has added a checksum to it."""
    table = pa.table({"text": TEXTS})
    pa.parquet.write_table(
        table, tmp_path / "a.parquet", write_page_checksum=True, use_dictionary=False, compression="none"
    )
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    if part == "end":
        content = content[:-9]
    else:
        place = {
            "page": content.index(b"document 7"),
            "footer": len(content) - 8 - int.from_bytes(content[-8:-4], "little"),
        }[part]
        content[place : place + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet .*damaged"):
        prepare(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow", "dictionary.arrow"])
def test_an_arrow_table_whose_texts_would_lie_beyond_it_is_refused(tmp_path, name):
    """It is mapped: unchecked, an offset that is 4,000 too large is other memory, and one near 2³¹ a crash."""
    if name == "dictionary.arrow":
        column = pa.array(["a", "b", "a"]).dictionary_encode()
        pa.feather.write_feather(pa.table({"text": column}), tmp_path / name, compression="uncompressed")
        good, bad = np.array([0, 1, 0], "<i4"), np.array([0, 4000, 0], "<i4")
    else:
        WRITERS[name](tmp_path / name)
        kind, rows = ("<i8", 11) if name == "stream.arrow" else ("<i4", 60)
        good = np.cumsum([0, *(len(text.encode()) for text in TEXTS[:rows])]).astype(kind)
        wrong = np.arange(len(good)) > rows - 3 if name == "stream.arrow" else np.arange(len(good)) == 7
        bad = good + np.where(wrong, 4000, 0).astype(kind)  # the last of them, or one in the middle
    content = (tmp_path / name).read_bytes()
    assert content.count(good.tobytes()) == 1
    (tmp_path / name).write_bytes(content.replace(good.tobytes(), bad.tobytes()))
    with pytest.raises(ValueError, match=rf"{name} .*damaged table"):
        prepare(tmp_path / name)


@pytest.mark.parametrize("package", ["pyarrow", "zstandard"])
def test_without_the_extra_a_sentence_says_what_to_install(tmp_path, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingExtra, match=rf"it needs {package}: pip install 'tedlab\[data\]'"):
        needed(package, "it")
    name = {"pyarrow": "rows.parquet", "zstandard": "lines.jsonl.zst"}[package]
    monkeypatch.undo()
    WRITERS[name](tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=rf"it cannot be read: .* needs {package}: pip install 'tedlab\[data\]'"):
        prepare(tmp_path / name)


def test_with_the_extra_installed_later_the_corpus_is_made_anew(tmp_path, monkeypatch):
    """Also if its making was interrupted without it: parts are known by number, and the files in them are others."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("b.txt", "c.txt"):
        (folder / name).write_text(name * 40)
    two_frames(folder / "a.zst")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    without = prepare(folder)
    assert [file.name for file in without.left_out] == ["a.zst"]
    monkeypatch.undo()
    whole = prepare(folder)
    assert whole.left_out == ()
    assert len(whole.train) + len(whole.validation) > len(without.train) + len(without.validation) + 500


# ---- tokens ----------------------------------------------------------------------------------------------------------

CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "u2": 8}


def megatron(path: Path, sequences: list[list[int]], documents: list[int], dtype: str = "u2", **header) -> None:
    """A pair as Megatron-Core documents it: written here by hand, so that it is not our reader's mirror."""
    fields = {"magic": b"MMIDIDX\0\0", "version": 1, "code": CODES[dtype], **header}
    content = fields["magic"] + struct.pack("<Q", fields["version"]) + struct.pack("<B", fields["code"])
    content += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(documents))
    size, pointer = int(dtype[1]), 0
    content += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    for sequence in sequences:
        content += struct.pack("<q", pointer)
        pointer += len(sequence) * size
    content += b"".join(struct.pack("<q", place) for place in documents)
    path.with_suffix(".idx").write_bytes(content)
    letter = {"u1": "B", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u2": "H"}[dtype]
    path.write_bytes(b"".join(struct.pack(f"<{letter}", token) for sequence in sequences for token in sequence))


ENDED = [[*range(1 + i, 9 + i), 0] for i in range(20)]  # documents that end with the byte tokenizer's separator
FLAT = [token for document in ENDED for token in document]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("named", [".bin", ".idx", ""])
def test_megatrons_pairs_are_mapped_where_they_lie(tmp_path, dtype, named):
    megatron(tmp_path / "a.bin", ENDED, [*range(21)], dtype)
    corpus = prepare(tmp_path / f"a{named}", validation_fraction=0.1)
    assert np.concatenate([corpus.train, corpus.validation]).tolist() == FLAT
    assert len(corpus.validation) == 2 * 9  # cut between documents
    assert Path(corpus.train.base.filename if isinstance(corpus.train.base, np.memmap) else corpus.train.filename) == (
        tmp_path / "a.bin"
    )
    assert not list((tmp_path / ".cache").rglob("train.bin"))
    assert corpus.bytes_per_token == 8 / 9
    assert corpus.digest == tokenised.digest_of(np.array(FLAT[: len(corpus.train)], dtype=corpus.train.dtype))
    assert corpus.source_files == 1


def test_sequences_of_one_document_have_no_separator_between_them(tmp_path):
    megatron(tmp_path / "a.bin", [[1, 2], [3], [4, 5], [6, 7]], [0, 2, 3, 4])
    file = tokenised.open_tokens(tmp_path / "a.bin")
    assert file.ends.tolist() == [3, 5, 7]


def test_separators_that_are_missing_are_added_in_a_copy(tmp_path, capsys):
    megatron(tmp_path / "a.bin", [[1, 2, 3, 0], [4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 0]], [*range(5)])
    corpus = prepare(tmp_path / "a.bin", validation_fraction=0.3)
    assert corpus.train.tolist() == [1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9, 0]
    assert corpus.validation.tolist() == [10, 11, 12, 13, 0]
    assert "2 of 4 documents do not end with the separator (0)" in capsys.readouterr().err


def test_several_files_of_tokens_are_joined(tmp_path):
    (tmp_path / "text").mkdir()
    megatron(tmp_path / "text" / "a.bin", ENDED, [*range(21)])
    np.save(tmp_path / "text" / "b.npy", np.array([50, 51, 52, 0, 53, 54], dtype=np.uint16))
    corpus = prepare(tmp_path / "text")
    assert sorted([corpus.train.tolist(), corpus.validation.tolist()], key=len) == [
        [50, 51, 52, 0, 53, 54, 0],
        FLAT,
    ]
    assert corpus.left_out == ()
    assert corpus.source_files == 2


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<u4", "i8"])
def test_numpys_arrays_are_mapped_and_cut_after_a_separator(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.array(FLAT, dtype=dtype))
    corpus = prepare(tmp_path / "a.npy", validation_fraction=0.12)
    assert np.concatenate([corpus.train, corpus.validation]).tolist() == FLAT
    assert corpus.train[-1] == 0
    assert len(corpus.validation) == 2 * 9


def test_ids_that_the_tokenizer_does_not_know_are_an_error_that_names_the_first(tmp_path):
    tokens = np.array([1, 2, 3, 0] * 9 + [700, 4, 900, 0], dtype=np.uint16)
    np.save(tmp_path / "a.npy", tokens)
    with pytest.raises(ValueError, match=r"Token 36 of .*a\.npy is 700, but the ids of data\.tokenizer are 0 to 255"):
        prepare(tmp_path / "a.npy")
    megatron(tmp_path / "b.bin", [[1, 2, -7, 0], [3, 4, 5, 0]], [0, 1, 2], "i4")
    with pytest.raises(ValueError, match=r"Token 2 of .*b\.bin is -7, but"):
        prepare(tmp_path / "b.bin")


def test_ids_are_checked_in_every_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenised, "_CHUNK", 8)
    with pytest.raises(ValueError, match="Token 119 of x is 256"):
        tokenised.refuse_unknown(np.array([1] * 19 + [256]), 256, Path("x"), before=100)
    tokenised.refuse_unknown(np.arange(256), 256, Path("x"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def _changed(place: int, value: int):
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place : place + 4] = struct.pack("<i", value)
        path.write_bytes(content)

    return change


DAMAGE = {
    "not Megatron's": (".idx", lambda p: p.write_bytes(b"x" * 50), r"its index begins with b'xxxxxxxxx' in place of"),
    "too short": (
        ".idx",
        lambda p: p.write_bytes(b"MMIDIDX\0\0"),
        "its index has 9 bytes, fewer than the 34 of a header",
    ),
    "empty": (".idx", lambda p: p.write_bytes(b""), "its index has 0 bytes"),
    "index cut": (".idx", _cut, r"its index has 439 bytes, but 20 sequences and 21 boundaries .* take 442: it is cut"),
    "index longer": (".idx", _longer, "its index has 446 bytes"),
    "a length": (
        ".idx",
        _changed(34, 8),
        "its index says of sequence 1 that it begins where the one before does not end",
    ),
    "a negative length": (".idx", _changed(34, -1), "its index says of sequence 0"),
    "boundaries": (".idx", _changed(34 + 240 + 8, 99), "divides 20 sequences into documents that are not one after"),
    "sequences": (".idx", _changed(18, 2**31 - 1), "sequences and 21 boundaries of documents take"),
    "tokens cut": (".bin", _cut, "it has 357 bytes, but its index says 180 tokens of 2 bytes, so 360"),
    "tokens longer": (".bin", _longer, "it has 364 bytes, but its index says 180"),
}


@pytest.mark.parametrize(("which", "damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_pair_is_refused_in_a_sentence(tmp_path, which, damage, said):
    megatron(tmp_path / "a.bin", ENDED, [*range(21)])
    damage(tmp_path / f"a{which}")
    with pytest.raises(ValueError, match=said):
        prepare(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"version": 2}, "its index is of version 2; version 1 can be read"),
        ({"code": 6}, r"its index says floating-point numbers \(code 6\); codes of whole numbers are 1, 2, 3, 4, 5, 8"),
        ({"code": 77}, r"its index says a dtype that is unknown \(code 77\)"),
        ({"code": 4}, "it begins where the one before does not end"),
    ],
)
def test_an_index_of_something_else_is_refused(tmp_path, header, said):
    megatron(tmp_path / "a.bin", ENDED, [*range(21)], **header)
    with pytest.raises(ValueError, match=said):
        prepare(tmp_path / "a.bin")


def test_tokens_of_one_document_cannot_be_divided(tmp_path):
    megatron(tmp_path / "a.bin", [[1, 2, 3, 0]], [0, 1])
    with pytest.raises(ValueError, match="one document alone cannot be divided"):
        prepare(tmp_path / "a.bin")


def test_a_tokenizer_is_not_trained_on_tokens(tmp_path):
    np.save(tmp_path / "a.npy", np.array(FLAT, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"bpe is trained on text, but .*a\.npy holds tokens"):
        prepare(tmp_path / "a.npy", tokenizer="bpe", bpe_vocab_size=300)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_prepared_folder_may_be_moved_and_used_as_a_source(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    before = prepare(tmp_path / "one.txt", tokenizer=tokenizer, bpe_vocab_size=300)
    moved = before.directory.rename(tmp_path / "moved")
    own = "byte" if tokenizer == "byte" else str(moved / "tokenizer.json")
    corpus = prepare(moved, tokenizer=own)
    assert corpus.directory == moved
    for split in ("train", "validation"):
        np.testing.assert_array_equal(getattr(corpus, split), np.fromfile(moved / f"{split}.bin", corpus.train.dtype))
    other = str(moved / "tokenizer.json") if tokenizer == "byte" else "byte"
    if tokenizer == "bpe":
        with pytest.raises(
            ValueError, match=r"moved cannot be used: its tokens are of the tokenizer .*tokenizer\.json is"
        ):
            prepare(moved, tokenizer=other)
    with pytest.raises(ValueError, match=r"holds tokens; use data\.tokenizer="):
        prepare(moved, tokenizer="bpe", bpe_vocab_size=290)
    whole = (moved / "train.bin").read_bytes()
    os.utime(moved / "train.bin", (1, 1))  # as in a copy: what it holds is what counts
    assert prepare(moved, tokenizer=own).digest == corpus.digest
    (moved / "train.bin").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"moved cannot be used: train\.bin has changed since its ids were checked"):
        prepare(moved, tokenizer=own)
    (moved / "train.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"moved cannot be used: train\.bin has 0 bytes in place of"):
        prepare(moved, tokenizer=own)


def test_a_folder_that_maps_a_file_refuses_it_when_it_has_changed(tmp_path):
    """Its ids were checked when the folder was made, and only then."""
    for name, write in (("a.npy", lambda tokens: np.save(tmp_path / "a.npy", tokens)), ("b.bin", _pair(tmp_path))):
        write(np.array(FLAT, dtype=np.uint16))
        os.utime(tmp_path / name, (1, 1))
        folder = prepare(tmp_path / name).directory
        assert prepare(folder).train[0] == FLAT[0]
        write(np.array(FLAT, dtype=np.uint16) + 700)
        with pytest.raises(ValueError, match=rf"cannot be used: .*{name[:2]}\S+ has changed since its ids"):
            prepare(folder)


def _pair(folder: Path):
    return lambda tokens: megatron(folder / "b.bin", tokens.reshape(20, 9).tolist(), [*range(21)])


def test_a_folder_of_text_may_have_a_file_of_that_name(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(name * 9)
    (folder / "meta.json").write_text('{"licence": "CC0",\n"of": 2}')
    corpus = prepare(folder)
    assert sorted([*texts(corpus)[0], *texts(corpus)[1]]) == ["a.txt" * 9, "b.txt" * 9]
    assert [file.name for file in corpus.left_out] == ["meta.json"]


@pytest.mark.parametrize("other", ["unusable", "copy"])
@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
def test_tokens_beside_what_is_left_out_are_a_single_file(tmp_path, name, other):
    folder = tmp_path / "text"
    folder.mkdir()
    megatron(folder / "a.bin", ENDED, [*range(21)])
    if name == "a.npy":
        (folder / "a.bin").unlink(), (folder / "a.idx").unlink()
        np.save(folder / name, np.array(FLAT, dtype=np.uint16))
    beside = folder / ("z.txt" if other == "unusable" else f"z{Path(name).suffix}")
    beside.write_bytes(b"\0" if other == "unusable" else (folder / name).read_bytes())
    if beside.suffix == ".bin":
        beside.with_suffix(".idx").write_bytes((folder / "a.idx").read_bytes())
    corpus = prepare(folder, validation_fraction=0.12)
    assert np.concatenate([corpus.train, corpus.validation]).tolist() == FLAT
    assert corpus.train[-1] == 0
    assert [file.name for file in corpus.left_out] == [beside.name]
    assert corpus.source_files == 1
    assert not list((tmp_path / ".cache").rglob("train.bin")), "it is mapped"


def _header(text: str) -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()


def _npz(path: Path) -> bytes:
    np.savez(path.with_suffix(".npz"), np.arange(9))
    return path.with_suffix(".npz").read_bytes()


ARRAYS = {
    "npz": (_npz, r"it is no NumPy array: it begins with b'PK"),
    "pickle": (lambda _: b"\x80\x04K\x01.", "it is no NumPy array: it begins with"),
    "header cut": (lambda _: _header("{'descr': '<u2', 'fortran_order': False, 'sha")[:40], "that can be mapped"),
    "header broken": (lambda _: _header("{'descr': '<u2', 'fortran_order': False, 'sha\n"), "that can be mapped"),
    "many": (
        lambda _: _header("{'descr': '<u2', 'fortran_order': False, 'shape': (10000000000000000000000000,)}\n"),
        "",
    ),
    "negative": (lambda _: _header("{'descr': '<u2', 'fortran_order': False, 'shape': (-9,)}\n") + b"x" * 9, ""),
    "true": (lambda _: _header("{'descr': '<u2', 'fortran_order': False, 'shape': (True,)}\n") + b"x" * 9, ""),
    "long": (lambda _: _header(" " * 60_000 + "\n"), "that can be mapped"),
    "deep": (lambda _: _header("(" * 9000 + "\n"), "that can be mapped"),
    "no tokens": (lambda _: _header("{'descr': '<u2', 'fortran_order': False, 'shape': (0,)}\n"), "it holds no tokens"),
}


@pytest.mark.parametrize(("content", "said"), ARRAYS.values(), ids=ARRAYS)
def test_a_damaged_array_is_refused_in_a_sentence(tmp_path, content, said):
    (tmp_path / "a.npy").write_bytes(content(tmp_path / "a"))
    with pytest.raises(ValueError, match=rf"a\.npy cannot be used: .*{said}") as caught:
        prepare(tmp_path / "a.npy")
    assert "\n" not in f"{caught.value}"
    assert len(f"{caught.value}") < 600


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.zst"])
def test_fields_that_are_quoted_are_what_was_written(tmp_path, name):
    """By Python's writer and by Arrow's; parts end where rows end, not where lines do."""
    fields = ["a,b", 'said "yes"', "two\nlines", "\r\nand\r\n", "tab\t", "é🙂", '"', "  spaces  ", "x" * 50, "#"] * 6
    rows = pa.table({"n": range(60), "other": fields[::-1], "text": fields})
    if name == "a.tsv":
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows(
                [rows.column_names, *zip(*rows.to_pydict().values(), strict=True)]
            )
    else:
        written = pa.BufferOutputStream()
        pa.csv.write_csv(rows, written)
        content = written.getvalue().to_pybytes()
        (tmp_path / name).write_bytes(content if name == "a.csv" else zstandard.compress(content))
    (source,) = sources(find_files(str(tmp_path / name)), "text")
    assert ["".join(document) for document in source.documents(lambda size: None)] == fields
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(formats, "PART", 100)
        parts = [*source.parts()]
    assert len(parts) > (10 if name != "a.csv.zst" else 0)
    in_parts = ["".join(document) for part in parts for document in part.documents(lambda size: None)]
    assert in_parts == fields
    assert sum(part.size for part in parts) <= (tmp_path / name).stat().st_size
    if name == "a.csv":  # rows of several lines have their lines counted, in whatever part they are
        (tmp_path / name).write_bytes(content + b"1,2,3,4\n")
        (source,) = sources(find_files(str(tmp_path / name)), "text")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(formats, "PART", 100)
            *_, last = source.parts()
        with pytest.raises(ValueError, match=rf"row in line {content.count(10) + 1} of .* has 4 fields"):
            [*last.documents(lambda size: None)]


# ---- parts -----------------------------------------------------------------------------------------------------------


PARTED = ["lines.jsonl", "rows.csv", "rows.parquet", "stream.arrow", "text.txt", "long line.txt", "a.npy"]


@pytest.mark.parametrize("name", PARTED)
def test_parts_one_after_another_are_the_source(tmp_path, monkeypatch, name):
    """The same tokens, whatever a part is: its blocks are those of the source, to the byte."""
    if name in WRITERS:
        WRITERS[name](tmp_path / name)
    elif name == "a.npy":
        np.save(tmp_path / name, np.array(FLAT, dtype=np.uint16))
    else:
        content = {
            "lines.jsonl": b"\n" + LINES,
            "text.txt": "\n".join(TEXTS).encode(),
            "long line.txt": b"x\xc3\xa9" * 700,
        }
        (tmp_path / name).write_bytes(content[name])
    monkeypatch.setattr(documents, "_BLOCK", 64)
    monkeypatch.setattr(tables, "_ROWS", 5)
    (source,) = sources(find_files(str(tmp_path)), "text")
    blocks = [list(document) for document in source.documents(lambda size: None)]
    written = []
    for size in (10**9, 200, 1):
        monkeypatch.setattr(formats, "PART", size)
        parts = divide("train", [source])
        folder = tmp_path / f"{size}"
        folder.mkdir()
        join(write_parts(parts, ByteTokenizer(), folder, 1, lambda size: None), "train", folder / "all")
        written.append((folder / "all").read_bytes())
        joined = [
            block for part in parts for of in part.sources for d in of.documents(lambda size: None) for block in d
        ]
        assert [*map(str, joined)] == [str(block) for document in blocks for block in document]
    assert written[0] == written[1] == written[2] != b""
    if name not in ("long line.txt", "a.npy"):
        assert len(parts) > 5
    if name not in ("long line.txt", "a.npy", "text.txt"):
        rest = replace(source, held_out=0.1, validation=True)  # documents keep their numbers, too
        held_out = [*rest.documents(lambda size: None)]
        in_parts = [
            d for part in divide("train", [rest]) for of in part.sources for d in of.documents(lambda size: None)
        ]
        assert in_parts == held_out
    wrong = json.dumps({"body": 1}).encode()
    if name == "lines.jsonl":  # lines keep their numbers in whatever part they are
        (tmp_path / name).write_bytes(b"\n" + LINES + wrong)
        (source,) = sources(find_files(str(tmp_path / name)), "text")
        with pytest.raises(ValueError, match=r"Line 62 of .* has no field 'text'"):
            write_parts(divide("train", [source]), ByteTokenizer(), folder, 1, lambda size: None)
