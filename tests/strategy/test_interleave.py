"""Backward passes beside the next micro-batch's forward pass change no bit of what is trained, and hide exchanges."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from tedlab import TEDStrategy
from tedlab.comm import Collective, Ledger
from tedlab.comm.ledger import differences
from tedlab.config import ShardingOptions, TrainConfig
from tedlab.models import GPT
from tedlab.moe import MoELayer
from tests.comm.test_ledger import MICRO_BATCH, MODES, SEQUENCE, VOCABULARY, configuration
from tests.pool import WorkerPool
from tests.selection import asked_of
from tests.training import silent_trainer

Overrides = dict[str, Any]
LAYOUT = (4, 2, 2)
CAC: Overrides = {"comm.cac": True}
NOISY: Overrides = {"moe.router.noise": "gumbel", "moe.router.jitter": 0.1}
COMPILED: Overrides = {"model.compile": "aot_eager", "model.recompute.granularity": "none"}
CASES: dict[str, Overrides] = {  # model.recompute.granularity is block unless stated
    "stored": {"model.recompute.granularity": "none"},
    "recomputed": {**NOISY, "micro_batches": 3, "dropout": 0.3},
    "dtd_cac": {**MODES["dtd"], **CAC, **NOISY, "overlap": True},
    "sequence_shared": {
        **{**MODES["shared_weighted_sequence"], "comm.overlap_shared": True, "comm.chunks": 2},
        **{"model.recompute.early_stop": False},
    },
    "dropless_hash": {**MODES["dropless_dtd"], "moe.gating": "hash", "comm.chunks": 2, "micro_batches": 3},
    "dropless_mixed": {**MODES["dropless_plain"], **NOISY, "trainer.precision": "bf16-mixed"},
    "pilots": {**MODES["dedup_fused"], "comm.cac": "shard"},
    "lent": {**MODES["lent"], "model.recompute.granularity": "none", "moe.every": 1},
    "pair": {**MODES["pos2_sequence"], "comm.cac": ["dispatch.all_to_all"]},
    "compiled_rows": {**MODES["dropless_plain"], **NOISY, **COMPILED, "micro_batches": 3},
    "compiled_shared": {**MODES["shared_weighted"], **NOISY, **COMPILED, "comm.overlap_shared": True},
    "validated": {"dropout": 0.3, "validated": True},  # after each micro-batch
}


QUICK = ("stored", "recomputed", "validated")
SELDOM = ("compiled_shared", "lent", "pilots", "dropless_mixed", "pair")  # what each has, others have


def marked(name: str) -> object:
    marks = [] if name in QUICK else [pytest.mark.exhaustive if name in SELDOM else pytest.mark.slow]
    return pytest.param(name, marks=marks)


CELLS = [marked(name) for name in CASES]


class Language(LightningModule):
    """A model, and what can be seen of its training."""

    fails: str | None = None
    dropout = 0.0  # of what experts return, behind their exchange

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.results: list[Tensor] = []
        self.heard: list[str] = []
        self.issued: list[tuple[str, str]] = []  # the kind of group, and the call
        self.waiting: list[bool] = []  # in each validation, whether a backward pass is still to come
        self.register_buffer("seen", torch.zeros(()))  # other values in each process, until they are shared
        self.ledger = Ledger()
        self.kept: list[weakref.ref[Tensor]] = []
        self.alive: list[list[bool]] = []

    def configure_model(self) -> None:
        self.topology = self.trainer.strategy.topology
        self.model = GPT(self.config.model, self.config.moe, self.topology, 0)
        for layer in self.model.modules():
            if self.dropout and isinstance(layer, MoELayer):
                layer.register_forward_hook(lambda _, __, result: (self.dropped(result[0]), *result[1:]))

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def on_train_start(self) -> None:
        comm = self.topology.comm
        comm.register_hook(self.ledger)
        comm.register_hook(self.hear)

    def hear(self, call: Collective, event: str) -> None:
        self.heard.append(f"{event} {call.tag} ({call.phase})")
        if event == "start" and call.tag != "experts.lend":  # which are lent is another matter in each process
            self.issued.append((call.kind, str(call)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.alive.append([ref() is not None for ref in self.kept])
        self.heard.append(f"forward {batch_idx}")
        loss, reports = self.model.loss(batch[:, :-1], batch[:, 1:])
        self.results.append(loss.detach())
        self.seen += batch.sum()
        if self.fails == "forward" and batch_idx == 1:
            raise ArithmeticError("forward")
        kept = loss.exp()  # keeps its result for the backward pass
        self.kept.append(weakref.ref(kept))
        total: Tensor = kept.log() + sum(r.balance_loss + r.z_loss for r in reports)
        if self.fails == "backward" and batch_idx == 0:
            loss.register_hook(fail)
        return total

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        strategy = self.trainer.strategy
        assert isinstance(strategy, TEDStrategy)
        self.waiting.append(strategy._deferred is not None)
        self.results += [self.model.loss(batch[:, :-1], batch[:, 1:])[0].detach(), self.seen.clone()]

    def on_before_backward(self, loss: Tensor) -> None:
        self.heard.append("before backward")

    def on_after_backward(self) -> None:
        self.heard.append("after backward")

    reads_grad = False

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.trainer.fit_loop._should_accumulate():
            own = (p for _, p in sorted(self.named_parameters()))
            self.results += [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in own]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def fail(gradient: Tensor) -> None:
    raise ArithmeticError("backward")


def trained(overrides: Overrides, interleave: bool, fails: str | None = None, **options: Any) -> Language:
    """Two steps, in the layout's number of processes."""
    layout = options.pop("layout", LAYOUT)
    micro_batches = overrides.get("micro_batches", 2)
    config = configuration(layout, {**overrides, "comm.interleave": interleave})
    module = Language(config)
    module.fails, module.dropout = fails, overrides.get("dropout", 0.0)
    strategy = TEDStrategy(
        *layout[1:],
        comm=config.comm,
        sharding=ShardingOptions(overlap=overrides.get("overlap", False)),
        sequence_parallel=config.parallel.sequence,
    )
    trainer = silent_trainer(
        **{"strategy": strategy, "devices": layout[0], "accumulate_grad_batches": micro_batches, "max_steps": 2},
        **{"num_sanity_val_steps": 0, "limit_val_batches": 1, "val_check_interval": 1, **options},
        **{"precision": config.trainer["precision"], "use_distributed_sampler": False, "gradient_clip_val": 0.5},
    )
    torch.manual_seed(0)  # of which routers' noise is a function
    draw = torch.Generator().manual_seed(trainer.global_rank // layout[1])
    size = (MICRO_BATCH, SEQUENCE + 1)
    data = [torch.randint(VOCABULARY, size, generator=draw) for _ in range(2 * micro_batches)]
    loader = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader if overrides.get("validated") else None)
    assert strategy._deferred is None
    return module


