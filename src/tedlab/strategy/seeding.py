"""Seeds random numbers: the same on the tensor ranks of a data rank, which share a batch, and different otherwise.

This applies to what the processes draw themselves (dropout masks) and to the workers of their data loaders (noise in a
data set). With sequence parallelism, the tensor ranks draw the same masks for their different positions: the masks are
then correlated, unlike those of one process's heads and layers, but nothing drifts apart.

Whatever selects the samples is drawn alike on all processes, because they divide the samples among them.
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

Roots = tuple[int, int, int]  # for the generators of Python, NumPy and torch


def roots(share: Callable[[Any], Any]) -> Roots:
    """Returns what the generators of all processes are seeded from.

    This is the seed of ``seed_everything``, or without one, numbers from the first process's generators, so that a run
    is reproducible if these were seeded.

    Args:
        share: Broadcasts the first process's object.
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
    """Returns a 64-bit seed mixed from several non-negative numbers."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def seed_loader(loader: object, from_roots: Roots, data_rank: int) -> None:
    """Seeds a data loader's workers by data rank, and on all processes alike the sampler that data ranks divide.

    The user's own worker functions and generators stay as they are. Each time workers start, they draw other numbers,
    because the process draws a new base seed.
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
