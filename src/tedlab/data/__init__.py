"""The data pipeline, from text to batches.

``files``, ``formats`` and ``documents`` find and read text, with ``compressed``, ``tables`` and ``tokenised`` for what
is no plain file of it; ``tokenizers``, ``shards`` and ``corpus`` turn it into token files; ``packing``, ``sampler``,
``mixture`` and ``module`` make batches of those. ``position`` and ``resume`` continue an interrupted run,
and ``bigram`` computes a baseline loss.
"""

from tedlab.data.bigram import bigram_loss
from tedlab.data.corpus import Corpus, prepare_corpus
from tedlab.data.module import TextDataModule, data_class, data_module, keeps_position
from tedlab.data.packing import PackedSamples
from tedlab.data.sampler import MicroBatchSampler
from tedlab.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "FileTokenizer",
    "MicroBatchSampler",
    "PackedSamples",
    "TextDataModule",
    "Tokenizer",
    "bigram_loss",
    "data_class",
    "data_module",
    "keeps_position",
    "load_tokenizer",
    "prepare_corpus",
    "train_bpe",
]
