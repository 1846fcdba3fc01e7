"""Random numbers: the same on the tensor ranks of a data rank, which compute one model on one batch; else different.

That goes for what the processes draw themselves (masks of dropout) and for the workers of their data loaders (noise
in a data set). With sequence parallelism the tensor ranks draw the same masks for their different positions: these are
then correlated, as heads and layers of one process are not, but nothing drifts apart.

What decides which samples there are is drawn alike on all processes, since these divide it among them.
"""

import functools
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper
from torch.utils.data import DataLoader

from tedlab._compat.lightning import sampler_inside

Roots = tuple[int, int, int]  # of the generators of Python, NumPy and torch


def roots(share: Callable[[Any], Any]) -> Roots:
    """What the generators of all processes are seeded from.

    That is the seed of ``seed_everything``, or without one what the first process takes from its own generators:
    whoever has seeded these gets the same run again.

    Args:
        share: broadcasts the first process's object.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is not None:
        return int(seed), int(seed), int(seed)
    return share((random.getrandbits(63), int(np.random.randint(2**62)), torch.initial_seed()))


def seed_generators(from_roots: Roots, data_rank: int) -> None:
    """Seeds Python's, NumPy's and torch's generators (on all devices) by data rank."""
    of_python, of_numpy, of_torch = (mixed(root, data_rank) for root in from_roots)
    random.seed(of_python)
    np.random.seed(of_numpy % 2**32)
    torch.manual_seed(of_torch)


def mixed(*entropy: int) -> int:
    """A seed of 64 bits from several numbers, which are not negative."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def seed_loader(loader: object, from_roots: Roots, data_rank: int) -> None:
    """Seeds a data loader's workers by data rank, and alike everywhere the sampler that data ranks divide.

    Worker functions and generators of the user's own are left alone. Each time that workers start they get other
    numbers, by a base seed that the process draws.
    """
    if not isinstance(loader, DataLoader):
        return
    if loader.worker_init_fn is None:
        loader.worker_init_fn = functools.partial(pl_worker_init_function, rank=data_rank)
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSamplerWrapper | UnrepeatedDistributedSamplerWrapper):
            whole = sampler_inside(sampler)
            if getattr(whole, "generator", 0) is None:
                whole.generator = torch.Generator().manual_seed(from_roots[2] % 2**63)
