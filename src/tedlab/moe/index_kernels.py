"""The functions of ``index_ops.py`` as Triton kernels, one for each list; imported only if there is Triton.

They take the same arguments, on a GPU, and return the same numbers.
"""

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from tedlab.moe.index_ops import Codes, Pilots, Runs

_ROWS = 1024  # numbers that a program writes at a time
_PROGRAMS = 16  # most programs that divide a run


def runs(counts_ise: Tensor, width: int, total: int, whole: bool = True) -> Runs:
    """See :func:`tedlab.moe.index_ops.runs`."""
    ranks, senders, experts = counts_ise.shape
    expert_N, ends_e = counts_ise.new_empty(total), counts_ise.new_empty(experts, dtype=torch.int32)
    row_N = place_iM = None
    if whole:
        row_N = counts_ise.new_empty(total)
        place_iM = counts_ise.new_full((ranks * width,), -1) if ranks > 1 else counts_ise.new_empty(width)
    number = counts_ise.numel()
    _runs[(number, _programs(total, number))](
        *(counts_ise.contiguous(), expert_N, ends_e, row_N, place_iM, width),
        RANKS=ranks,
        SENDERS=senders,
        EXPERTS=experts,
        RUNS=triton.next_power_of_2(number),
        BLOCK=_ROWS,
    )
    return Runs(expert_N, ends_e, row_N, place_iM)


def codes(code_iq: Tensor, row_N: Tensor | None, expert_N: Tensor, pilots: int, most: int) -> Codes:
    """See :func:`tedlab.moe.index_ops.codes`."""
    rows = len(expert_N)
    choice_N, token_N = code_iq.new_empty(2, rows).unbind()
    row_pW, at_pW = code_iq.new_full((2, pilots, most), -1).unbind()
    expert_pW = code_iq.new_zeros(pilots, most)
    if rows:
        given = code_iq, row_N, expert_N, choice_N, token_N, row_pW, expert_pW, at_pW
        _codes[(triton.cdiv(rows, _ROWS),)](*given, rows, most, BLOCK=_ROWS)
    return Codes(choice_N, token_N, row_pW, expert_pW, at_pW)


def number(expert_TK: Tensor, experts: int, processes: int) -> tuple[Tensor, Tensor]:
    """See :func:`tedlab.moe.index_ops.number`."""
    tokens, choices = expert_TK.shape
    number_TK, there_sT = torch.empty_like(expert_TK), expert_TK.new_empty(processes, tokens, dtype=torch.int32)
    if tokens:
        shape = _shape(choices)
        grid = (triton.cdiv(tokens, shape["TOKENS"]),)
        _number[grid](expert_TK.contiguous(), number_TK, there_sT, tokens, experts, processes, **shape)
    return number_TK, there_sT.cumsum(1)


def pilots(expert_TK: Tensor, number_TK: Tensor, upto_sT: Tensor, experts: int, most: int) -> Pilots:
    """See :func:`tedlab.moe.index_ops.pilots`."""
    tokens, choices = expert_TK.shape
    token_R = expert_TK.new_empty(tokens * choices)
    pilot_TK, code_TK = expert_TK.new_empty(2, tokens, choices).unbind()
    if tokens:
        shape = _shape(choices)
        given = expert_TK.contiguous(), number_TK, upto_sT.contiguous(), token_R, pilot_TK, code_TK
        grid = (triton.cdiv(tokens, shape["TOKENS"]),)
        _pilots[grid](*given, tokens, experts, len(upto_sT), most, **shape)
    return Pilots(token_R, pilot_TK, code_TK)


def moved_on(code_q: Tensor, pilots_s: Tensor, choices_se: Tensor, most: int) -> Tensor:
    """See :func:`tedlab.moe.index_ops.moved_on`."""
    out, (senders, experts) = torch.empty_like(code_q), choices_se.shape
    _moved_on[(senders, _programs(len(code_q), senders))](
        *(code_q.contiguous(), pilots_s.contiguous(), choices_se.contiguous(), out, most),
        SENDERS=senders,
        EXPERTS=experts,
        WIDE=triton.next_power_of_2(senders),
        CHOICES=triton.next_power_of_2(senders * experts),
        BLOCK=_ROWS,
    )
    return out


def _programs(total: int, number: int) -> int:
    """Returns how many programs write each of so many runs."""
    return max(1, min(_PROGRAMS, triton.cdiv(total, number * _ROWS)))


