"""Tensor-parallel building blocks. With a tensor degree of 1 they are the ordinary layers."""

from tedlab.nn.activation import activate
from tedlab.nn.attention import SelfAttention
from tedlab.nn.embedding import Embedding, VocabParallelEmbedding
from tedlab.nn.feed_forward import FeedForward
from tedlab.nn.linear import ColumnParallelLinear, RowParallelLinear
from tedlab.nn.loss import IGNORE_INDEX, linear_cross_entropy, mean_over_counted, vocab_parallel_cross_entropy
from tedlab.nn.norm import LayerNorm, RMSNorm, norm_layer
from tedlab.nn.rotary import rotation
from tedlab.nn.sharded import Init, ShardedModule, initialize, localised, partial_parameters

__all__ = [
    "IGNORE_INDEX",
    "ColumnParallelLinear",
    "Embedding",
    "FeedForward",
    "Init",
    "LayerNorm",
    "RMSNorm",
    "RowParallelLinear",
    "SelfAttention",
    "ShardedModule",
    "VocabParallelEmbedding",
    "activate",
    "initialize",
    "linear_cross_entropy",
    "localised",
    "mean_over_counted",
    "norm_layer",
    "partial_parameters",
    "rotation",
    "vocab_parallel_cross_entropy",
]
