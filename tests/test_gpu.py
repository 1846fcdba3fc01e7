"""Layouts on GPUs, whose processes share one over gloo or have one each over NCCL; the router's products; documents;
streams, events and pinned memory."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks import steps
from benchmarks.steps import train
from benchmarks.train_step import Profile
from tedlab import ParallelDegrees, Topology, decode
from tedlab.certify import Row, certify
from tedlab.certify.compare import first_difference
from tedlab.comm import Collective, Ledger, raw
from tedlab.comm.raw import _FUNCTIONAL, _IN_PLACE, way_of
from tedlab.comm.reading import start
from tedlab.config import ModelConfig, MoEConfig, TrainConfig, with_values
from tedlab.errors import WorkerFailed
from tedlab.launch.launcher import launch
from tedlab.models import GPT
from tedlab.moe.precise import PreciseLinear
from tedlab.nn import Reading, documents_of
from tedlab.nn.attend import attend
from tedlab.run import build, run
from tedlab.sampling import Sampling
from tedlab.validate import complete
from tests.certify.runs import Case, certified, composed, in_pool
from tests.certify.test_matrix import Layout, overrides
from tests.comm.test_raw import results
from tests.models.test_documents import EXPERTS, ROTARY, SEPARATOR, batch, gradients, model
from tests.pool import WorkerPool
from tests.selection import asked_of
from tests.strategy.test_interleave import check_beside, check_order, compared
from tests.test_train import assert_close, write_words

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHARED = ["trainer=gpu", "comm.backend=gloo"]  # by all processes of a layout
LAYOUTS = {"T2": (2, 2, 1), "E2": (2, 1, 2), "T2_E2": (4, 2, 2)}
JOBS = {"capacity": "ted", "dropless": "dropless_ted"}  # with DTD, CAC and recomputation
OVER_NCCL: dict[Layout, dict[str, str]] = {  # the precisions of jobs; with several GPUs, one for each process
    (2, 2, 1): {
        **{"ted": "64-true", "dropless_ted": "bf16-true", "overlapped_ted": "bf16-true"},
        **{"rows_in_chunks_ted": "64-true", "micro_batches_beside_each_other_ted": "64-true"},
    },
    (2, 1, 2): {
        **{"dropless_top2": "bf16-true", "pilots": "64-true", "gathered": "64-true", "rows_in_chunks": "64-true"},
        **{"micro_batches_beside_each_other": "bf16-true"},
    },
    (4, 2, 2): {
        **{"overlapped_ted": "64-true", "dropless_ted": "bf16-true", "pilots_ted_fused": "64-true"},
        **{"gathered_ted_fused": "64-true", "rows_in_chunks_ted": "64-true", "lent_ted": "64-true"},
        "micro_batches_beside_each_other_ted": "bf16-true",
    },
    (4, 1, 4): {
        **{"gathered": "64-true", "pilots": "bf16-true", "node_pilots": "64-true", "lent": "bf16-true"},
        "rows_in_chunks": "64-true",
    },
    (4, 4, 1): {"overlapped_ted": "64-true", "dropless_ted": "64-true", "shared_in_slices": "bf16-true"},
    (4, 4, 4, 1): {
        **{"dropless_ted": "64-true", "pilots_ted_fused": "64-true", "gathered_ted_fused": "64-true"},
        "sliced_dropless_shared": "bf16-true",
    },
    (4, 2, 4, 1): {"overlapped_ted": "64-true", "gathered_ted_fused": "64-true", "node_pilots_sliced": "bf16-true"},
    (8, 2, 4): {
        **{"overlapped_ted": "64-true", "gathered_ted_fused": "64-true", "lent_ted": "64-true"},
        "micro_batches_beside_each_other_ted": "bf16-true",
    },
    (8, 1, 8): {"gathered": "64-true", "pilots": "bf16-true", "lent": "64-true"},
    (8, 4, 8, 1): {
        **{"dropless_ted": "64-true", "gathered_ted_fused": "64-true", "sliced_dropless_shared": "bf16-true"}
    },
}
CELLS = [(layout, job, precision) for layout, jobs in OVER_NCCL.items() for job, precision in jobs.items()]
CONTINUED = ("gathered", "lent_ted", "node_pilots_sliced")  # in their own layout, to the last bit

SMALL = [
    *("model.hidden=32", "model.ffn=64", "model.sequence_length=16", "data=text", "data.batch_size=4"),
    *("data.micro_batch_size=2", "data.validation_samples=4", "data.validation_fraction=0.2"),
]


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_on_one_gpu_equals_one_process(
    pool: WorkerPool, layout: tuple[int, int, int], job: str, precision: str
) -> None:
    config = composed(*overrides(layout, job), *SHARED, f"certificate_precision={precision}", "optim.overlap=true")
    again = ["in this layout"] if (layout, job) == (LAYOUTS["T2_E2"], JOBS["dropless"]) else []
    found = certify(config, in_pool(pool), continuations=again)
    assert found.accelerator == "gpu"
    assert found.ok, str(found.culprit)


@pytest.fixture(scope="module")
def gpu_each() -> WorkerPool:
    """A server of worker processes, of which each has a GPU to itself."""
    return WorkerPool("nccl")


def case(layout: Layout, job: str, precision: str, trainer: str = "gpu") -> Case:
    """The certificate of a cell."""
    given = *overrides(layout, job), f"trainer={trainer}", f"certificate_precision={precision}", "optim.overlap=true"
    return Case(given, continuations=("in this layout",) if job in CONTINUED else ())


@pytest.fixture(scope="module")
def rows_over_nccl(
    gpu_each: WorkerPool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Layout], dict[Case, list[Row]]]:
    """Of all cells of a layout that this session runs, in worlds that they share."""
    cells = asked_of(request)

    @cache
    def rows(layout: Layout) -> dict[Case, list[Row]]:
        cases = [case(**cell) for cell in cells if cell["layout"] == layout]
        return certified(gpu_each, tmp_path_factory.mktemp("over_nccl"), cases)

    return rows


@pytest.mark.parametrize(("layout", "job", "precision"), CELLS, ids=lambda value: str(value).replace(", ", "_"))
def test_a_layout_with_a_gpu_for_each_process_equals_one_process(
    rows_over_nccl: Callable[[Layout], dict[Case, list[Row]]], layout: Layout, job: str, precision: str
) -> None:
    if torch.cuda.device_count() < layout[0]:
        pytest.skip(f"needs {layout[0]} GPUs")
    rows = rows_over_nccl(layout)[case(layout, job, precision)]
    print(f"largest error {max(row.error for row in rows):.1e}")
    assert [str(row) for row in rows if not row.ok] == []


def exchange_that_is_not_awaited(patch: pytest.MonkeyPatch) -> None:
    """The device goes on with what has not arrived yet, as the second process joins late. Counts are awaited."""
    right, kept = raw._InPlace.all_to_all, []

    def wrong(self: Any, x: Tensor, received: Any, sent: Any, group: dist.ProcessGroup) -> raw.Wait:
        if not x.is_floating_point():
            return right(self, x, received, sent, group)
        if group.rank() == 1:
            time.sleep(0.02)
        out = x.new_zeros(len(x) if received is None else sum(received), *x.shape[1:])
        kept.append((out, dist.all_to_all_single(out, x.contiguous(), received, sent, group, async_op=True)))
        return out.clone

    patch.setattr(raw._InPlace, "all_to_all", wrong)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("job", ["top2_none_dropped_overlapped", "rows_in_chunks"])
def test_over_nccl_a_result_that_is_used_before_it_has_arrived_is_noticed(
    gpu_each: WorkerPool, tmp_path: Path, job: str
) -> None:
    right = case((2, 1, 2), job, "64-true")
    wrong = replace(right, plant=exchange_that_is_not_awaited)
    rows = certified(gpu_each, tmp_path, [right, wrong])
    assert [str(row) for row in rows[right] if not row.ok] == []
    found = first_difference(rows[wrong])
    assert found is not None
    assert found.quantity == "outputs"


def profiled(config: TrainConfig) -> dict[str, Any]:
    profile = Profile(1000)
    train(config, 2, False, profile)
    return {"table": profile.table}


def test_no_step_copies_from_memory_for_which_the_host_would_wait(tmp_path: Path) -> None:
    """Copies from pageable memory hold the host up until the device has done all before them."""
    job = ["trainer=gpu", "trainer.precision=bf16-true", "parallel=single", "model.vocab_size=256"]
    config = steps.composed([*job, "model.layers=2", "moe.dispatch=dropless", "optim.tile=fused"])
    table = launch(profiled, replace(config, output_dir=str(tmp_path)), 1)["table"]
    assert "Memcpy HtoD (Pinned" in table
    assert "Memcpy HtoD (Pageable" not in table


BESIDE = ("stored", "recomputed", "compiled_rows")


def micro_batches_beside_each_other(config: TrainConfig) -> dict[str, Any]:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)  # else sums by atomics differ from run to run
    found = compared(BESIDE, layout=(2, 1, 2), accelerator=config.trainer["accelerator"])
    ranks: list[Any] = [None] * 2
    dist.all_gather_object(ranks, found)
    return {"ranks": ranks}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_over_nccl_one_pass_computes_while_the_other_exchanges_and_changes_no_bit(tmp_path: Path) -> None:
    ranks = launch(micro_batches_beside_each_other, composed("trainer=gpu", f"output_dir={tmp_path}"), 2)["ranks"]
    for rank in ranks:
        assert [rank[name]["wrong"] for name in BESIDE] == [[]] * len(BESIDE)
        for name in ("stored", "compiled_rows"):
            check_beside(rank[name]["heard"])
    for name in BESIDE:
        check_order(ranks, name)


class Exchanges(Callback):
    """Counts the all-to-alls of the last step and of the whole run, as hooks hear them."""

    def __init__(self) -> None:
        self.heard = self.of_step = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            trainer.strategy.topology.comm.register_hook(self._hear)  # type: ignore[attr-defined]
        self.of_step = 0

    def _hear(self, collective: Collective, event: str) -> None:
        if collective.op == "all_to_all" and event == "start":
            self.heard += 1
            self.of_step += 1


def compiled_and_not(config: TrainConfig) -> dict[str, Any]:
    """Trains each: exchanges of the last step and of the run that hooks hear, those that NCCL makes, and weights."""
    found: dict[str, Any] = {}
    weights: dict[str, list[Tensor]] = {}
    for compiled in ("none", "inductor"):
        exchanges = Exchanges()
        with torch.profiler.profile() as profile:
            trainer, module, data = build(with_values(config, {"model.compile": compiled}), [exchanges], logged=False)
            trainer.fit(module, data)
        weights[compiled] = [p.full_tensor() for p in module.parameters() if isinstance(p, DTensor)]
        seen = sum("ncclDevKernel_SendRecv" in event.name for event in profile.events() or ())
        found[compiled] = exchanges.of_step, exchanges.heard, seen
    differences = [(ours - theirs).abs().max().item() for ours, theirs in zip(*weights.values(), strict=True)]
    return found | {"compared": len(differences), "difference": max(differences)}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_over_nccl_compiled_blocks_exchange_slots_as_often_as_the_ledger_hears(tmp_path: Path) -> None:
    write_words(tmp_path / "text.txt", 0)
    config = composed(
        *("trainer=gpu", "trainer.precision=64-true", "trainer.max_steps=2", "parallel=ep2", *SMALL),
        *("model.layers=4", "moe.every=2", "optim.lr=0.1", f"data.path={tmp_path}/text.txt"),
        *(f"data.cache_dir={tmp_path}/cache", f"output_dir={tmp_path}/run"),
    )
    found = launch(compiled_and_not, complete(config), 2)
    for in_step, heard, seen in (found["none"], found["inductor"]):
        assert in_step == 8, found  # of two MoE layers, there and back in both passes
        assert seen == heard >= 16, found
    assert found["compared"] > 20, found
    assert found["difference"] < 1e-12, found


class Stops(Callback):
    """The second process is stopped before its third step, and so never comes to the next collective."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGSTOP)