def _shape(choices: int) -> dict[str, int]:
    """Returns the tokens of a program, and the choices of each."""
    wide = triton.next_power_of_2(choices)
    return {"CHOICES": choices, "WIDE": wide, "TOKENS": max(1, 4096 // (wide * wide))}


@triton.jit
def _runs(  # type: ignore[no-untyped-def]
    counts,
    expert,
    ends,
    row,
    place,
    width,
    RANKS: tl.constexpr,
    SENDERS: tl.constexpr,
    EXPERTS: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    run = tl.program_id(0)  # by expert, sender and receiver, as rows are sorted
    e, s, i = run // (SENDERS * RANKS), run // RANKS % SENDERS, run % RANKS
    own = (i * SENDERS + s) * EXPERTS + e
    at = tl.arange(0, RUNS)
    at_i, at_s, at_e = at // (SENDERS * EXPERTS), at // EXPERTS % SENDERS, at % EXPERTS
    rows = tl.load(counts + at, at < RANKS * SENDERS * EXPERTS, 0)
    size = tl.sum(tl.where(at == own, rows, 0), 0)
    start = tl.sum(tl.where((at_e * SENDERS + at_s) * RANKS + at_i < run, rows, 0), 0)
    source = i * width + tl.sum(tl.where((at_i == i) & (at < own), rows, 0), 0)
    first = tl.program_id(1) * BLOCK
    step = tl.num_programs(1) * BLOCK
    for begin in range(first, size, step):
        j = begin + tl.arange(0, BLOCK)
        inside = j < size
        tl.store(expert + start + j, e.to(tl.int64), inside)
        if row is not None:
            tl.store(row + start + j, source + j, inside)
            tl.store(place + source + j, start + j, inside)
    if (first == 0) & (s == SENDERS - 1) & (i == RANKS - 1):
        tl.store(ends + e, (start + size).to(tl.int32))


@triton.jit
def _codes(  # type: ignore[no-untyped-def]
    code, row, expert, choice, token, row_of, expert_of, at_of, rows, most, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    at = n
    if row is not None:
        at = tl.load(row + n, inside, 0)
    c = tl.load(code + at, inside, 0)
    tl.store(choice + n, c, inside)
    tl.store(token + n, c // most, inside)
    tl.store(row_of + c, n, inside)
    tl.store(expert_of + c, tl.load(expert + n, inside, 0), inside)
    tl.store(at_of + c, at, inside)


@triton.jit
def _number(  # type: ignore[no-untyped-def]
    expert,
    number,
    there,
    tokens,
    experts,
    processes,
    CHOICES: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, WIDE)
    inside = (t < tokens)[:, None] & (k < CHOICES)[None, :]
    chosen = tl.load(expert + t[:, None] * CHOICES + k[None, :], inside, -1)
    process = tl.where(chosen >= 0, chosen // experts, processes)
    before = (process[:, :, None] == process[:, None, :]) & (k[None, :, None] > k[None, None, :])
    tl.store(number + t[:, None] * CHOICES + k[None, :], tl.sum(before.to(tl.int64), 2), inside)
    for s in range(processes):
        found = tl.max((process == s).to(tl.int32), 1)
        tl.store(there + s * tokens + t, found, t < tokens)


@triton.jit
def _pilots(  # type: ignore[no-untyped-def]
    expert,
    number,
    upto,
    token,
    pilot,
    code,
    tokens,
    experts,
    processes,
    most,
    CHOICES: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, WIDE)
    inside = (t < tokens)[:, None] & (k < CHOICES)[None, :]
    at = t[:, None] * CHOICES + k[None, :]
    chosen = tl.load(expert + at, inside, -1)
    own = tl.load(number + at, inside, 0)
    there = chosen >= 0
    process = tl.where(there, chosen // experts, 0)
    start = tl.zeros_like(chosen)
    total = tl.zeros((), tl.int64)
    for s in range(processes):
        start = tl.where(process == s, total, start)
        total += tl.load(upto + s * tokens + tokens - 1)
    place = tl.load(upto + process * tokens + t[:, None], inside, 1) - 1
    first = there & (own == 0)
    tl.store(pilot + at, tl.where(first, start + place, -1), inside)
    tl.store(code + at, place * most + tl.minimum(own, most - 1), inside)
    tl.store(token + start + place, t[:, None] + tl.zeros_like(start), inside & first)


@triton.jit
def _moved_on(  # type: ignore[no-untyped-def]
    code,
    pilots,
    choices,
    out,
    most,
    SENDERS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDE: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sender = tl.program_id(0)
    s, c = tl.arange(0, WIDE), tl.arange(0, CHOICES)
    before = tl.sum(tl.load(pilots + s, (s < SENDERS) & (s < sender), 0), 0)
    rows = tl.load(choices + c, c < SENDERS * EXPERTS, 0)
    start = tl.sum(tl.where(c < sender * EXPERTS, rows, 0), 0)
    size = tl.sum(tl.where(c // EXPERTS == sender, rows, 0), 0)
    first = tl.program_id(1) * BLOCK
    step = tl.num_programs(1) * BLOCK
    for begin in range(first, size, step):
        j = begin + tl.arange(0, BLOCK)
        inside = j < size
        tl.store(out + start + j, tl.load(code + start + j, inside, 0) + most * before, inside)
