import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tedlab.data import bigram
from tedlab.data.bigram import bigram_loss
from tedlab.data.corpus import Corpus


def _corpus(vocab_size, train, validation):
    dtype = np.min_scalar_type(vocab_size - 1)
    arrays = (np.asarray(train, dtype=dtype), np.asarray(validation, dtype=dtype))
    return Corpus(*arrays, SimpleNamespace(vocab_size=vocab_size), 1.0, Path())


def _random(vocab_size, train=3000, validation=400):
    random = np.random.default_rng(vocab_size)
    used = min(vocab_size, 40)  # leaves pairs and ids that occur in only one of the splits
    return _corpus(
        vocab_size,
        vocab_size - 1 - random.integers(used, size=train) ** 2 % used,
        vocab_size - 1 - random.integers(used, size=validation),
    )


def _brute_force(corpus, sequence_length, samples):
    train, validation = corpus.train.tolist(), corpus.validation.tolist()
    single, leading, pairs = Counter(train), Counter(train[:-1]), Counter(pairwise(train))

    def nats(a, b):
        prior = (single[b] + 1) / (len(train) + corpus.tokenizer.vocab_size)
        return -math.log((pairs[a, b] + prior) / (leading[a] + 1))

    windows = [validation[i * sequence_length :][: sequence_length + 1] for i in range(samples)]
    losses = [nats(a, b) for window in windows for a, b in pairwise(window)]
    assert len(losses) == samples * sequence_length
    return sum(losses) / len(losses)


@pytest.mark.parametrize("vocab_size", [2, 30, 256, 5000, 100_000])
@pytest.mark.parametrize("samples", [1, 20])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_it_equals_counting_with_dictionaries(vocab_size, samples, chunk, monkeypatch):
    monkeypatch.setattr(bigram, "_CHUNK", chunk)
    corpus = _random(vocab_size, train=300 if chunk == 1 else 3000)
    assert bigram_loss(corpus, 16, samples) == pytest.approx(_brute_force(corpus, 16, samples), rel=1e-12)


def test_probabilities_of_the_next_token_sum_to_one():
    train = [0, 1, 2, 1, 1, 0, 3]
    for a in range(4):
        losses = [bigram_loss(_corpus(4, train, [a, b]), 1, 1) for b in range(4)]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1)


@pytest.mark.parametrize("samples", [0, 26])
def test_a_number_of_samples_that_there_is_not_is_refused(samples):
    with pytest.raises(ValueError, match=rf"{samples} validation samples .* has 400, enough for at most 24 samples"):
        bigram_loss(_random(256), 16, samples)
