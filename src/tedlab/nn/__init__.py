"""Tensor-parallel building blocks, which are the ordinary layers when the tensor degree is 1."""

from tedlab.nn.activation import Nonlinearity, activate
from tedlab.nn.attend import attention_path
from tedlab.nn.attention import HEADS, SelfAttention, SelfAttentionSpec, with_heads
from tedlab.nn.documents import Reading, SampleDocuments, documents_of, rows_of
from tedlab.nn.embedding import Embedding, EmbeddingSpec, VocabParallelEmbedding, VocabParallelEmbeddingSpec
from tedlab.nn.feed_forward import FeedForward, FeedForwardSpec
from tedlab.nn.latent import LatentAttention, LatentAttentionSpec
from tedlab.nn.linear import (
    ColumnParallelLinear,
    ColumnParallelSpec,
    ReplicatedLinear,
    ReplicatedSpec,
    RowParallelLinear,
    RowParallelSpec,
)
from tedlab.nn.loss import (
    IGNORE_INDEX,
    CrossEntropySpec,
    linear_cross_entropy,
    mean_over_counted,
    vocab_parallel_argmax,
    vocab_parallel_cross_entropy,
)
from tedlab.nn.norm import LayerNorm, NormSpec, RMSNorm, norm_layer
from tedlab.nn.past import Past, Remembers, rememberers, remembering
from tedlab.nn.rotary import rotation
from tedlab.nn.sharded import (
    ShardedModule,
    decay_groups,
    fused_parameters,
    initialize,
    localised,
    locals_of,
    partial_parameters,
    replicated,
)
from tedlab.spec import Init

__all__ = [
    "HEADS",
    "IGNORE_INDEX",
    "ColumnParallelLinear",
    "ColumnParallelSpec",
    "CrossEntropySpec",
    "Embedding",
    "EmbeddingSpec",
    "FeedForward",
    "FeedForwardSpec",
    "Init",
    "LatentAttention",
    "LatentAttentionSpec",
    "LayerNorm",
    "Nonlinearity",
    "NormSpec",
    "Past",
    "RMSNorm",
    "Reading",
    "Remembers",
    "ReplicatedLinear",
    "ReplicatedSpec",
    "RowParallelLinear",
    "RowParallelSpec",
    "SampleDocuments",
    "SelfAttention",
    "SelfAttentionSpec",
    "ShardedModule",
    "VocabParallelEmbedding",
    "VocabParallelEmbeddingSpec",
    "activate",
    "attention_path",
    "decay_groups",
    "documents_of",
    "fused_parameters",
    "initialize",
    "linear_cross_entropy",
    "localised",
    "locals_of",
    "mean_over_counted",
    "norm_layer",
    "partial_parameters",
    "rememberers",
    "remembering",
    "replicated",
    "rotation",
    "rows_of",
    "vocab_parallel_argmax",
    "vocab_parallel_cross_entropy",
    "with_heads",
]
