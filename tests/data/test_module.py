from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from tedlab.config import DataConfig
from tedlab.data.module import TextDataModule

BATCH, LENGTH = 8, 4
SAMPLES = 6 * BATCH + 3  # an epoch is six steps
STEPS = 20


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file whose training samples all start with another three letters, by which they are told apart."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("".join(f"{i:03d}|" for i in range(SAMPLES)) + ".")
    (folder / "validation.txt").write_text("".join(f"{i:03d}|" for i in range(4 * BATCH + 1)))
    return folder


@pytest.fixture
def data(text):
    def data(micro=2, **fields):
        fields = {"batch_size": BATCH, "validation_samples": 2 * BATCH, "validation_fraction": 0.4, **fields}
        config = DataConfig(path=str(text), micro_batch_size=micro, cache_dir=str(text / ".cache"), **fields)
        return TextDataModule(config, LENGTH, seed=1)

    return data


def _ids(batch):
    return [int(bytes(sample[:3].tolist())) for sample in batch]


class Recorder(pl.LightningModule):
    """Learns nothing; writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.epochs, self.steps, self.validated, self.validation = [], [], [], [], []

    def training_step(self, batch, _):
        assert batch.shape[1:] == (LENGTH + 1,)
        self.epochs.append(self.current_epoch)
        self.seen += _ids(batch)
        return self.weight.sum()

    def on_before_optimizer_step(self, _):
        self.steps.append(len(self.seen))

    def validation_step(self, batch, _):
        self.validation += _ids(batch)

    def on_validation_epoch_end(self):
        self.validated.append(self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Save(pl.Callback):
    """Saves a checkpoint in one of the hooks once ``step`` steps are done."""

    def __init__(self, hook, step, path):
        self.step, self.path = step, path
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def _fit(data, steps=STEPS, callbacks=(), ckpt_path=None, batch=BATCH, **arguments):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        accumulate_grad_batches=batch // data.data.micro_batch_size,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **arguments,
    )
    recorder = Recorder()
    trainer.fit(recorder, data, ckpt_path=ckpt_path)
    return recorder


def test_a_run_goes_through_whole_epochs_in_new_orders_and_validates_on_the_same_samples(data):
    run = _fit(data())
    epochs = [run.seen[start : start + 6 * BATCH] for start in range(0, STEPS * BATCH, 6 * BATCH)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert run.validated == [6, 12, 18]
    assert run.validation == [*range(2 * BATCH)] * 3


def test_a_few_batches_are_read_again_and_again(data):
    run = _fit(data(training_batches=2))
    epochs = [run.seen[start : start + 2 * BATCH] for start in range(0, STEPS * BATCH, 2 * BATCH)]
    assert all(sorted(epoch) == [*range(2 * BATCH)] for epoch in epochs)
    assert sorted(set(_fit(data(training_batches=1000)).seen)) == sorted(set(_fit(data()).seen))


SAVES = [
    *(("on_train_batch_end", at, steps) for at in (4, 6, 9, 12) for steps in (at, STEPS)),
    *(("on_train_epoch_end", at, steps) for at in (6, 12) for steps in (at, STEPS)),
    *(("on_validation_end", at, steps) for at in (6, 12) for steps in (at, STEPS)),
    *(("on_train_end", at, at) for at in (4, 6, 9, 12)),
    *(("on_train_epoch_end", at, at) for at in (4, 9)),  # Lightning ends the epoch of a run that stops
]


@pytest.mark.parametrize(("hook", "at", "steps"), SAVES)
def test_a_run_resumed_from_a_checkpoint_of_any_hook_continues_with_the_next_sample(data, tmp_path, hook, at, steps):
    reference = _fit(data())
    checkpoint = tmp_path / "checkpoint"
    _fit(data(), steps, [Save(hook, at, checkpoint)])
    resumed = _fit(data(), ckpt_path=checkpoint)
    assert resumed.seen == reference.seen[at * BATCH :]
    assert resumed.epochs == reference.epochs[at * BATCH // 2 :]
    assert resumed.steps == [*range(BATCH, len(resumed.seen) + 1, BATCH)]
    assert resumed.validated == [step for step in reference.validated if step > at]


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1), (2, 4)])
@pytest.mark.parametrize("at", [3, 6, 9])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_end"])
def test_a_run_resumed_with_another_micro_batch_size_continues_with_the_next_sample(
    data, tmp_path, before, after, at, hook
):
    checkpoint = tmp_path / "checkpoint"
    _fit(data(before), at, [Save(hook, at, checkpoint)])
    every_five_steps = {"val_check_interval": 5 * BATCH // after, "check_val_every_n_epoch": None}
    resumed = _fit(data(after), ckpt_path=checkpoint, **every_five_steps)
    assert resumed.seen == _fit(data(after)).seen[at * BATCH :]
    assert resumed.steps == [*range(BATCH, len(resumed.seen) + 1, BATCH)]
    assert resumed.validated == [step for step in (5, 10, 15, 20) if step > at]


@pytest.mark.parametrize("at", [4, 6, 9])
def test_a_run_of_so_many_steps_is_resumed_for_so_many_epochs(data, tmp_path, at):
    checkpoint = tmp_path / "checkpoint"
    _fit(data(), at, [Save("on_train_end", at, checkpoint)])
    resumed = _fit(data(), -1, max_epochs=3, ckpt_path=checkpoint)
    assert resumed.seen == _fit(data(), 18).seen[at * BATCH :]
    assert resumed.validated == [step for step in (6, 12, 18) if step > at]


def test_loggers_are_told_the_step_that_follows_the_checkpoint(data, tmp_path):
    for hook in ("on_train_batch_end", "on_train_end"):
        checkpoint = tmp_path / hook
        _fit(data(), 6, [Save(hook, 6, checkpoint)])
        told = []

        class Tell(pl.Callback):
            def on_train_batch_start(self, trainer, *_, told=told):
                told.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

        _fit(data(), 8, [Tell()], ckpt_path=checkpoint)
        assert told == [6, 6, 6, 6, 7, 7, 7, 7]


def test_resuming_within_an_epoch_does_not_warn_of_a_loader_that_cannot_resume(data, tmp_path, recwarn):
    checkpoint = tmp_path / "checkpoint"
    _fit(data(), 3, [Save("on_train_end", 3, checkpoint)])
    _fit(data(), 4, ckpt_path=checkpoint)
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


def test_workers_fetch_the_epoch_that_is_resumed(data, tmp_path):
    # They fetch their first batches before Lightning calls set_epoch.
    checkpoint = tmp_path / "checkpoint"
    reference = _fit(data(), 13)
    _fit(data(num_workers=1), 8, [Save("on_train_end", 8, checkpoint)])
    assert _fit(data(num_workers=1), 13, ckpt_path=checkpoint).seen == reference.seen[8 * BATCH :]


@pytest.mark.parametrize("workers", [0, 1])
def test_paths_of_sockets_are_shortened_for_workers(data, monkeypatch, workers):
    called = []
    monkeypatch.setattr("tedlab.data.module.shorten_paths_of_sockets", lambda: called.append(True))
    _fit(data(num_workers=workers), 1)
    assert bool(called) == bool(workers)


def test_runs_of_other_batch_sizes_read_on_in_the_order_of_the_epoch(data, tmp_path):
    """51 samples. No sample comes twice or is left out, until fewer are left in an epoch than a step takes."""
    orders = [np.random.default_rng([1, epoch]).permutation(SAMPLES).tolist() for epoch in range(4)]
    seen, steps, checkpoint = [], 0, None
    resumed = [(8, 2, 3), (4, 4, 3), (12, 2, 1), (1, 1, 3), (10, 5, 4), (2, 1, 7), (16, 4, 3)]  # batch, micro, steps
    for batch, micro, more in resumed:
        module = data(micro, batch_size=batch)
        steps += more
        following = tmp_path / f"{steps}"
        run = _fit(module, steps, [Save("on_train_end", steps, following)], checkpoint, batch=batch)
        assert run.steps == [*range(batch, more * batch + 1, batch)]
        seen += run.seen
        checkpoint = following
    # The first epoch is read to its last sample; in the second a step of two does not fit any more; in the third there
    # are, after four samples, two steps of sixteen left.
    assert seen == orders[0] + orders[1][:50] + orders[2][: 4 + 32] + orders[3][:16]


def test_another_order_begins_with_an_epoch_of_its_own(data, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    _fit(data(), 3, [Save("on_train_end", 3, checkpoint)])
    other = data()
    other.seed = 2
    with pytest.warns(UserWarning, match="another seed"):
        seen = _fit(other, 5, ckpt_path=checkpoint).seen
    assert seen == np.random.default_rng([2, 1]).permutation(SAMPLES).tolist()[: 2 * BATCH]


def test_a_checkpoint_that_counts_samples_alone_goes_on_after_them(data, tmp_path):
    """As they were saved while a batch size could not change."""
    checkpoint = tmp_path / "checkpoint"
    _fit(data(), 8, [Save("on_train_end", 8, checkpoint)])
    saved = torch.load(checkpoint, weights_only=False)
    saved["TextDataModule"] = {"samples": 8 * BATCH}
    torch.save(saved, checkpoint)
    assert _fit(data(), 10, ckpt_path=checkpoint).seen == _fit(data(), 10).seen[8 * BATCH :]


def test_ranks_of_the_strategy_share_out_every_step(data):
    def batches(ranks, rank, loader):
        module = data()
        module.trainer = SimpleNamespace(
            strategy=SimpleNamespace(
                distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank}, root_device=torch.device("cpu")
            ),
            fit_loop=SimpleNamespace(is_resuming=False),
            global_step=0,
        )
        return [_ids(batch) for batch in getattr(module, loader)()]

    for loader in ("train_dataloader", "val_dataloader"):
        one, two = batches(1, 0, loader), [batches(2, rank, loader) for rank in range(2)]
        assert [batch for together in zip(*two, strict=True) for batch in together] == one


@pytest.mark.parametrize(("asked", "used"), [(BATCH, BATCH), (2 * BATCH + 1, 2 * BATCH), (10 * BATCH, 4 * BATCH)])
def test_validation_takes_whole_batches_of_what_there_is(data, asked, used):
    assert data(validation_samples=asked).validation_samples == used


def test_validation_without_a_whole_batch_is_refused(data):
    with pytest.raises(ValueError, match=r"validation_samples=7 and the validation split holds 33 samples"):
        _ = data(validation_samples=BATCH - 1).validation_samples


def test_nothing_is_opened_before_it_is_needed(data):
    module = data()
    assert module._corpora is None
    module.prepare_data()
    assert module.corpus is module.corpus