def stopped(config: TrainConfig) -> dict[str, Any]:
    trainer, module, data = build(config, [Stops()], logged=False)
    trainer.fit(module, data)
    return {}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["tp2", "dp2"])
def test_over_nccl_a_process_that_stops_ends_the_run_in_time_and_is_named(tmp_path: Path, parallel: str) -> None:
    write_words(tmp_path / "text.txt", 0)
    config = composed(
        *("trainer=gpu", f"parallel={parallel}", "comm.timeout_s=15", *SMALL, f"data.path={tmp_path}/text.txt"),
        *(f"data.cache_dir={tmp_path}/cache", f"output_dir={tmp_path}/run"),
    )
    config = complete(config)
    began = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"process 1: no sign of life for \d+ s") as caught:
        launch(stopped, config, 2)
    print(f"{time.monotonic() - began:.1f} s\n{caught.value}")
    assert time.monotonic() - began < 15 + 30 + 20  # and the start


# ---- layers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single_gpu() -> Iterator[Topology]:
    """A world of this process alone, on a GPU."""
    yield Topology.single("cuda")
    dist.destroy_process_group()


def scattered(*sizes: int) -> Tensor:
    return torch.randn(sizes, device="cuda", dtype=torch.bfloat16)


def test_the_router_multiplies_in_fp32_what_is_in_bf16() -> None:
    x, weight = scattered(4096, 256).requires_grad_(), scattered(16, 256).requires_grad_()
    grad = torch.randn(4096, 16, device="cuda")
    logits = PreciseLinear.apply(x, weight)
    precise = x.double() @ weight.double().mT
    torch.testing.assert_close(logits.double(), precise, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(logits, (x, weight), grad)
    for own, best in zip(ours, torch.autograd.grad(precise, (x, weight), grad.double()), strict=True):
        assert (own == best).float().mean() > 0.99  # rounded once: were the gradient in bf16, about half would be


# ---- generation -----------------------------------------------------------------------------------------------------


OLMOE: dict[str, Any] = {"positions": "rotary", "norm": "rms", "bias": False, "activation": "swiglu", "qk_norm": "full"}


@pytest.mark.parametrize("lengths", [(9,), (5, 9, 1)], ids=["one text", "three"])
def test_a_recorded_step_computes_what_its_kernels_do_one_by_one(
    single_gpu: Topology, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is made once, and replayed for all tokens but the prompt's, each of which changes the logits."""
    config = ModelConfig(2, 64, 4, 64, sequence_length=64, vocab_size=128, init_std=0.3, **OLMOE)
    experts = MoEConfig(num_experts=8, top_k=2, dispatch="dropless", capacity_factor=None)
    network = GPT(config, experts, single_gpu, seed=0).eval().to(torch.bfloat16)
    prompts = [list(range(1, 1 + length)) for length in lengths]
    made: list[Any] = []

    def logits(recording: Any) -> list[Tensor]:
        texts = [list(prompt) for prompt in prompts]
        steps, found = decode._Steps(network, texts, 9, 40, torch.device("cuda"), recording), []
        with torch.inference_mode():
            for step in range(20):
                found.append(steps.remembered().clone())
                for number, text in enumerate(texts):
                    text.append((7 * step + number) % 128)
        return found

    recorded, launched = logits(decode._cuda_graph), logits(lambda compute: compute)
    torch.testing.assert_close(recorded, launched, rtol=1e-2, atol=1e-2)
    assert not torch.equal(recorded[1], recorded[2])
    cuda_graph = decode._cuda_graph
    monkeypatch.setattr(decode, "_cuda_graph", lambda compute: made.append(compute) or cuda_graph(compute))
    written = list(decode.continuations(network, prompts, 20, Sampling(0)))
    assert len(written) == 20
    assert len(made) == 1


# ---- documents ------------------------------------------------------------------------------------------------------


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float32, 5e-3)], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_compiled_flex_attention_of_documents_is_attention_with_a_mask(
    window: int | None, sinks: bool, dtype: torch.dtype, bound: float
) -> None:
    """Results and gradients of three batches, which differ in their documents; with fp32 it may round to TF32."""
    for seed in range(3):
        draw = torch.Generator("cuda").manual_seed(seed)
        ids = torch.randint(40, (2, 300), device="cuda", generator=draw)  # a separator in forty tokens
        shapes = [(2, heads, 300, 32) for heads in (4, 2, 2)]
        inputs = [torch.randn(shape, device="cuda", dtype=dtype, generator=draw).requires_grad_() for shape in shapes]
        logits = torch.randn(4, device="cuda", dtype=dtype, generator=draw).requires_grad_() if sinks else None
        inputs += [] if logits is None else [logits]
        upstream = torch.randn(2, 4, 300, 32, device="cuda", generator=draw)
        results = []
        for flex, precise in ((True, False), (False, True)):
            q, k, v, *rest = [x.double() if precise else x for x in inputs]
            documents = documents_of(ids, 0, [window], flex)
            y = attend(q, k, v, window, rest[0] if rest else None, documents=documents)
            results.append([y, *torch.autograd.grad(y, inputs, upstream.to(y.dtype))])
        errors = [relative(ours, best) for ours, best in zip(*results, strict=True)]
        print(f"largest error {max(errors):.1e}")
        assert max(errors) < bound, errors


