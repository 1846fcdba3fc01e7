"""The state of a sharded optimizer, which is kept by tiles of shards, and saved and loaded by parameter names."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tedlab.optim.bucket import Bucket, local
from tedlab.optim.segment import Segment


class ShardedState:
    """The optimizer's state of the parameters in buckets.

    Args:
        optimizer: The optimizer that has the state, by tile.
        names: Name of each parameter.
        tile: Maximum number of elements of a tile; None: as many as are contiguous.

    Attributes:
        segments: Segments of each bucket, in the order in which the buckets were added.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[nn.Parameter, str], tile: int | None) -> None:
        self.segments: dict[Bucket, list[Segment]] = {}
        self._optimizer, self._names, self._tile = optimizer, names, tile

    def add(self, bucket: Bucket) -> None:
        """Adds a bucket, with any state that its whole parameters have, such as Adagrad's constructor makes."""
        states = [self._optimizer.state.pop(p, {}) for p in bucket.parameters]
        self.segments[bucket] = [Segment(bucket, bucket.parameters, self._optimizer, self._tile)]
        if any(states):
            self.load(bucket, states)

    def divided(self, bucket: Bucket, parameters: Collection[nn.Parameter]) -> list[Segment]:
        """Returns a bucket's segments of only these parameters, after dividing those that also hold others."""
        self.segments[bucket] = [half for s in self.segments[bucket] for half in s.divide(parameters)]
        return [segment for segment in self.segments[bucket] if segment.parameters[0] in parameters]

    def group_names(self) -> list[list[str]]:
        """Returns the names of the parameters in each of the optimizer's groups."""
        return [[self._names[p] for p in group["params"]] for group in self._optimizer.param_groups]

    def regroup(self, names: Sequence[Sequence[str]]) -> None:
        """Adds the groups that an optimizer had when its state was saved and that this one does not have yet.

        Args:
            names: Names of the parameters in each group, as :meth:`group_names` returned them.
        """
        parameter = {name: p for p, name in self._names.items()}
        for group in names[len(self._optimizer.param_groups) :]:
            self._optimizer.add_param_group({"params": [parameter[name] for name in group]})

    def state_dict(self, masters: bool = True) -> dict[str, Any]:
        """Returns state by parameter name, sharded like the parameters, so that any layout can load it. Collective.

        Tensors of one element (Adam's step count) are stored as they are; half-precision parameters also store their
        fp32 master copy, unless ``masters`` is False. A parameter that never had a gradient has no state.
        """
        state: dict[str, dict[str, Any]] = {self._names[p]: {} for b in self.segments for p in b.parameters}
        for bucket in self.segments:
            held = [(segment.parameters, segment.state()) for segment in self.segments[bucket]]
            if masters and bucket.master is not bucket.shard:
                held.append((bucket.parameters, {"master": bucket.master}))
            for key in sorted({key for _, values in held for key in values}):
                having = [(parameters, values[key]) for parameters, values in held if key in values]
                by_element = [value for _, value in having if _by_element(value)]
                whole = bucket.unshard(sum(by_element[1:], by_element[0])) if by_element else []
                of = dict(zip(bucket.parameters, whole, strict=False))
                for parameters, value in having:
                    for p in parameters:
                        of_its_own = value.clone() if isinstance(value, Tensor) and not whole else value
                        state[self._names[p]][key] = of.get(p, of_its_own)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, here or in another layout.

        A parameter that it has no state of becomes as before its first step.

        Raises:
            ValueError: If it comes from an optimizer with another number of parameter groups.
        """
        here, there = self._optimizer.param_groups, state_dict["param_groups"]
        if len(here) != len(there):
            raise ValueError(
                f"The optimizer has {len(here)} parameter groups, its saved state is of {len(there)}; make the same"
            )
        for group, values in zip(here, there, strict=True):
            for key in group.keys() - values.keys() - self._optimizer.defaults.keys() - {"params"}:
                del group[key]  # what a scheduler added that did not exist yet
            group.update(values)
        for bucket in self.segments:
            self.load(bucket, [state_dict["state"].get(self._names[p], {}) for p in bucket.parameters])

    def load(self, bucket: Bucket, states: Sequence[Mapping[str, Any]]) -> None:
        """Loads the state of each parameter, by key. Parameters with the same step count share a segment."""
        of = dict(zip(bucket.parameters, states, strict=True))
        if bucket.master is not bucket.shard and any("master" in state for state in states):
            masters = [
                state.get("master", p.detach().float()) for p, state in zip(bucket.parameters, states, strict=True)
            ]
            bucket.master.copy_(bucket.shard_of(masters))
        alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for p in bucket.parameters:
            kept = sorted((key, value) for key, value in of[p].items() if key != "master")
            alike.setdefault(tuple((key, _comparable(value)) for key, value in kept), []).append(p)
        for segment in self.segments[bucket]:
            segment.load({})
        self.segments[bucket] = [Segment(bucket, group, self._optimizer, self._tile) for group in alike.values()]
        for segment, keys in zip(self.segments[bucket], alike, strict=True):
            first, joined = of[segment.parameters[0]], {}
            for key, _ in keys:
                joined[key] = first[key]
                if _by_element(first[key]):
                    nothing = torch.zeros_like(local(first[key])).flatten()
                    joined[key] = bucket.shard_of(
                        [
                            of[p][key] if segment.holds(p) else nothing.new_zeros(local(p).shape)
                            for p in bucket.parameters
                        ]
                    )
            segment.load(joined)

    def refresh_masters(self, piece: int) -> None:
        """Copies weights that were changed from outside into the fp32 master copies; other elements keep theirs.

        Args:
            piece: Number of elements compared at a time.
        """
        for bucket in self.segments:
            if bucket.master is not bucket.shard:
                for master, weight in zip(bucket.master.split(piece), bucket.shard.split(piece), strict=True):
                    torch.where(master.to(weight.dtype) == weight, master, weight.float(), out=master)


def _by_element(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _comparable(value: Any) -> Any:
    """Returns what the parameters of a segment must have in common of this value of their state."""
    if isinstance(value, Tensor):
        return None if _by_element(value) else value.item()
    return value