def compared(cases: Sequence[str], **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in cases:
        off, on = (trained(CASES[name], interleave, **options) for interleave in (False, True))
        wrong = []
        if len(on.results) != len(off.results) or not all(map(torch.equal, on.results, off.results)):
            wrong.append("other results than without")
        if differences(on.ledger.totals, off.ledger.totals):
            wrong.append("another ledger than without")
        if on.topology.recomputation.flips:
            wrong.append("a second pass saw another micro-batch")
        found[name] = {"wrong": wrong, "heard": on.heard, "off": off.heard, "alive": on.alive, "was": off.alive}
        found[name] |= {"issued": on.issued, "groups": dict(on.topology.comm.ranks), "waiting": on.waiting}
        found[name]["left"] = [ref() is not None for ref in on.kept]
    return found


def quick() -> dict[str, Any]:
    found = compared(QUICK)
    for fails in ("forward", "backward"):
        try:
            trained(CASES["stored"], True, fails)
        except ArithmeticError as error:
            found[fails] = str(error)
    return found


@pytest.fixture(scope="module")
def found(pool: WorkerPool) -> list[dict[str, Any]]:
    return pool.run(LAYOUT[0], quick)


@pytest.fixture(scope="module")
def asked(pool: WorkerPool, request: pytest.FixtureRequest, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all cases that this session asks for, in as few worlds as there are kinds of tests."""
    more = sorted({cell["name"] for cell in asked_of(request)} & CASES.keys() - set(QUICK))
    others = pool.run(LAYOUT[0], compared, more, timeout=240) if more else [{}] * LAYOUT[0]
    return [own | other for own, other in zip(found, others, strict=True)]


@pytest.mark.parametrize("name", CELLS)
def test_results_and_bytes_are_those_of_one_pass_after_the_other_bit_for_bit(
    asked: list[dict[str, Any]], name: str
) -> None:
    for rank in asked:
        assert rank[name]["wrong"] == []


@pytest.mark.parametrize("name", CELLS)
def test_all_processes_issue_their_exchanges_in_the_same_order(asked: list[dict[str, Any]], name: str) -> None:
    check_order(asked, name)
    assert {"data", "expert", "tensor"} <= {kind for kind, _ in asked[0][name]["issued"]}


def check_order(ranks: Sequence[dict[str, Any]], name: str) -> None:
    """All processes of a group, that is, and all kinds of collectives."""
    for rank in ranks:
        for kind, group in rank[name]["groups"].items():
            orders = [[call for of, call in ranks[member][name]["issued"] if of == kind] for member in group]
            assert all(order == orders[0] for order in orders)


def test_one_pass_computes_while_the_other_exchanges(found: list[dict[str, Any]]) -> None:
    """The layers before the first experts are those of the micro-batch after."""
    check_beside(found[0]["stored"]["heard"])


@pytest.mark.slow
def test_so_it_does_between_what_is_compiled(asked: list[dict[str, Any]]) -> None:
    check_beside(asked[0]["compiled_rows"]["heard"])


def check_beside(heard: list[str]) -> None:
    first = heard.index("forward 1")
    lines = [line for line in heard[first : heard.index("after backward")] if "all_to_all" in line]
    there, back = "dispatch.all_to_all", "combine.all_to_all"
    assert lines == [
        *(f"start {there} (forward)", f"start {back} (backward)"),
        *(f"end {there} (forward)", f"start {back} (forward)"),
        *(f"end {back} (backward)", f"start {there} (backward)"),
        *(f"end {back} (forward)", f"end {there} (backward)"),
    ]


def test_no_backward_pass_waits_through_a_validation(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["validated"]["waiting"] == [False] * 4


def test_hooks_run_in_the_order_that_is_documented(found: list[dict[str, Any]]) -> None:
    hooks = [line for line in found[0]["stored"]["heard"] if line.split()[0] in ("forward", "before", "after")]
    step = ["forward 0", "before backward", "forward 1", "after backward", "before backward", "after backward"]
    assert hooks[: len(step)] == step


def test_what_a_micro_batch_keeps_lives_until_the_next_and_no_longer(found: list[dict[str, Any]]) -> None:
    alive, was = (found[0]["recomputed"][name] for name in ("alive", "was"))
    assert alive[:4] == [[], [True], [False, True], [False, False, False]]
    assert not any(was[1] + was[2])
    assert not any(found[0]["recomputed"]["left"])


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_an_exception_in_either_pass_ends_the_step_with_it(found: list[dict[str, Any]], which: str) -> None:
    for rank in found:
        assert rank[which] == which
