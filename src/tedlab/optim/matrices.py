"""Makes the matrices of a sharded optimizer whole for a moment, each in one process.

State and directions are divided flat, as those of any optimizer are. Two exchanges bring each matrix to its owner: one
in the group that divides the state, in which the owner's tensor group gets their parts of it, and one in the tensor
group. Two more bring back what it has become. What travels is a shard of the directions and one of the updates, which
is little beside the gradients and the parameters themselves.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from tedlab.comm import Collectives, GroupKind, Splits
from tedlab.optim.blocks import INNER, Block, Owner, blocks_of, overlap, owners
from tedlab.optim.bucket import Bucket, local
from tedlab.optim.kinds import MatrixOptimizer
from tedlab.spec import Fused


class _Place(NamedTuple):
    """A block in its bucket: from which element of it on, and who makes it whole."""

    bucket: Bucket
    parameter: nn.Parameter
    start: int
    block: Block
    owner: Owner

    def of_shard(self, shard: int) -> slice:
        """Which of the block's elements a shard holds."""
        return overlap(self.start, self.block.elements, shard, self.bucket.shard_size)

    def in_own_shard(self, shard: int) -> slice:
        """Where in a shard they are."""
        held, before = self.of_shard(shard), self.start - shard * self.bucket.shard_size
        return slice(held.start + before, held.stop + before)

    def length(self, shard: int) -> int:
        """How many there are."""
        held = self.of_shard(shard)
        return held.stop - held.start


