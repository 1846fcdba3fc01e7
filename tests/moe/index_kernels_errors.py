"""Prints, as JSON, how many numbers the Triton kernels of lists find otherwise than plain torch in each case.

A program of its own: Triton's interpreter must be chosen before Triton is imported (TRITON_INTERPRET=1).
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor

from tedlab.moe import index_kernels, index_ops

RECEIVED = [(1, 1, 5), (1, 3, 4), (2, 2, 3), (4, 1, 6), (3, 5, 2)]  # receivers, senders, experts of a process
# Tokens, choices, experts, processes.
TOKENS = [(0, 2, 4, 2), (7, 1, 6, 3), (130, 3, 8, 4), (50, 6, 12, 3), (9, 8, 8, 1)]


def differing(ours: Any, theirs: Any, there: Tensor | None = None) -> int:
    if theirs is None or ours is None:
        return 0 if ours is theirs else 1
    ours = ours.cpu()
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    return int((ours != theirs).sum() if there is None else (ours != theirs)[there].sum())


def of_runs(
    device: str, ranks: int, senders: int, experts: int, draw: torch.Generator, most: int, least: int = 0
) -> list[int]:
    counts_ise = torch.randint(least, most, (ranks, senders, experts), generator=draw)
    counts_ise[-1, 0] = 0
    width, total = int(counts_ise.sum((1, 2)).max()), int(counts_ise.sum())
    found = []
    for whole in (True, False):
        ours = index_kernels.runs(counts_ise.to(device), width, total, whole)
        found += [differing(*pair) for pair in zip(ours, index_ops.runs(counts_ise, width, total, whole), strict=True)]
    return found


def of_pilots(
    device: str, tokens: int, choices: int, experts: int, processes: int, draw: torch.Generator, empty: bool
) -> list[int]:
    expert_TK = torch.rand(tokens, experts, generator=draw).argsort(1)[:, :choices]
    if empty:
        expert_TK = expert_TK.masked_fill(torch.rand(tokens, choices, generator=draw) < 0.3, -1)
    there = expert_TK >= 0
    local, most = experts // processes, min(choices, experts // processes)
    theirs = index_ops.number(expert_TK, local, processes)
    ours = index_kernels.number(expert_TK.to(device), local, processes)
    found = [differing(ours[0], theirs[0], there), differing(ours[1], theirs[1])]
    listed = index_ops.pilots(expert_TK, *theirs, local, most)
    by_kernels = index_kernels.pilots(expert_TK.to(device), *ours, local, most)
    number = int((listed.pilot_TK >= 0).sum())
    found += [
        differing(by_kernels.token_R[:number], listed.token_R[:number]),
        differing(by_kernels.pilot_TK, listed.pilot_TK),
        differing(by_kernels.code_TK, listed.code_TK, there),
    ]
    # As if all of them had arrived at one process: by sender and then by any order of their experts.
    process_TK = expert_TK.div(local, rounding_mode="floor")
    codes = [listed.code_TK[process_TK == process][torch.randperm(int((process_TK == process).sum()), generator=draw)]
             for process in range(processes)]  # fmt: skip
    choices_se = torch.stack([torch.bincount(expert_TK[process_TK == s] % local, minlength=local)
                              for s in range(processes)])  # fmt: skip
    pilots_s = theirs[1][:, -1] if tokens else torch.zeros(processes, dtype=torch.int64)
    code_q = torch.cat(codes)
    moved_q = index_ops.moved_on(code_q, pilots_s, choices_se, most)
    arguments = pilots_s.to(device), choices_se.to(device), most
    found.append(differing(index_kernels.moved_on(code_q.to(device), *arguments), moved_q))
    rows, expert_N = torch.randperm(len(moved_q), generator=draw), torch.randint(9, (len(moved_q),), generator=draw)
    for row_N in (rows, None):
        at = index_ops.codes(moved_q, row_N, expert_N, number + 2, most)
        row = None if row_N is None else row_N.to(device)
        by_kernel = index_kernels.codes(moved_q.to(device), row, expert_N.to(device), number + 2, most)
        found += [differing(*pair) for pair in zip(by_kernel, at, strict=True)]
    return found


def main(device: str) -> None:
    draw, found = torch.Generator().manual_seed(0), {}
    for sizes in RECEIVED:
        found[f"runs {sizes}"] = of_runs(device, *sizes, draw, 7)
    found["runs that several programs divide"] = of_runs(device, 1, 2, 2, draw, 5000)
    found["runs longer than their programs take at once"] = of_runs(device, 2, 1, 1, draw, 40_000, least=33_000)
    for tokens in TOKENS:
        for empty in (False, True):
            found[f"pilots {tokens}, some choices missing: {empty}"] = of_pilots(device, *tokens, draw, empty)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
