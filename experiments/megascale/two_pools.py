"""A forward pass whose rows go from a pool of attention processes to a pool of experts and back, for real.

It shows that the path of rows is right: logits are those of one process, and bytes those of the closed form. It says
nothing about speed: collectives wait, and every process builds the whole toy model, of which it uses its part. Legend:
T tokens, E experts, H hidden, R rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tedlab.comm import Collectives, Splits
from tedlab.models import GPT
from tedlab.moe.gather import merge_choices, spread_choices
from tedlab.nn.activation import activate


class TwoPools:
    """One process of either pool: the first ranks are attention processes, all others have some of the experts.

    Args:
        model: The whole model, in every process, with learned positions and experts in every block.
        comm: Collectives of a world of both pools.
        attention: The number of attention processes.

    Raises:
        ValueError: If a pool is empty, or experts cannot be divided among their processes.
    """

    def __init__(self, model: GPT, comm: Collectives, attention: int) -> None:
        world = comm.size("world")
        if not 0 < attention < world:
            raise ValueError(f"{attention} of {world} processes for attention leave a pool empty")
        self.comm, self.attention = comm, attention
        self.model: Any = model
        self.experts = world - attention
        self.each, rest = divmod(_mixture(model.blocks[0]).num_experts, self.experts)
        if rest:
            raise ValueError(f"{self.experts} processes cannot divide the experts evenly")
        self.rank = comm.rank("world")

    @torch.inference_mode()
    def logits(self, micro_batches: Sequence[Tensor]) -> list[Tensor]:
        """Returns the logits (B, S, V) of an attention process's micro-batches of ids (B, S); none of the others.

        Args:
            micro_batches: As many in every process; those of expert processes are not looked at.
        """
        here = self.rank < self.attention
        model = self.model
        assert model.positions is not None
        streams = [model.embedding(ids) + model.positions(ids.shape[1]) for ids in micro_batches] if here else []
        for block in model.blocks:
            for number in range(len(micro_batches)):  # one micro-batch could compute here while another is there
                if here:
                    x = streams[number]
                    x = x + block.attention(block.norm1(x))
                    y_TH = self._there_and_back(block, block.norm2(x))
                    streams[number] = x + y_TH.view_as(x)
                else:
                    self._serve(block)
        ends = [model.norm(x) for x in streams]
        return [model.embedding.logits(x) if model.output is None else model.output(x) for x in ends]

    def _there_and_back(self, block: Any, x: Tensor) -> Tensor:
        """Sends an attention process's rows to the experts' processes, and adds up what comes back (T, H)."""
        x_TH = x.flatten(0, 1)
        routing = block.feed_forward.router(x_TH, x.shape[1], None)
        counts_E = routing.counts_E
        nobody = (0,) * self.attention
        told = Splits((*nobody, *[self.each] * self.experts), (0,) * (self.attention + self.experts))
        self._exchange(counts_E, "dispatch.counts", told)
        sent = Splits((*nobody, *counts_E.view(self.experts, -1).sum(1).tolist()), told.received)
        rows_RH = spread_choices(x_TH, routing)
        self._exchange(rows_RH, "dispatch.all_to_all", sent)
        back_RH = self._exchange(rows_RH[:0], "combine.all_to_all", sent.reverse)
        return merge_choices(back_RH, routing)

    def _serve(self, block: Any) -> None:
        """Computes what attention processes send to this process's experts, and sends the results back."""
        up, up_bias, down, down_bias = (None if w is None else self._own(w) for w in _mixture(block).weights())
        assert up is not None
        assert down is not None
        nothing = (0,) * (self.attention + self.experts)
        heard = Splits(nothing, (*[self.each] * self.attention, *[0] * self.experts))
        empty = torch.empty(0, dtype=torch.int64)
        counts_se = self._exchange(empty, "dispatch.counts", heard).view(self.attention, self.each)
        arriving = Splits(nothing, (*counts_se.sum(1).tolist(), *[0] * self.experts))
        rows_RH = self._exchange(up.new_empty(0, up.shape[1]), "dispatch.all_to_all", arriving)
        expert_R = torch.arange(self.each).repeat(self.attention).repeat_interleave(counts_se.flatten())
        result_RH = torch.empty_like(rows_RH)
        for expert in range(self.each):
            z = rows_RH[expert_R == expert] @ up[expert] + (0 if up_bias is None else up_bias[expert])
            y = activate(z, _mixture(block).nonlinearity) @ down[expert]
            result_RH[expert_R == expert] = y + (0 if down_bias is None else down_bias[expert])
        self._exchange(result_RH, "combine.all_to_all", arriving.reverse)

    def _own(self, weight_E: Tensor) -> Tensor:
        first = (self.rank - self.attention) * self.each
        return weight_E[first : first + self.each]

    def _exchange(self, x: Tensor, tag: str, splits: Splits) -> Tensor:
        return self.comm.all_to_all(x.contiguous(), "world", tag=tag, phase="forward", splits=splits)


def _mixture(block: Any) -> Any:
    return block.feed_forward.experts


def sent_bytes(rank: int, attention: int, experts: int, choices: int, num_experts: int, row: int) -> dict[str, int]:
    """Returns the bytes that a process sends in a layer and micro-batch, by collective.

    Args:
        rank: The process.
        attention, experts: The number of processes of each pool.
        choices: The choices of an attention process's tokens, of all experts equally often.
        num_experts: The number of experts.
        row: Bytes of a row.
    """
    if rank < attention:
        return {"dispatch.counts": 8 * num_experts, "dispatch.all_to_all": choices * row, "combine.all_to_all": 0}
    return {"dispatch.counts": 0, "dispatch.all_to_all": 0, "combine.all_to_all": attention * choices // experts * row}