class Matrices:
    """The matrices in an optimizer's buckets.

    Args:
        optimizer: The optimizer that needs them whole.
        comm: The collectives of this process.
        fused: How several matrices are fused in parameters.
        names: Name of each parameter, for messages.
    """

    def __init__(
        self,
        optimizer: MatrixOptimizer,
        comm: Collectives,
        fused: Mapping[nn.Parameter, Fused],
        names: Mapping[nn.Parameter, str],
    ) -> None:
        self.optimizer, self.comm = optimizer, comm
        self._fused, self._names = fused, names
        self._places: dict[GroupKind, list[_Place]] = {}

    def lay_out(self, buckets: Sequence[Bucket]) -> None:
        """Divides the work of all these buckets' matrices over processes.

        Raises:
            ValueError: If a parameter consists of no matrices.
        """
        for kind in INNER:
            found: list[tuple[Bucket, nn.Parameter, int, Block]] = []
            of_kind = [bucket for bucket in buckets if bucket.kind == kind]
            for bucket in of_kind:
                start = 0
                for p in bucket.parameters:
                    for block in self._blocks(p):
                        found.append((bucket, p, start, block))
                        start += block.elements
            across = max((bucket.shards for bucket in of_kind), default=1)
            its = owners([block for *_, block in found], across, self.comm.size(INNER[kind]))
            self._places[kind] = [_Place(*one, owner) for one, owner in zip(found, its, strict=True)]

    def _blocks(self, parameter: nn.Parameter) -> list[Block]:
        divided = None
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            for axis, placement in zip(mesh.mesh_dim_names or (), parameter.placements, strict=True):
                if isinstance(placement, Shard) and axis in INNER.values():
                    divided = placement.dim
                elif isinstance(placement, Shard) and not (parameter.dim() == 3 and placement.dim == 0):
                    raise ValueError(
                        f"{self._names[parameter]} is divided along '{axis}', so no tensor group has the whole of its "
                        "matrices; divide it along tensor or expert_tensor only, or let AdamW step it"
                    )
        return blocks_of(local(parameter).shape, divided, self._fused.get(parameter))

    def orthogonalise(
        self, directions: Mapping[Bucket, Tensor], group_of: Mapping[nn.Parameter, Mapping[str, Any]]
    ) -> None:
        """Turns directions into the updates that they become, in place. Collective.

        Args:
            directions: Of each bucket that is stepped, laid out like its shard.
            group_of: The group of each parameter that is stepped; the others' directions stay.
        """
        for kind, places in self._places.items():
            stepped = [place for place in places if place.bucket in directions and place.parameter in group_of]
            if stepped:
                self._exchange(kind, stepped, directions, group_of)

    def _exchange(
        self,
        kind: GroupKind,
        places: Sequence[_Place],
        directions: Mapping[Bucket, Tensor],
        group_of: Mapping[nn.Parameter, Mapping[str, Any]],
    ) -> None:
        """Makes blocks whole in their owners, and brings back what they become."""
        shards = range(places[0].bucket.shards)
        own = self.comm.rank(kind) if len(shards) > 1 else 0
        here = [place for place in places if place.owner.across == own]
        of = [[place for place in places if place.owner.across == a] for a in shards]
        received = self._swap(
            [[directions[place.bucket][place.in_own_shard(own)] for place in its] for its in of],
            [[place.length(shard) for place in here] for shard in shards],
            kind if len(shards) > 1 else None,
            "matrices.to_owner",
            directions[places[0].bucket],
        )
        parts = [
            (torch.cat(pieces) if pieces[1:] else pieces[0]).view(place.block.shape)
            for place, *pieces in zip(here, *received, strict=True)
        ]
        del received
        self._within(INNER[kind], here, parts, group_of)
        flat = [part.flatten() for part in parts]
        received = self._swap(
            [[part[place.of_shard(shard)] for place, part in zip(here, flat, strict=True)] for shard in shards],
            [[place.length(own) for place in its] for its in of],
            kind if len(shards) > 1 else None,
            "matrices.to_shards",
            directions[places[0].bucket],
        )
        for its, pieces in zip(of, received, strict=True):
            for place, piece in zip(its, pieces, strict=True):
                directions[place.bucket][place.in_own_shard(own)] = piece

    def _within(
        self,
        kind: GroupKind,
        places: Sequence[_Place],
        parts: list[Tensor],
        group_of: Mapping[nn.Parameter, Mapping[str, Any]],
    ) -> None:
        """Replaces the parts of blocks that a tensor group has by those of what the whole blocks become."""
        ranks, own = range(self.comm.size(kind)), self.comm.rank(kind)
        divided = [n for n, place in enumerate(places) if place.block.divided is not None]
        for n in set(range(len(places))) - {*divided}:
            parts[n] = self._become(places[n], parts[n], group_of)
        if not divided:
            return
        of = [[n for n in divided if places[n].owner.inner == rank] for rank in ranks]
        received = self._swap(
            [[parts[n].flatten() for n in its] for its in of],
            [[places[n].block.elements for n in of[own]]] * len(ranks),
            kind,
            "matrices.join",
            parts[0],
        )
        back: list[list[Tensor]] = [[] for _ in ranks]
        for n, *pieces in zip(of[own], *received, strict=True):
            block = places[n].block
            assert block.divided is not None
            whole = torch.cat([piece.view(block.shape) for piece in pieces], block.divided)
            result = self._become(places[n], whole, group_of)
            for rank, part in enumerate(result.chunk(len(ranks), block.divided)):
                back[rank].append(part.flatten())
        lengths = [[places[n].block.elements for n in its] for its in of]
        received = self._swap(back, lengths, kind, "matrices.part", parts[0])
        for its, pieces in zip(of, received, strict=True):
            for n, piece in zip(its, pieces, strict=True):
                parts[n] = piece.view(places[n].block.shape)

    def _become(self, place: _Place, whole: Tensor, group_of: Mapping[nn.Parameter, Mapping[str, Any]]) -> Tensor:
        group = group_of[place.parameter]
        matrices = [self.optimizer.orthogonalise(x, group) for x in place.block.matrices(whole)]
        return place.block.joined(matrices).contiguous()

    def _swap(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[int]],
        kind: GroupKind | None,
        tag: str,
        like: Tensor,
    ) -> list[list[Tensor]]:
        """Sends a list of flat tensors to each process of the group, and returns the list from each.

        Args:
            outgoing: What goes to each process.
            incoming: How long what comes from each is.
            kind: The group; None: there is only this process.
            tag: Of the collective.
            like: Has the dtype and device, also where nothing goes out.
        """
        if kind is None or self.comm.size(kind) == 1:
            return [list(outgoing[0])]
        flat = [x for its in outgoing for x in its]
        splits = Splits(tuple(sum(map(len, its)) for its in outgoing), tuple(map(sum, incoming)))
        x = torch.cat(flat) if flat else like.new_empty(0)
        y = self.comm.all_to_all(x, kind, tag=tag, phase="optimizer", splits=splits)
        pieces = iter(y.split([n for its in incoming for n in its]))
        return [[next(pieces) for _ in its] for its in incoming]
