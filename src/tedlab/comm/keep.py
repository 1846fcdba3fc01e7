"""Derives what CAC keeps: the plan of a second pass, from a region's collectives and ``comm.cac``."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from tedlab.comm.recompute import RecomputePlan, Second
from tedlab.hints import did_you_mean
from tedlab.spec import Site

WEIGHTS = "experts.lend"  # the collective whose result is weights


def unread_tags(sites: Iterable[Site]) -> Collection[str]:
    """Returns the tags whose results only the code behind the region reads, directly or through other collectives."""
    unread: set[str] = set()
    for site in reversed(tuple(sites)):
        if site.feeds == "end" or site.feeds in unread:
            unread.add(site.tag)
    return unread


def recompute_plan(sites: Iterable[Site], keep: Mapping[str, str], unread: Collection[str] = ()) -> RecomputePlan:
    """Returns what a second pass does at each site.

    Args:
        sites: The collectives of the first pass, in order.
        keep: Maps the tags whose results are kept to ``whole`` or ``shard``; the others communicate again. A shard is
            the 1/T that each tensor rank keeps of a result that all hold alike, to be gathered in the second pass; for
            an all-gather, it is the input.
    """
    result: dict[str, Second] = {}
    for site in reversed(tuple(sites)):
        kept = keep.get(site.tag)
        # The second pass does not read the result of a site whose consumer does not run again.
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
    return result | dict.fromkeys(unread, Second.NOTHING)


def kept_tags(cac: object, tags: Collection[str] | None, block: int | None = None) -> Mapping[str, str]:
    """Converts ``comm.cac`` into the argument ``keep`` of :func:`recompute_plan`.

    Args:
        cac: false, true (every result but weights, which take memory and are exchanged again), ``shard`` (1/T of each),
            or a list of entries ``[block/]tag[:shard]``.
        tags: The tags that exist; None if the model is not known yet.
        block: The block whose entries are wanted; entries without a block apply to all.

    Raises:
        ValueError: For any other value, and for a tag that does not exist; the message suggests the nearest one.
    """
    results = [tag for tag in tags or () if tag != WEIGHTS]
    if isinstance(cac, bool) or cac is None:
        return dict.fromkeys(results, "whole") if cac else {}
    if cac == "shard":
        return dict.fromkeys(results, "shard")
    if not isinstance(cac, Sequence) or isinstance(cac, str):
        raise ValueError(
            f"comm.cac={cac} is not valid: false, true (keep every result), shard (1/T of each), auto (what "
            "comm.cac_budget_bytes allows), or a list of collectives to keep"
        )
    kept = {}
    for entry in cac:
        match = re.fullmatch(r"(?:(\d+)/)?([^/:]+)(:shard)?", str(entry))
        if match is None or (tags is not None and match[2] not in tags):
            tag = match[2] if match else str(entry)
            raise ValueError(
                f"comm.cac: there is no collective '{tag}'.{did_you_mean(tag, tags or ())} Valid: "
                f"{', '.join(tags or ['TAG'])}, each also as TAG:shard, and for one block as BLOCK/TAG"
            )
        if match[1] is None or block is None or int(match[1]) == block:
            kept[match[2]] = "shard" if match[3] else "whole"
    return kept
