import json
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models

from tedlab.config import DataConfig
from tedlab.data.tokenizers import ByteTokenizer, FileTokenizer, build_tokenizer, load_tokenizer, train_bpe

TEXTS = ["def f(x):\n    return x + 1\n", "naïve café — 東京 🙂\n\ttabs  and   spaces\r\n", "x = '<|endoftext|>'\n"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_bpe(TEXTS * 5, 300, tmp_path_factory.mktemp("bpe") / "new" / "bpe.json")


@pytest.mark.parametrize("text", [*TEXTS, ""])
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_decoding_what_was_encoded_gives_the_text_back(kind, text, bpe):
    tokenizer = ByteTokenizer() if kind == "byte" else bpe
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.separator not in ids
    assert ids.dtype == np.min_scalar_type(tokenizer.vocab_size - 1)


def test_bytes_of_half_a_character_decode_to_a_replacement_character():
    assert ByteTokenizer().decode(ByteTokenizer().encode("é")[:1]) == "\ufffd"


def test_a_bpe_is_shorter_than_bytes_and_has_the_vocabulary_asked_for(bpe):
    assert bpe.vocab_size == 300
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0])


def test_training_twice_gives_the_same_tokenizer(bpe, tmp_path):
    assert train_bpe(TEXTS * 5, 300, tmp_path / "again.json").fingerprint == bpe.fingerprint
    assert train_bpe(TEXTS * 5, 290, tmp_path / "other.json").fingerprint != bpe.fingerprint
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.json", "other.json"]  # nothing temporary


def test_a_bpe_smaller_than_its_alphabet_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"bpe_vocab_size=256 is too small.* at least 257"):
        train_bpe(TEXTS, 256, tmp_path / "bpe.json")


def _save(path, vocabulary):
    tokenizer = HuggingFaceTokenizer(models.WordLevel({token: id for id, token in enumerate(vocabulary)}, "a"))
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    ("vocabulary", "separator"),
    [
        (["a", "</s>", "<|endoftext|>"], 2),
        (["a", "[SEP]", "</s>", "<eos>"], 3),
        (["a", "[SEP]", "</s>"], 2),
        (["[SEP]", "a"], 0),
    ],
)
def test_the_first_known_separator_of_a_file_is_used(tmp_path, vocabulary, separator):
    assert FileTokenizer(_save(tmp_path / "t.json", vocabulary)).separator == separator


def test_truncation_and_padding_of_a_file_are_switched_off(tmp_path, bpe):
    saved = HuggingFaceTokenizer.from_str(bpe._tokenizer.to_str())
    saved.enable_truncation(2)
    saved.enable_padding(length=50)
    saved.save(str(tmp_path / "t.json"))
    np.testing.assert_array_equal(FileTokenizer(tmp_path / "t.json").encode(TEXTS[0]), bpe.encode(TEXTS[0]))


def test_what_is_saved_is_the_same_tokenizer(tmp_path, bpe):
    path = tmp_path / "of others.json"
    path.write_text(json.dumps(json.loads(bpe._tokenizer.to_str()), indent=1))  # as another program lays it out
    FileTokenizer(path).save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == FileTokenizer(path).fingerprint


def test_a_vocabulary_beyond_uint16_is_encoded_in_uint32(tmp_path):
    path = _save(tmp_path / "t.json", ["a", "</s>", *(f"w{i}" for i in range(1 << 16))])
    assert FileTokenizer(path).encode("a").dtype == np.uint32


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("bytes", ValueError, r"'bytes' is not one of byte, bpe, or the path of .* Did you mean 'byte'\?"),
        ("BPE", ValueError, r"Did you mean 'bpe'\?"),
        ("wordpiece", ValueError, r"'wordpiece' is not one of byte, bpe, or the path of a tokenizers JSON file\.$"),
        ("missing.json", FileNotFoundError, "no tokenizer file missing.json"),
        ("some/folder", FileNotFoundError, "no tokenizer file some/folder"),
        ("{tmp}/broken.json", ValueError, "broken.json is not a tokenizer saved by"),
        ("{tmp}/bare.json", ValueError, r"no token to put between documents: none of <\|endoftext\|>, <eos>, </s>"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(tmp_path, name, error, message):
    (tmp_path / "broken.json").write_text("{}")
    _save(tmp_path / "bare.json", ["a"])
    with pytest.raises(error, match=message) as caught:
        build_tokenizer(DataConfig(tokenizer=name.format(tmp=tmp_path), cache_dir=str(tmp_path)), "key", lambda: TEXTS)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_bpe_is_trained_once_per_corpus_and_vocabulary(tmp_path):
    trained = []

    def texts():
        trained.append(1)
        return TEXTS

    def build(key, vocab_size):
        config = DataConfig(tokenizer="bpe", bpe_vocab_size=vocab_size, cache_dir=str(tmp_path))
        return build_tokenizer(config, key, texts).fingerprint

    assert build("one", 270) == build("one", 270)
    assert len(trained) == 1
    build("one", 280)
    build("two", 270)
    assert len(trained) == 3


def test_another_process_encodes_as_this_one_does(bpe):
    """Also what spells a special token, which a pickled tokenizer of the library would recognise."""
    other = pickle.loads(pickle.dumps(bpe))
    assert other.fingerprint == bpe.fingerprint
    for text in TEXTS:
        assert other.encode(text).tolist() == bpe.encode(text).tolist()
