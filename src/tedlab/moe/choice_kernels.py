"""``choice.py`` as one Triton kernel, which reads each token's scores once; imported only if Triton is installed.

Of equal scores it takes the first expert's; ``torch.topk`` promises no order there.
"""

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from tedlab.config import GroupScore

_ELEMENTS = 2048  # scores that a program holds


def best_experts(
    preferred_TE: Tensor, bias_E: Tensor | None, top_k: int, groups: int, chosen_groups: int, group_score: str
) -> Tensor:
    """See :func:`tedlab.moe.choice.best_experts`."""
    tokens, experts = preferred_TE.shape
    out = torch.empty(tokens, top_k, dtype=torch.int64, device=preferred_TE.device)
    if tokens:
        members = triton.next_power_of_2(experts // groups)
        wide = triton.next_power_of_2(groups)
        rows = max(1, _ELEMENTS // (wide * members))
        _best_experts[(triton.cdiv(tokens, rows),)](
            preferred_TE.contiguous(),
            bias_E,
            out,
            tokens,
            GROUPS=groups,
            WIDE=wide,
            EACH=experts // groups,
            MEMBERS=members,
            CHOSEN=chosen_groups,
            SECOND=group_score == GroupScore.TOP2 and experts > groups,
            CHOICES=top_k,
            ROWS=rows,
        )
    return out


@triton.jit
def _best_experts(  # type: ignore[no-untyped-def]
    preferred,
    bias,
    out,
    tokens,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    EACH: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SECOND: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group, member = tl.arange(0, WIDE), tl.arange(0, MEMBERS)
    inside = (group[:, None] < GROUPS) & (member[None, :] < EACH)
    expert = group[:, None] * EACH + member[None, :]
    there = (row < tokens)[:, None, None] & inside[None, :, :]
    x = tl.load(preferred + row[:, None, None] * (GROUPS * EACH) + expert[None, :, :], there, -float("inf"))
    if bias is not None:
        x += tl.load(bias + expert, inside, 0.0)[None, :, :]
    if CHOSEN < GROUPS:
        score = tl.max(x, 2)
        if SECOND:  # all but the first of a group's best
            best = tl.min(tl.where(x == score[:, :, None], member[None, None, :], MEMBERS), 2)
            score += tl.max(tl.where(member[None, None, :] == best[:, :, None], -float("inf"), x), 2)
        score = tl.where(group[None, :] < GROUPS, score, -float("inf"))
        allowed = tl.zeros((ROWS, WIDE), tl.int32)
        for _ in tl.static_range(CHOSEN):
            top = tl.max(score, 1)
            first = tl.min(tl.where(score == top[:, None], group[None, :], WIDE), 1)
            allowed = tl.where(group[None, :] == first[:, None], 1, allowed)
            score = tl.where(group[None, :] == first[:, None], -float("inf"), score)
        x = tl.where(allowed[:, :, None] == 1, x, -float("inf"))
    flat = tl.reshape(x, (ROWS, WIDE * MEMBERS))
    place = tl.arange(0, WIDE * MEMBERS)
    for k in tl.static_range(CHOICES):
        top = tl.max(flat, 1)
        first = tl.min(tl.where(flat == top[:, None], place[None, :], WIDE * MEMBERS - 1), 1)
        chosen = tl.minimum(first // MEMBERS * EACH + first % MEMBERS, GROUPS * EACH - 1)  # even of NaN
        tl.store(out + row * CHOICES + k, chosen.to(tl.int64), row < tokens)
        flat = tl.where(place[None, :] == first[:, None], -float("inf"), flat)
