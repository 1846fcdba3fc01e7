"""Where the blocks of a model communicate: every call site of a forward pass by its tag, and what CAC keeps of it.

The one table behind the plan of a recomputation (:func:`plan`), the closed form of volumes (``volumes.py``) and the
choice of what to keep within a budget (``budget.py``).
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tedlab.comm.collectives import Operation
from tedlab.comm.recompute import Plan, Second
from tedlab.config import CommConfig
from tedlab.degrees import GroupKind

TAGS = (  # of a block's forward pass, in order
    "attention.gather",
    "attention.reduce",
    "feed_forward.gather",
    "feed_forward.reduce",
    "router.statistics",
    "dispatch.all_to_all",
    "dispatch.gather",
    "experts.reduce",
    "combine.all_to_all",
    "combine.gather",
)


# tokens: the activations of a data rank's micro-batch; slots: its dispatch buffer; share: a tensor rank's part of that.
Buffer = Literal["tokens", "slots", "share", "statistics"]


@dataclass(frozen=True)
class Site:
    """A collective of a block's forward pass.

    Attributes:
        tag: its name.
        op: the operation.
        kind: the group.
        feeds: the site that alone uses its result; ``end``: no collective or weight of the block uses it any more.
        replicated: whether all tensor ranks hold the same result, so that each may keep a part for all.
        buffer: what the payload is.
    """

    tag: str
    op: Operation
    kind: GroupKind
    feeds: str | None = None
    replicated: bool = False
    buffer: Buffer = "tokens"


def block_sites(routed: bool, comm: CommConfig, sequence: bool, sizes: Mapping[GroupKind, int]) -> tuple[Site, ...]:
    """The collectives of a block's forward pass, in order.

    Args:
        routed: whether its feed-forward layer has experts.
        comm: the toggles.
        sequence: whether activations between layers are sharded over the tensor group.
        sizes: of the groups; those of one process do not communicate.
    """
    sites = [*_layer("attention", sequence)]
    sites += _routed(comm, sequence) if routed else _layer("feed_forward", sequence, feeds="end")
    present = {site.tag for site in sites if sizes[site.kind] > 1} | {"end"}
    feeds = {site.tag: site.feeds for site in sites}

    def next_present(tag: str | None) -> str | None:
        while tag is not None and tag not in present:
            tag = feeds[tag]
        return tag

    several = sizes["tensor"] > 1
    return tuple(
        replace(site, feeds=next_present(site.feeds), replicated=site.replicated and several)
        for site in sites
        if site.tag in present
    )


def _layer(name: str, sequence: bool, feeds: str | None = None) -> list[Site]:
    if sequence:
        return [
            Site(f"{name}.gather", "all_gather", "tensor", replicated=True),
            Site(f"{name}.reduce", "reduce_scatter", "tensor", feeds),
        ]
    return [Site(f"{name}.reduce", "all_reduce", "tensor", feeds, replicated=True)]


def _routed(comm: CommConfig, sequence: bool) -> list[Site]:
    sliced = comm.dtd or sequence  # each tensor rank sends and receives its own slots
    scattered = sequence or (comm.dtd and comm.fuse_reduce_scatter)
    sites = [Site("router.statistics", "all_reduce", "tensor", buffer="statistics")] if sequence else []
    exchanged: Buffer = "share" if sliced else "slots"
    sites.append(
        Site(
            "dispatch.all_to_all",
            "all_to_all",
            "expert",
            feeds="dispatch.gather" if sliced else None,
            replicated=not sliced,
            buffer=exchanged,
        )
    )
    if sliced:
        sites.append(Site("dispatch.gather", "all_gather", "expert_tensor", replicated=True, buffer="slots"))
    sites.append(
        Site(
            "experts.reduce",
            "reduce_scatter" if scattered else "all_reduce",
            "expert_tensor",
            feeds="combine.all_to_all",
            replicated=not scattered,
            buffer="slots",
        )
    )
    dropped = comm.dtd and not sequence
    sites.append(
        Site(
            "combine.all_to_all",
            "all_to_all",
            "expert",
            feeds="combine.gather" if dropped else None,
            replicated=not sliced,
            buffer=exchanged,
        )
    )
    if dropped:
        sites.append(Site("combine.gather", "all_gather", "tensor", replicated=True, buffer="slots"))
    return sites


def backward_sites(routed: bool, comm: CommConfig, sequence: bool, sizes: Mapping[GroupKind, int]) -> tuple[Site, ...]:
    """The collectives of a block's backward pass, the adjoints of the forward pass's; arguments as there."""
    layers = ["attention"] if routed else ["feed_forward", "attention"]
    sites = _routed_backward(comm, sequence) if routed else []
    for layer in layers:
        if sequence:
            sites += [
                Site(f"{layer}.reduce", "all_gather", "tensor"),
                Site(f"{layer}.gather", "reduce_scatter", "tensor"),
            ]
        else:
            sites.append(Site(f"{layer}.copy", "all_reduce", "tensor"))
    return tuple(site for site in sites if sizes[site.kind] > 1)


def _routed_backward(comm: CommConfig, sequence: bool) -> list[Site]:
    sliced = comm.dtd or sequence
    scattered = sequence or (comm.dtd and comm.fuse_reduce_scatter)
    exchanged: Buffer = "share" if sliced else "slots"
    sites = [Site("combine.all_to_all", "all_to_all", "expert", buffer=exchanged)]
    if scattered:
        sites.append(Site("experts.reduce", "all_gather", "expert_tensor", buffer="slots"))
        sites.append(Site("dispatch.gather", "reduce_scatter", "expert_tensor", buffer="slots"))
    else:
        if sliced:
            sites.append(Site("combine.drop", "all_gather", "expert_tensor", buffer="slots"))
        sites.append(Site("experts.copy", "all_reduce", "expert_tensor", buffer="slots"))
    sites.append(Site("dispatch.all_to_all", "all_to_all", "expert", buffer=exchanged))
    if comm.dtd and not sequence:
        sites.append(Site("dispatch.drop", "all_gather", "tensor", buffer="slots"))
    return sites


def plan(sites: Iterable[Site], keep: Mapping[str, str]) -> Plan:
    """What a second pass does at each site.

    Args:
        sites: of one block.
        keep: tag → ``whole`` or ``shard``; the others communicate again. A shard is 1/T of a result that all tensor
            ranks hold alike, gathered again in the second pass; of an all-gather, its input.
    """
    result: dict[str, Second] = {}
    for site in reversed(tuple(sites)):
        kept = keep.get(site.tag)
        # What is not read in the second pass: the result of a site whose consumer does not run again.
        consumer = Second.NOTHING if site.feeds == "end" else result.get(site.feeds or "", Second.AGAIN)
        if kept is None and consumer is not Second.AGAIN and site.feeds != "end":
            result[site.tag] = Second.NOTHING
        elif kept is None:
            result[site.tag] = Second.AGAIN
        elif consumer is not Second.AGAIN:
            result[site.tag] = Second.NOTHING
        elif kept == "shard" and site.op == "all_gather":
            result[site.tag] = Second.AGAIN
        elif kept == "shard" and site.replicated:
            result[site.tag] = Second.SLICE
        else:
            result[site.tag] = Second.WHOLE
    return result


def kept_tags(cac: object, block: int | None = None) -> Mapping[str, str]:
    """``comm.cac`` as the argument ``keep`` of :func:`plan`.

    Args:
        cac: false, true (every result), ``shard`` (1/T of each), or a list of entries ``[block/]tag[:shard]``.
        block: whose entries; those without a block are for all.

    Raises:
        ValueError: for anything else, and for tags that do not exist, with the nearest that does.
    """
    if isinstance(cac, bool) or cac is None:
        return dict.fromkeys(TAGS, "whole") if cac else {}
    if cac == "shard":
        return dict.fromkeys(TAGS, "shard")
    if not isinstance(cac, Sequence) or isinstance(cac, str):
        raise ValueError(
            f"comm.cac={cac} is not valid: false, true (keep every result), shard (1/T of each), auto (what "
            "comm.cac_budget_bytes allows), or a list of collectives to keep"
        )
    kept = {}
    for entry in cac:
        match = re.fullmatch(r"(?:(\d+)/)?([^/:]+)(:shard)?", str(entry))
        if match is None or match[2] not in TAGS:
            tag = match[2] if match else str(entry)
            near = difflib.get_close_matches(tag, TAGS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"comm.cac: there is no collective '{tag}'.{hint} Valid: {', '.join(TAGS)}, each also as TAG:shard, "
                "and for one block as BLOCK/TAG"
            )
        if match[1] is None or block is None or int(match[1]) == block:
            kept[match[2]] = "shard" if match[3] else "whole"
    return kept
