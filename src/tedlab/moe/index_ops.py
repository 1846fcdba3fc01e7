"""The lists of indices around exchanges without a capacity, in plain torch; GPUs use ``index_kernels.py``.

A list has as many numbers as there are rows or choices, and comes from a few counts that are on the device, for which
nothing here waits. On a GPU the host would need longer to launch the small operations of this file than the device to
run them, and then for a whole layer longer than the device. Legend as in ``ragged.py`` and ``pilots.py``.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Runs(NamedTuple):
    """How rows that arrived in runs, one for each receiver, sender and expert, are sorted by expert.

    Attributes:
        expert_N: (N,) int64, the expert of each row.
        ends_e: (e,) int32, the number of rows of each expert and those before it.
        row_N: (N,) int64, the place of each row among the received ones; None: it was not asked for.
        place_iM: (i·M,) int64, the inverse, -1 where a receiver got fewer than M; None likewise.
    """

    expert_N: Tensor
    ends_e: Tensor
    row_N: Tensor | None
    place_iM: Tensor | None


def runs(counts_ise: Tensor, width: int, total: int, whole: bool = True) -> Runs:
    """Sorts rows by expert, then by sender, then by receiver.

    Args:
        counts_ise: (i, s, e) int64, the rows of each run; a receiver gets them by sender and then by expert.
        width: M, as in the legend.
        total: N, as in the legend.
        whole: Whether the places are asked for.
    """
    device, (ranks, _, experts) = counts_ise.device, counts_ise.shape
    counts_e = counts_ise.sum((0, 1))
    expert_N = torch.arange(experts, device=device).repeat_interleave(counts_e, output_size=total)
    ends_e = counts_e.cumsum(0).int()
    if not whole:
        return Runs(expert_N, ends_e, None, None)
    arriving = counts_ise.flatten(1)  # of each receiver, in the order of arrival
    starts = arriving.cumsum(1) - arriving + width * torch.arange(ranks, device=device).unsqueeze(1)
    sizes, starts = (t.view(counts_ise.shape).permute(2, 1, 0).flatten() for t in (arriving, starts))
    shift = starts - (sizes.cumsum(0) - sizes)
    place = torch.arange(total, device=device)
    row_N = shift.repeat_interleave(sizes, output_size=total) + place
    place_iM = torch.full((ranks * width,), -1, device=device).scatter_(0, row_N, place)
    return Runs(expert_N, ends_e, row_N, place_iM)


class Codes(NamedTuple):
    """Where the choices of pilots are; -1: there is no such choice.

    Attributes:
        choice_N: (N,) int64, the code of each row.
        token_N: (N,) int64, the pilot of each row.
        row_pW: (p, W) int64, the row of each choice.
        expert_pW: (p, W) int64, its expert; any where there is none.
        at_pW: (p, W) int64, where it lies among those received.
    """

    choice_N: Tensor
    token_N: Tensor
    row_pW: Tensor
    expert_pW: Tensor
    at_pW: Tensor


def codes(code_iq: Tensor, row_N: Tensor | None, expert_N: Tensor, pilots: int, most: int) -> Codes:
    """Lists the choices of pilots by row, and the rows by choice.

    Args:
        code_iq: For each received choice, W · the place of its pilot plus its number; -1: there is none.
        row_N: Where each row lies among the received choices; None: in the same place.
        expert_N: The expert of each row.
        pilots: Number p of places for pilots.
        most: W, as in the legend.
    """
    choice_N = code_iq if row_N is None else code_iq[row_N]
    row_pW = inverse(choice_N, pilots * most).view(-1, most)
    expert_pW = torch.zeros_like(row_pW).flatten().scatter_(0, choice_N, expert_N).view_as(row_pW)
    at_pW = inverse(code_iq, pilots * most).view(-1, most)
    return Codes(choice_N, choice_N.div(most, rounding_mode="floor"), row_pW, expert_pW, at_pW)


def inverse(index: Tensor, size: int) -> Tensor:
    """Returns where each number from 0 to ``size`` - 1 stands in ``index``, -1 if nowhere; -1 in it means nothing."""
    at = torch.full((size + 1,), -1, dtype=torch.int64, device=index.device)  # the last one is cut off
    return at.scatter_(0, index.masked_fill(index < 0, size), torch.arange(len(index), device=index.device))[:size]


def number(expert_TK: Tensor, experts: int, processes: int) -> tuple[Tensor, Tensor]:
    """Numbers the choices of each token among those that it has in the same process.

    Args:
        expert_TK: (T, K) int64, the chosen experts; -1: none.
        experts: Number of experts of a process.
        processes: Number of processes.

    Returns:
        The numbers (T, K) int64, any where there is no choice; and (processes, T) int64, how many of the tokens up to
        each have a choice in each process.
    """
    process_TK = _processes(expert_TK, experts, processes)
    same_TKK = process_TK.unsqueeze(2) == process_TK.unsqueeze(1)
    there_Ts = process_TK.new_zeros(len(process_TK), processes + 1).scatter_(1, process_TK, 1)
    return same_TKK.tril(-1).sum(2), there_Ts[:, :processes].t().cumsum(1)


class Pilots(NamedTuple):
    """The pilots of tokens, by process and then by token.

    Attributes:
        token_R: (T·K,) int64: its first numbers are the tokens of the pilots, the others are any.
        pilot_TK: (T, K) int64: the pilots of each token, one for each process; -1: none.
        code_TK: (T, K) int64: W · the number of a choice's pilot among those that go to the same process, plus the
            choice's own number among those of that pilot; any where there is no choice.
    """

    token_R: Tensor
    pilot_TK: Tensor
    code_TK: Tensor


def pilots(expert_TK: Tensor, number_TK: Tensor, upto_sT: Tensor, experts: int, most: int) -> Pilots:
    """Lists the pilots of tokens.

    Args:
        expert_TK: (T, K) int64, the chosen experts; -1: none.
        number_TK, upto_sT: What :func:`number` returns.
        experts: Number of experts of a process.
        most: W, as in the legend.
    """
    (tokens, choices), processes = expert_TK.shape, len(upto_sT)
    process_TK = _processes(expert_TK, experts, processes)
    first_TK = (number_TK == 0) & (process_TK < processes)
    pilots_s = upto_sT[:, -1] if tokens else upto_sT.new_zeros(processes)
    start_s = torch.cat((pilots_s.new_zeros(1), pilots_s.cumsum(0)))
    token_T1 = torch.arange(tokens, device=expert_TK.device).unsqueeze(1)
    at_TK = upto_sT[process_TK.clamp(max=processes - 1), token_T1] - 1
    pilot_TK = torch.where(first_TK, start_s[process_TK] + at_TK, -1)
    place_TK = torch.where(first_TK, pilot_TK, tokens * choices)  # of others one behind the last, which is cut off
    token_R = pilot_TK.new_zeros(tokens * choices + 1)
    token_R.scatter_(0, place_TK.flatten(), token_T1.expand_as(place_TK).flatten())
    # A router without a finite score repeats an expert; losses end such a run, which must get that far.
    return Pilots(token_R[:-1], pilot_TK, at_TK * most + number_TK.clamp(max=most - 1))


def moved_on(code_q: Tensor, pilots_s: Tensor, choices_se: Tensor, most: int) -> Tensor:
    """Returns codes that count pilots from the first that arrives here, rather than from the first of their sender.

    Args:
        code_q: (q,) int64, codes by sender.
        pilots_s: (s,) int64, the pilots of each sender.
        choices_se: (s, e) int64, its choices.
        most: W, as in the legend.
    """
    before_s = pilots_s.cumsum(0) - pilots_s
    return code_q + most * before_s.repeat_interleave(choices_se.sum(1), output_size=len(code_q))


def _processes(expert_TK: Tensor, experts: int, processes: int) -> Tensor:
    """Returns the process of each choice; of those that are not there, one after the last."""
    return expert_TK.div(experts, rounding_mode="floor").masked_fill(expert_TK < 0, processes)
