"""Prints, as JSON, how many tokens choose otherwise with the Triton kernel than by plain torch in each case.

A program of its own: Triton's interpreter must be chosen before Triton is imported (TRITON_INTERPRET=1).
"""

import itertools
import json
import sys

import torch

from tedlab.moe import choice, choice_kernels

TOKENS = 50
SHAPES = [(8, 1, 1, 2), (12, 3, 2, 4), (60, 5, 2, 6), (64, 8, 3, 6), (256, 8, 4, 8), (40, 4, 4, 3), (6, 6, 2, 2)]


def main(device: str) -> None:
    differing = {}
    for (experts, groups, chosen, top_k), biased, score in itertools.product(SHAPES, (False, True), ("max", "top2")):
        draw = torch.Generator().manual_seed(experts + groups)
        preferred_TE = torch.rand(TOKENS, experts, generator=draw)
        bias_E = torch.randn(experts, generator=draw) if biased else None
        arguments = top_k, groups, chosen, score
        moved = None if bias_E is None else bias_E.to(device)
        ours = choice_kernels.best_experts(preferred_TE.to(device), moved, *arguments).cpu()
        theirs = choice.best_experts(preferred_TE, bias_E, *arguments)
        name = f"{experts} experts, {chosen} of {groups} groups by {score}, top {top_k}, biased={biased}"
        differing[name] = int((ours != theirs).any(1).sum())
    ties = choice_kernels.best_experts(torch.ones(3, 6, device=device), None, 2, 3, 2, "max")
    differing["ties go to the first"] = int((ties.cpu() != torch.tensor([0, 1])).any(1).sum())
    print(json.dumps(differing))


if __name__ == "__main__":
    main(sys.argv[1])
