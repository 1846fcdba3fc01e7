"""A checkpoint of any layout continues under any other as if nothing had happened."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tedlab import TEDStrategy, Topology, checkpoint
from tedlab.config import CheckpointOptions, DataConfig, ModelConfig, MoEConfig, OptimConfig, ShardingOptions
from tedlab.data import TextDataModule
from tedlab.module import LanguageModel
from tests.pool import WorkerPool
from tests.selection import asked_of
from tests.training import Job, Layout, full, loader, trainer
from tests.training import language_model as module_of

LENGTH, BATCH, MICRO_BATCH = 12, 8, 2
SAVED, STEPS = 3, 7  # an epoch is five steps
SOURCE = Layout(4, tensor=2, expert=2)
OTHERS = [Layout(), Layout(2, tensor=2), Layout(4, expert=4), Layout(2, expert=2)]


# ---- whole runs --------------------------------------------------------------------------------------------------


def language_model(**changes: Any) -> LanguageModel:
    shape = {"layers": 2, "hidden": 16, "heads": 4, "ffn": 32, "sequence_length": LENGTH, "vocab_size": 256}
    optim = OptimConfig({"_target_": "torch.optim.AdamW", "eps": 1e-5}, lr=1e-2, warmup_steps=5)
    return LanguageModel(ModelConfig(**(shape | changes), init_std=0.2), MoEConfig(num_experts=4), optim, seed=0)


@dataclass
class Record:
    """The mean loss of each step, and the state on starting and on saving."""

    losses: list[float]
    started: dict[str, Any]
    saved: dict[str, Any]


class Watch(Callback):
    """Collects a :class:`Record`; saves after ``SAVED`` steps."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.losses: list[Tensor] = []
        self.started: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = state(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(trainer.strategy.reduce(outputs["train/loss"]))
        if trainer.global_step == SAVED and not self.saved and self.path:
            trainer.save_checkpoint(self.path)
            self.saved = state(trainer, pl_module)


def state(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Everything that training depends on, tensors whole, by one flat name each."""
    flat: dict[str, Any] = {"steps": trainer.global_step}
    flat |= {f"weight {name}": full(p) for name, p in module.named_parameters()}
    if trainer.global_step == 0:
        return flat  # torch cannot read the state of an optimizer without making one
    stored = trainer.strategy.optimizer_state(trainer.optimizers[0])
    for name, entries in stored["state"].items():
        flat |= {f"{key} {name}": full(value) for key, value in entries.items()}
    for i, group in enumerate(stored["param_groups"]):
        flat |= {f"{key} of group {i}": value for key, value in group.items()}
    schedule = trainer.lr_scheduler_configs[0].scheduler
    flat["schedule"] = schedule.last_epoch, schedule.get_last_lr()
    return flat


def run(layout: Layout, folder: Path, save: bool = False, resume: Path | None = None, **changes: Any) -> Record | None:
    """Trains to ``STEPS`` in all; the first process returns what it saw."""
    watch, module = Watch(folder / str(layout) if save else None), language_model(**changes)
    config = DataConfig(
        path=str(folder / "text"),
        batch_size=BATCH,
        micro_batch_size=MICRO_BATCH,
        validation_samples=BATCH,
        validation_fraction=0.4,
        cache_dir=str(folder / "cache"),
    )
    fit = trainer(
        layout,
        max_steps=STEPS,
        callbacks=[watch],
        accumulate_grad_batches=BATCH // MICRO_BATCH // layout.data,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    fit.fit(module, TextDataModule(config, LENGTH, seed=1), ckpt_path=resume)
    steps = torch.stack(watch.losses).view(-1, BATCH // MICRO_BATCH // layout.data)
    return Record(steps.mean(1).tolist(), watch.started, watch.saved) if fit.global_rank == 0 else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "text").mkdir()
    for name, samples in (("train", 5 * BATCH + 3), ("validation", BATCH + 1)):
        generator = torch.Generator().manual_seed(samples)
        letters = torch.randint(97, 123, (samples * LENGTH,), generator=generator)
        (folder / "text" / f"{name}.txt").write_bytes(bytes(letters.tolist()))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(pool: WorkerPool, folder: Path, request: pytest.FixtureRequest) -> dict[Layout, Record]:
    """Runs of the layouts that tests of this session look at; each leaves a checkpoint in passing."""
    layouts = dict.fromkeys([SOURCE, OTHERS[0], *(cell["before"] for cell in asked_of(request) if "before" in cell)])
    return records(pool, {layout: (layout, folder, True) for layout in layouts})


def records(pool: WorkerPool, runs: Mapping[Any, tuple[Any, ...]]) -> dict[Any, Record]:
    """What ``run`` returns for the arguments given by some key; runs of as many processes share a world."""
    found: dict[Any, Record] = {}
    for size in {layout.world_size for layout, *_ in runs.values()}:
        ours = {key: arguments for key, arguments in runs.items() if arguments[0].world_size == size}
        found |= {key: first for key, (first, *_) in zip(ours, pool.run_each(size, run, [*ours.values()]), strict=True)}
    return found


FOLDED = Layout(4, tensor=2, expert=4, expert_tensor=1), Layout(4, expert=2, expert_tensor=2)
CONTINUED = [
    *((SOURCE, SOURCE), *((SOURCE, other) for other in OTHERS), *((other, SOURCE) for other in OTHERS)),
    *((SOURCE, FOLDED[0]), FOLDED, (FOLDED[1], SOURCE)),
]


QUICK = [(SOURCE, SOURCE), (SOURCE, OTHERS[0]), (OTHERS[0], SOURCE)]
SAMPLE = [(SOURCE, OTHERS[1]), (OTHERS[2], SOURCE), (SOURCE, FOLDED[0]), FOLDED]  # each axis, to one rank or from one


def marked(before: Layout, after: Layout) -> object:
    cell = before, after
    marks = [] if cell in QUICK else [pytest.mark.slow if cell in SAMPLE else pytest.mark.exhaustive]
    return pytest.param(*cell, id=f"{before}-{after}", marks=marks)


@pytest.fixture(scope="module")
def continued(
    pool: WorkerPool, folder: Path, request: pytest.FixtureRequest, uninterrupted: dict[Layout, Record]
) -> dict[tuple[Layout, Layout], Record]:
    cells = [(cell["before"], cell["after"]) for cell in asked_of(request)]
    return records(pool, {(before, after): (after, folder, False, folder / str(before)) for before, after in cells})


@pytest.mark.parametrize(("before", "after"), [marked(*cell) for cell in CONTINUED])
def test_a_run_continues_under_another_layout_as_if_uninterrupted(
    continued: dict[tuple[Layout, Layout], Record],
    uninterrupted: dict[Layout, Record],
    before: Layout,
    after: Layout,
) -> None:
    saved, resumed = uninterrupted[before].saved, continued[before, after]
    assert resumed.started.keys() == saved.keys()
    for name, value in saved.items():
        same = torch.equal if isinstance(value, Tensor) else lambda a, b: a == b
        assert same(resumed.started[name], value), name
    assert len(resumed.losses) == STEPS - SAVED
    assert resumed.losses == pytest.approx(uninterrupted[before].losses[SAVED:], rel=1e-10)


def test_the_saved_state_is_not_trivial(uninterrupted: dict[Layout, Record]) -> None:
    """Otherwise finding it again would prove nothing."""
    source = uninterrupted[SOURCE]
    assert source.saved["steps"] == SAVED
    kinds = {name.split()[0] for name in source.saved}
    assert {"weight", "exp_avg", "exp_avg_sq", "step", "lr", "schedule"} <= kinds
    for name, value in source.saved.items():
        if name.startswith("weight "):
            assert not torch.equal(value, source.started[name]), name
        if name.startswith("exp_avg"):
            assert value.abs().max() > 1e-12, name
        if name.startswith("step "):
            assert value == SAVED
    assert len(set(source.losses)) == STEPS
    assert source.losses == pytest.approx(uninterrupted[OTHERS[0]].losses, rel=1e-10)


def load_into(changes: dict[str, Any], folder: Path, path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(Layout(dist.get_world_size(), tensor=2), folder, False, path, **changes)
    dist.barrier()  # do not leave while others are still connecting
    return f"{caught.type.__name__}: {caught.value}"


OF_ANOTHER_MODEL: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"ffn": 64},
        [
            "6 parameters differ",
            "… and 1 more",
            "blocks.0.feed_forward.up.weight: (32, 16) in the checkpoint, (64, 16)",
        ],
    ),
    ({"layers": 1}, ["parameters differ", "absent in this model"]),
    ({"tie_embeddings": False}, ["1 parameters differ", "output.weight: absent in the checkpoint, (256, 16)"]),
]


def test_a_checkpoint_of_another_model_is_refused_by_parameter(
    pool: WorkerPool, folder: Path, uninterrupted: object
) -> None:
    told = pool.run_each(2, load_into, [(changes, folder, folder / str(SOURCE)) for changes, _ in OF_ANOTHER_MODEL])
    for (_, names), messages in zip(OF_ANOTHER_MODEL, told, strict=True):
        for message in messages:
            assert message.startswith("ValueError")
            assert all(name in message for name in names), message


def test_a_missing_checkpoint_is_refused_with_those_beside_it(
    pool: WorkerPool, folder: Path, uninterrupted: dict[Layout, Record]
) -> None:
    for message in pool.run(2, load_into, {}, folder, folder / "missing"):
        assert message.startswith("FileNotFoundError")
        assert "missing is not a complete checkpoint: it does not exist" in message
        assert all(str(folder / str(layout)) in message for layout in uninterrupted)


class KeepTwo(ModelCheckpoint):
    """As tedlab.run has it, but old checkpoints go."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder, filename="{step}", monitor="step", mode="max", save_top_k=2, save_last="link", every_n_train_steps=1
        )


def lightning_keeps(folder: Path) -> tuple[list[str], int, bool]:
    module, layout = language_model(), Layout(2, tensor=2)
    batches = torch.randint(256, (8, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    fit = trainer(layout, max_steps=4, enable_checkpointing=True, callbacks=[KeepTwo(folder)])
    fit.fit(module, torch.utils.data.DataLoader(batches, batch_size=2))
    fit.strategy.barrier()
    kept = sorted(path.name for path in folder.iterdir())
    meta = checkpoint.read_meta(folder / "last.ckpt")
    restored = {"model": {name: torch.zeros_like(p) for name, p in module.state_dict().items()}}
    checkpoint.load(restored, folder / "last.ckpt")
    same = all(torch.equal(full(restored["model"][name]), full(p)) for name, p in module.state_dict().items())
    return kept, meta["global_step"], same


def test_lightning_s_checkpoint_callback_links_the_last_and_removes_the_old(pool: WorkerPool, tmp_path: Path) -> None:
    answers = pool.run(2, lightning_keeps, tmp_path / "kept")
    assert answers == [(["last.ckpt", "step=3.ckpt", "step=4.ckpt"], 4, True)] * 2


# ---- files -------------------------------------------------------------------------------------------------------


def write(path: Path, value: float) -> None:
    checkpoint.save({"model": {"weight": torch.full((3,), value)}}, {"value": value}, path)


def read(path: Path) -> tuple[float, float]:
    tensors = {"model": {"weight": torch.zeros(3)}}
    meta = checkpoint.read_meta(path)
    checkpoint.load(tensors, path)
    (value,) = set(tensors["model"]["weight"].tolist())
    return value, meta["value"]


@pytest.mark.parametrize("dangling", [False, True])
def test_saving_over_a_link_replaces_the_link_only(single: Topology, tmp_path: Path, dangling: bool) -> None:
    if not dangling:
        write(tmp_path / "step_1", 1)
    (tmp_path / "last").symlink_to("step_1")
    write(tmp_path / "last", 2)
    assert read(tmp_path / "last") == (2, 2)
    assert dangling or read(tmp_path / "step_1") == (1, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["last"] if dangling else ["last", "step_1"])


def test_a_crash_between_the_two_renames_leaves_the_previous_checkpoint(
    single: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "last", 1)
    rename = Path.rename

    def crash(self: Path, target: Path) -> Path:
        if self.name.endswith("partial"):
            raise OSError("crash")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(OSError, match="crash"):
            write(tmp_path / "last", 2)
    assert read(tmp_path / "last") == (1, 1)
    write(tmp_path / "last", 3)
    assert read(tmp_path / "last") == (3, 3)


class Early(Callback):
    """Saves before the first step."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.path:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["train/loss"].item())


def early(path: Path | None, resume: Path | None = None) -> list[float]:
    watch, batches = Early(path), torch.randint(256, (8, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    fit = trainer(Layout(), max_steps=4, callbacks=[watch], accumulate_grad_batches=1)
    fit.fit(language_model(), torch.utils.data.DataLoader(batches, batch_size=2), ckpt_path=resume)
    return watch.losses


def test_saving_before_the_first_step_changes_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    expected, saving, resumed = pool.run_each(1, early, [(None,), (tmp_path / "a",), (None, tmp_path / "a")])
    assert saving == resumed == expected


@dataclass(frozen=True)
class Short:
    """Four steps of one small job; ``save`` writes the state after two of them."""

    precision: str = "64-true"
    optimizer: str = "torch.optim.AdamW"
    asynchronous: bool = False
    noise: bool = False  # random numbers enter the loss


def short(job: Short, layout: Layout, save: Path | None = None, resume: Path | None = None) -> list[float]:
    """Loss of each step from the first or the third on."""

    class Noisy(LanguageModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            outputs = super().training_step(batch, batch_idx)
            factor = 1.0 + torch.rand(()) if job.noise else 1.0
            return {"loss": outputs["loss"] * factor, "train/loss": outputs["train/loss"] * factor}

    class Watch(Callback):
        losses: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            self.losses.append(trainer.strategy.reduce(args[1]["train/loss"]).item())
            if save and trainer.global_step == 2:
                trainer.save_checkpoint(save)

    Watch.losses = []
    shape = ModelConfig(2, 16, 4, 32, LENGTH, vocab_size=256, init_std=0.2)
    optim = OptimConfig({"_target_": job.optimizer}, lr=1e-2, schedule="constant")
    module = Noisy(shape, MoEConfig(num_experts=4), optim, seed=0)
    strategy = TEDStrategy(
        layout.tensor,
        layout.expert,
        sharding=ShardingOptions(tile=300),
        checkpoints=CheckpointOptions(async_save=job.asynchronous),
    )
    fit = trainer(layout, max_steps=4, callbacks=[Watch()], precision=job.precision, strategy=strategy)
    sample = torch.randint(256, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batches = sample.repeat(32, 1)  # all alike: where a plain DataLoader goes on is not the subject
    torch.manual_seed(fit.global_rank // layout.tensor)  # tensor ranks must draw alike
    fit.fit(module, torch.utils.data.DataLoader(batches, batch_size=2), ckpt_path=resume)
    return Watch.losses


def saved_and_resumed(
    pool: WorkerPool, layout: Layout, before: Short, after: Short, path: Path
) -> tuple[list[list[float]], list[list[float]]]:
    """The losses of every process, of a run that writes a checkpoint and of one that reads it; in one world."""
    whole, rest = pool.run_each(layout.world_size, short, [(before, layout, path), (after, layout, None, path)])
    return whole, rest


@pytest.mark.parametrize("precision", ["64-true", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_a_checkpoint_written_in_the_background_is_of_the_step_it_was_asked_for(
    pool: WorkerPool, tmp_path: Path, precision: str
) -> None:
    job = Short(precision, asynchronous=True)
    losses, resumed = saved_and_resumed(pool, SOURCE, job, job, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert resumed == [rank[2:] for rank in losses]


def saved_at_the_end(folder: Path) -> list[bool]:
    write = checkpoint.writer.write

    def slowly(*args: Any) -> None:
        time.sleep(0.3)
        write(*args)

    checkpoint.writer.write = slowly
    batches = torch.utils.data.DataLoader(torch.zeros(4, LENGTH + 1, dtype=torch.long), batch_size=2)

    def fit(*callbacks: Callback) -> Trainer:
        strategy = TEDStrategy(checkpoints=CheckpointOptions(async_save=True))
        fit = trainer(Layout(), max_steps=1, callbacks=list(callbacks), accumulate_grad_batches=1, strategy=strategy)
        fit.fit(language_model(), batches)
        return fit

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.save_checkpoint(folder / "file" / "during")
            seen.append(True)

    seen: list[bool] = []
    (folder / "file").touch()
    finished = fit()
    finished.save_checkpoint(folder / "after")
    seen.append((folder / "after").exists())
    with pytest.raises(OSError, match="after"):
        finished.save_checkpoint(folder / "file" / "after")
    with pytest.raises(OSError, match="during"):
        fit(Saves())
    return seen


def test_the_last_checkpoint_in_the_background_is_written_or_its_failure_is_raised(
    pool: WorkerPool, tmp_path: Path
) -> None:
    assert pool.run(1, saved_at_the_end, tmp_path) == [[True, True]]


def test_random_numbers_go_on_where_they_were(pool: WorkerPool, tmp_path: Path) -> None:
    """Each data rank has its own; in another layout none of the old are drawn again."""
    job = Short(noise=True)
    losses, resumed = saved_and_resumed(pool, SOURCE, job, job, tmp_path / "a")
    assert resumed == [rank[2:] for rank in losses]
    other = pool.run(1, short, job, Layout(), None, tmp_path / "a")[0]
    assert not set(other) & set(losses[0])


@pytest.mark.parametrize(("before", "after"), [("32-true", "bf16-true"), ("bf16-true", "32-true")])
def test_a_run_may_go_on_in_another_precision(pool: WorkerPool, tmp_path: Path, before: str, after: str) -> None:
    (losses, _), (resumed, _) = saved_and_resumed(
        pool, Layout(2, tensor=2), Short(before), Short(after), tmp_path / "a"
    )
    assert resumed == pytest.approx(losses[2:], rel=1e-2)


def resume_fails(job: Short, path: Path) -> str:
    with pytest.raises(ValueError, match="lacks") as caught:
        short(job, Layout(), None, path)
    return str(caught.value)


def test_a_checkpoint_of_another_optimizer_is_refused(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(1, short, Short(optimizer="torch.optim.SGD"), Layout(), tmp_path / "a")
    message = pool.run(1, resume_fails, Short(), tmp_path / "a")[0]
    assert "lacks optimizer_0." in message
    assert "another optimizer" in message


def test_half_precision_weights_without_optimizer_state_are_not_reverted(pool: WorkerPool, tmp_path: Path) -> None:
    """Saved before the first step: the fp32 master copies must come from the loaded weights, not from initial ones."""
    assert pool.run(1, masters_follow, tmp_path / "a") == [True]


def masters_follow(path: Path) -> bool:
    class Save(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(path)

    def fit(seed: int, **options: Any) -> Trainer:
        job = Job(precision="bf16-true", seed=seed, lr=0.0)
        model = module_of(job)
        run = trainer(Layout(), job, max_steps=1, **options)
        run.fit(model, loader(Layout(), job, 0), ckpt_path=path if seed else None)
        return run

    first = fit(0, callbacks=[Save()])
    second = fit(1)  # other initial weights, but it loads the first one's
    ours, theirs = (dict(run.lightning_module.named_parameters()) for run in (second, first))
    return all(torch.equal(full(ours[name]), full(theirs[name])) for name in theirs)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_is_named(single: Topology, tmp_path: Path, damage: str) -> None:
    write(tmp_path / "last", 1)
    (file,) = (tmp_path / "last").glob("*.distcp")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=f"last is damaged: {file.name} (has [0-9,]+ bytes of|is missing)"):
        read(tmp_path / "last")


def fill_the_disk(path: Path) -> list[str]:
    """Saves twice; from the second on, process 1 may write files of 100 bytes at most."""
    import resource
    import signal

    write(path / "first", 1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails as on a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write") as caught:
            checkpoint.save({"model": {str(dist.get_rank()): torch.zeros(1000)}}, {}, path / "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return [str(caught.value), *sorted(p.name for p in path.iterdir())]


def test_a_full_disk_is_reported_by_every_process_and_harms_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    for message, *found in pool.run(2, fill_the_disk, tmp_path):
        assert "process 1 could not write the checkpoint" in message
        assert str(tmp_path / "second") in message
        assert f"intact: {tmp_path / 'first'}" in message
        assert found == ["first", "second.partial"]
    assert read(tmp_path / "first") == (1, 1)


def test_nothing_is_removed_after_a_failed_write_in_the_background(single: Topology, tmp_path: Path) -> None:
    writer = checkpoint.Writer(background=True)
    writer.save({"model": {"weight": torch.ones(3)}}, {"value": 1}, tmp_path / "first")
    (tmp_path / "file").touch()
    writer.save({"model": {"weight": torch.ones(3)}}, {"value": 2}, tmp_path / "file" / "second")
    writer.remove(tmp_path / "first")
    with pytest.raises(OSError, match="second"):
        writer.wait()
    assert read(tmp_path / "first") == (1, 1)
    writer.remove(tmp_path / "first")
    writer.wait()
    assert not (tmp_path / "first").exists()


def test_a_crash_while_removing_leaves_a_link_to_the_newest(
    single: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1.0, 2.0, 3.0):
        write(tmp_path / f"step_{step:.0f}", step)
    (tmp_path / "last").symlink_to("step_1")

    def cut_off(path: Path, ignore_errors: bool) -> None:
        (path / "meta.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.durable.shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.writer.Writer(background=False).remove(tmp_path / "step_1")
    assert read(tmp_path / "last") == read(tmp_path / "step_3")
    assert not (tmp_path / "step_1").exists()  # nor does anything look like it
    write(tmp_path / "step_4", 4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last", "step_2", "step_3", "step_4"]


def test_saving_over_a_checkpoint_replaces_it_and_leaves_nothing_else(single: Topology, tmp_path: Path) -> None:
    for value in (1, 2, 3):
        write(tmp_path / "new" / "last", value)
        assert read(tmp_path / "new" / "last") == (value, value)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["last"]


@pytest.mark.parametrize("where", ["before the shards", "after the shards", "in the middle of meta.pt"])
def test_a_crash_while_saving_leaves_the_previous_checkpoint(
    single: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    write(tmp_path / "last", 1)
    save_shards = dcp.save

    def crash_in_shards(*args: Any, **options: Any) -> None:
        if where == "after the shards":
            save_shards(*args, **options)
        raise OSError("no space left")

    def crash_in_meta(file: Path, content: bytes) -> None:
        file.write_bytes(content[: len(content) // 2])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        if where == "in the middle of meta.pt":
            patch.setattr(checkpoint.durable, "write", crash_in_meta)
        else:
            patch.setattr(dcp, "save", crash_in_shards)
        with pytest.raises(OSError, match="no space left"):
            write(tmp_path / "last", 2)
    assert read(tmp_path / "last") == (1, 1)
    write(tmp_path / "last", 3)
    assert read(tmp_path / "last") == (3, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def crash_everywhere(path: Path) -> tuple[float, float]:
    write(path, 1)
    save, dcp.save = dcp.save, None  # calling it raises
    try:
        with pytest.raises(TypeError):
            write(path, 2)
    finally:
        dcp.save = save
    return read(path)


def test_a_crash_of_all_processes_leaves_the_previous_checkpoint(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(2, crash_everywhere, tmp_path / "last") == [(1, 1), (1, 1)]


@pytest.mark.parametrize("lost", ["meta.pt", ".metadata"])
def test_an_incomplete_checkpoint_is_refused_with_a_complete_one_beside_it(
    single: Topology, tmp_path: Path, lost: str
) -> None:
    write(tmp_path / "whole", 1)
    write(tmp_path / "broken", 2)
    (tmp_path / "broken" / lost).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"broken is not a complete checkpoint: it lacks meta.pt or .metadata"
    ) as caught:
        read(tmp_path / "broken")
    assert str(tmp_path / "whole") in str(caught.value)


def test_state_that_a_callback_sharded_before_axes_were_renamed_still_has_a_mesh(single: Topology) -> None:
    """The last axis of the experts' mesh was called ``tensor``."""
    note = {"tedlab_sharded_tensor": "average/up", "shape": [4, 3, 2], "dtype": "torch.float64"}
    old = {"axes": ["expert_data", "expert", "tensor"], "shards": {"expert": 0, "tensor": 2}}
    tensor = checkpoint.attach({"average": {"up": note | old}}, single.mesh_of)["average/up"]
    assert tensor.device_mesh is single.expert
    assert [getattr(placement, "dim", None) for placement in tensor.placements] == [None, 0, 2]
    dense = checkpoint.attach({"up": note | old | {"axes": ["data", "tensor"]}}, single.mesh_of)
    assert dense["average/up"].device_mesh is single.dense
