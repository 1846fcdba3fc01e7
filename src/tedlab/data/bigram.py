"""The bigram baseline: a transformer has learnt more than adjacent pairs only if its loss is lower than this."""

import numpy as np

from tedlab.data.corpus import Corpus

_CHUNK = 1 << 22  # tokens per pass of the counting loop


def bigram_loss(corpus: Corpus, sequence_length: int, validation_samples: int) -> float:
    """Fits a bigram model to the training tokens and computes its cross-entropy on validation samples.

    p(b | a) = (count(a, b) + p(b)) / (count(a) + 1) with p(b) = (count(b) + 1) / (N + V), for N training tokens and a
    vocabulary of V. count(a) counts a as the first of a pair, so that p(· | a) sums to one.

    Args:
        corpus: Its training split is counted and its validation split is predicted.
        sequence_length: Number of inputs in a sample.
        validation_samples: The model predicts all (input, target) pairs of this many samples, from the first on.

    Returns:
        The loss in nats per token.

    Raises:
        ValueError: If the validation split holds fewer samples.
    """
    tokens = validation_samples * sequence_length + 1
    if not sequence_length < tokens <= len(corpus.validation):
        raise ValueError(
            f"{validation_samples} validation samples of sequence_length={sequence_length} need {tokens} tokens; the "
            f"validation split has {len(corpus.validation)}, enough for at most "
            f"{(len(corpus.validation) - 1) // sequence_length} samples."
        )
    vocabulary = corpus.tokenizer.vocab_size
    predicted, occurrences = np.unique(_pairs(corpus.validation[:tokens], vocabulary), return_counts=True)

    single = np.zeros(vocabulary, dtype=np.int64)  # count(b)
    paired = np.zeros(len(predicted), dtype=np.int64)  # count(a, b), only of the pairs to predict
    for start in range(0, len(corpus.train), _CHUNK):
        chunk = corpus.train[start : start + _CHUNK + 1]  # one token more completes the last pair
        single += np.bincount(chunk[:_CHUNK], minlength=vocabulary)
        pairs = _pairs(chunk, vocabulary)
        position = np.minimum(np.searchsorted(predicted, pairs), len(predicted) - 1)
        paired += np.bincount(position[predicted[position] == pairs], minlength=len(predicted))

    leading = single.copy()  # count(a)
    leading[corpus.train[-1]] -= 1  # the last token begins no pair
    a, b = np.divmod(predicted, vocabulary)
    prior = (single[b] + 1) / (len(corpus.train) + vocabulary)
    probability = (paired + prior) / (leading[a] + 1)
    return float(-(occurrences @ np.log(probability)) / occurrences.sum())


def _pairs(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """Encodes each adjacent pair (a, b) as a · vocabulary + b: int64, shape (tokens - 1,)."""
    wide = tokens.astype(np.int64)
    return wide[:-1] * vocabulary + wide[1:]