@pytest.mark.parametrize("compiled", ["none", "inductor"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.bfloat16, 0.05)], ids=str)
def test_masked_documents_train_as_apart_on_a_gpu(
    single_gpu: Topology, dtype: torch.dtype, bound: float, compiled: str
) -> None:
    """In bf16 without experts: a token that rounding sends to another would be a difference, too."""
    shape = replace(ROTARY, hidden=64, kv_heads=2)
    experts = EXPERTS if dtype == torch.float64 else MoEConfig(num_experts=0)
    together, apart = (model(replace(shape, compile=of), single_gpu, experts, dtype) for of in (compiled, "none"))
    together.separator = SEPARATOR
    samples = batch()[:2].cuda()  # which have no padding
    for rows in (samples, samples.flip(0)):  # other documents at the same places
        together.zero_grad()
        ids, targets, _ = Reading(SEPARATOR, masked=True, padded=True).of(rows)
        loss, _ = together.loss(ids, targets)
        loss.backward()
    parts = []
    for row in samples:
        for document in torch.tensor_split(row[row >= 0].cpu(), (row[row >= 0] == SEPARATOR).nonzero()[:, 0].cpu() + 1):
            if len(document) > 1:
                one, _ = apart.loss(document[None, :-1].cuda(), document[None, 1:].cuda())
                parts.append((one, len(document) - 1))
    (sum(one * n for one, n in parts) / sum(n for _, n in parts)).backward()
    ours, theirs = (torch.cat([g.flatten().double() for g in gradients(of).values()]) for of in (together, apart))
    print(f"error of all gradients {relative(ours, theirs):.1e}")
    assert relative(ours, theirs) < bound


