"""Tensor-parallel building blocks. With a tensor degree of 1 they are the ordinary layers."""

from tedlab.nn.attention import SelfAttention
from tedlab.nn.embedding import Embedding, VocabParallelEmbedding
from tedlab.nn.feed_forward import FeedForward
from tedlab.nn.linear import ColumnParallelLinear, RowParallelLinear
from tedlab.nn.loss import vocab_parallel_cross_entropy
from tedlab.nn.norm import LayerNorm
from tedlab.nn.sharded import Init, ShardedModule, initialize, localised, partial_parameters

__all__ = [
    "ColumnParallelLinear",
    "Embedding",
    "FeedForward",
    "Init",
    "LayerNorm",
    "RowParallelLinear",
    "SelfAttention",
    "ShardedModule",
    "VocabParallelEmbedding",
    "initialize",
    "localised",
    "partial_parameters",
    "vocab_parallel_cross_entropy",
]
