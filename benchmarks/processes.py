"""What each process of ``expert_parallel`` runs."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

import benchmarks.skewed  # noqa: F401 (registers its router)
from benchmarks.peer_layers import PEERS
from benchmarks.plain_experts import Decoder
from benchmarks.steps import WARM_UP, Clock, Measured, RandomTokens, composed, train
from benchmarks.train_step import Profile


@dataclass(frozen=True)
class Row:
    """One program in one layout.

    Attributes:
        name: What the table calls it.
        processes: Number of processes.
        overrides: Of tedlab's configuration, which a peer reads as well.
        tensor: How many of them share a sample; experts are divided among the others.
        peer: Whose MoE layer runs between plain attention, see ``peer_layers``; none: tedlab.
        cases: Cases that it can run.
        micro_batches: How many a step has.
        steps: Timed steps.
        profile: How many of the longest kernels of a step are listed; 0: none.
        output_dir: Where each process leaves what it measured.
    """

    name: str
    processes: int
    overrides: tuple[str, ...] = ()
    tensor: int = 1
    peer: str = ""
    cases: str = "ABCDEZ"
    micro_batches: int = 1
    steps: int = 12
    profile: int = 0
    output_dir: str = ""

    def configured(self, case: Sequence[str], samples: int) -> tuple[str, ...]:
        """Returns all overrides: those of a case, with so many samples in a micro-batch, of the layout, and its own."""
        others = self.processes // self.tensor
        layout = [f"parallel.{key}" for key in (f"world_size={self.processes}", f"tensor={self.tensor}")]
        batch = f"data.batch_size={others * samples * self.micro_batches}"
        return (*case, *layout, f"parallel.expert={others}", batch, *self.overrides)


def measure(row: Row) -> dict[str, Any]:
    """Runs in each process; what it measured is left in the row's directory."""
    config = composed(list(row.overrides))
    profile = Profile(row.profile) if row.profile else None
    measured = _peer(row, config) if row.peer else train(config, row.steps, False, *([profile] if profile else []))
    rank, device = os.environ.get("RANK", "0"), torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = measured.summary(config, device) | {"profile": profile.table if profile else ""}
    for name in ("tflops", "mfu"):  # of a GPU, among which the batch is divided
        found[name] = None if found[name] is None else found[name] / row.processes
    Path(row.output_dir, f"{rank}.json").write_text(json.dumps(found))
    return {}


def _peer(row: Row, config: Any) -> Measured:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(int(os.environ["RANK"]))
    with device:
        compiled = config.model.compile != "none"
        model = Decoder(config.model, config.moe, row.processes, compiled, PEERS[row.peer])
    model = model.bfloat16() if cuda else model
    whole = [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
    divided = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    groups = [{"params": group} for group in (whole, divided) if group]  # the fused step takes no mixture
    optimizer = AdamW(groups, lr=config.optim.lr, fused=True)
    clock, batches, loss = Clock(), iter(RandomTokens(config)), torch.zeros(())
    for _ in range(WARM_UP + row.steps):
        ids = next(batches).to(device, non_blocking=True)
        clock.mark("data")
        loss = model(ids)
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("step")
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    measured = clock.measured(row.steps, peak, loss.item())
    dist.destroy_process_group()
    return measured