# ---- collectives ----------------------------------------------------------------------------------------------------


def compare_devices(dtype: torch.dtype) -> None:
    torch.cuda.set_device(0)
    assert dist.group.WORLD is not None
    assert way_of(torch.ones(1, device="cuda"), dist.group.WORLD) is _IN_PLACE
    for ours, theirs in zip(results(_IN_PLACE, dtype, "cuda"), results(_FUNCTIONAL, dtype), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_collectives_of_a_gpus_tensors_equal_those_of_a_cpus(pool: WorkerPool, dtype: torch.dtype) -> None:
    pool.run(3, compare_devices, dtype)


def timed_collectives() -> tuple[float, float, float, float]:
    """Seconds by the ledger and by the clock, of calls one after another; then of one with work beside it."""
    torch.cuda.set_device(0)
    comm = Topology(ParallelDegrees(2, tensor=2), "cuda").comm
    x = torch.randn(1 << 23, device="cuda")
    comm.all_reduce(x, "tensor", tag="warm_up", phase="forward")
    ledger = Ledger(timed=True)
    handle = comm.register_hook(ledger)
    took = clocked(lambda: [comm.all_reduce(x, "tensor", tag="t", phase="forward") for _ in range(4)])
    (counted,) = ledger.totals.values()
    assert (counted.calls, counted.payload_bytes) == (4, 4 * 4 << 23)
    handle.remove()
    beside = Ledger(timed=True)
    comm.register_hook(beside)

    def overlapped() -> None:
        pending = comm.start_all_reduce(x, "tensor", tag="t", phase="forward")
        time.sleep(0.2)
        pending.wait()

    took_beside = clocked(overlapped)
    (counted_beside,) = beside.totals.values()
    return counted.seconds, took, counted_beside.seconds, took_beside


def clocked(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def test_the_ledger_times_collectives_by_events_as_the_clock_does(pool: WorkerPool) -> None:
    for seconds, took, beside, took_beside in pool.run(2, timed_collectives):
        print(f"ledger {seconds:.4f} s, clock {took:.4f} s; beside a sleep {beside:.4f}, {took_beside:.4f}")
        assert 0.8 * took < seconds <= 1.01 * took
        assert 0.2 <= beside <= 1.01 * took_beside  # from launch to result, whatever was done in between


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_the_host_reads_numbers_while_the_device_does_what_was_issued_after_them() -> None:
    numbers, matrix = torch.arange(6, device="cuda").view(2, 3), torch.ones(4096, 4096, device="cuda")
    for _ in range(2):  # the first product loads libraries, which waits
        read = start(numbers)
        numbers = numbers + 1
        for _ in range(50):
            matrix = matrix @ matrix
        done = torch.cuda.Event()
        done.record()
        found = read()
        early = not done.query()
    assert found == [[1, 2, 3], [4, 5, 6]]
    assert early
    assert numbers.tolist() == [[2, 3, 4], [5, 6, 7]]


def pinned_batches(folder: str) -> list[tuple[bool, str]]:
    """Whether the host's batches were pinned, and where the module got them."""
    config = composed(
        *("parallel=single", "trainer=gpu", "comm.backend=gloo", "trainer.max_steps=2", *SMALL),
        *(f"data.path={folder}/text.txt", f"data.cache_dir={folder}/cache", f"output_dir={folder}/run"),
    )
    config = complete(config)
    trainer, module, data = build(config, [], logged=False)
    seen: list[tuple[bool, str]] = []

    def before(batch: Tensor, dataloader_idx: int) -> Tensor:
        seen.append((batch.is_pinned(), batch.device.type))
        return batch

    data.on_before_batch_transfer = before  # type: ignore[method-assign]
    trainer.fit(module, data)
    return seen


def test_batches_are_pinned(pool: WorkerPool, tmp_path: Path) -> None:
    write_words(tmp_path / "text.txt", 0)
    (seen,) = pool.run(1, pinned_batches, str(tmp_path))
    assert len(seen) >= 2
    assert set(seen) == {(True, "cpu")}


def trained(folder: Path, *overrides: str) -> dict[str, Any]:
    """Summary of a run in processes of its own."""
    config = composed(
        *("trainer=gpu", "trainer.precision=64-true", "trainer.max_steps=3", *SMALL),
        *("trainer.log_every_n_steps=1", "data.num_workers=1"),
        *(f"data.path={folder}/text.txt", f"data.cache_dir={folder}/cache", f"output_dir={folder}/run", *overrides),
    )
    config = complete(config)
    return launch(run, config, config.parallel.world_size)


def test_a_run_of_four_processes_on_one_gpu_has_the_loss_of_one_with_nccl(tmp_path: Path) -> None:
    write_words(tmp_path / "text.txt", 0)
    one = trained(tmp_path, "parallel=single", "comm.backend=nccl", "moe.dispatch=dropless")
    four = trained(
        *(tmp_path, "parallel=tp2_ep2", "comm=ted", "comm.backend=gloo", "moe.dispatch=dropless"),
        *("model.recompute.granularity=block", "optim.overlap=true", "comm.ledger.time=true"),
    )
    assert_close([four["val/loss"], four["train/loss"]], [one["val/loss"], one["train/loss"]])
    assert four["comm/predicted_difference_bytes"] == four["comm/predicted_difference_calls"] == 0
    seconds = {name: value for name, value in four.items() if name.endswith("/seconds")}
    assert len(seconds) > 5
    assert all(value > 0 for value in seconds.values()), seconds
    assert len(four["memory/peak_bytes_by_rank"]) == 4
