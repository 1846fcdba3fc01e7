"""The loss that pair counts reach: the bar which a transformer must clear to have learnt more than neighbours."""

import numpy as np

from tedlab.data.corpus import Corpus

_CHUNK = 1 << 22  # tokens counted at once


def bigram_loss(corpus: Corpus, sequence_length: int, validation_samples: int) -> float:
    """Cross-entropy of the bigram model of the training tokens on the validation samples, in nats per token.

    p(b | a) = (count(a, b) + p(b)) / (count(a) + 1) with p(b) = (count(b) + 1) / (N + V), for N training tokens and a
    vocabulary of V. count(a) counts a as the first of a pair, so that p(· | a) sums to one.

    Args:
        corpus: What is counted and what is predicted.
        sequence_length: Inputs of one sample.
        validation_samples: Predicted are all (input, target) pairs of this many samples, the first ones.

    Raises:
        ValueError: The validation split holds fewer samples.
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
    paired = np.zeros(len(predicted), dtype=np.int64)  # count(a, b) of the pairs to predict; no others are needed
    for start in range(0, len(corpus.train), _CHUNK):
        chunk = corpus.train[start : start + _CHUNK + 1]  # with the token that completes its last pair
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
    """Neighbours (a, b) as a · vocabulary + b: int64, shape (tokens - 1,)."""
    wide = tokens.astype(np.int64)
    return wide[:-1] * vocabulary + wide[1:]
