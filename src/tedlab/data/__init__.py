"""Text to batches: ``documents`` and ``tokenizers``, then ``corpus``, ``packing``, ``sampler`` and ``module``.

``resume`` and ``bigram`` stand beside them.
"""

from tedlab.data.bigram import bigram_loss
from tedlab.data.corpus import Corpus, prepare_corpus
from tedlab.data.module import TextDataModule
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
    "load_tokenizer",
    "prepare_corpus",
    "train_bpe",
]
