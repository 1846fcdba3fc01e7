"""Each source has its share of any number of samples, and goes on where it was whatever changes around it."""

import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tedlab.callbacks import NamedSets
from tedlab.config import DataConfig, InTrainingConfig, SourceConfig
from tedlab.data.mixture import (
    MixedOrder,
    MixedSampler,
    Mixture,
    Share,
    check_enough,
    check_sources,
    continued,
    shares_of,
    state_of,
)
from tedlab.data.module import TextDataModule
from tedlab.data.position import Position
from tedlab.data.ramp import Ramp, Stage
from tedlab.validate.evaluation import check_sets

WEIGHTS = st.lists(st.floats(0.001, 1), min_size=1, max_size=12).map(lambda w: [x / sum(w) for x in w])


def mixture(weights, sizes=None, most=None):
    sizes, most = sizes or [10_000] * len(weights), most or [None] * len(weights)
    parts = zip(sizes, weights, most, strict=True)
    return Mixture({f"s{n}": Share(size, weight, limit) for n, (size, weight, limit) in enumerate(parts)})


@given(WEIGHTS)
@settings(max_examples=60)
def test_no_source_is_ever_a_whole_sample_from_its_share(weights):
    """Tijdeman's bound, which is below one; taking the source that is furthest behind would break it."""
    blend, counts = mixture(weights), dict.fromkeys(range(len(weights)), 0)
    bound = 1 - 1 / (2 * max(2, len(weights)) - 2)
    for number, (name, read) in enumerate(blend.take(300), start=1):
        assert read == counts[int(name[1:])]  # each source in its own order, without a gap
        counts[int(name[1:])] += 1
        assert max(abs(weights[n] * number - counts[n]) for n in counts) <= bound + 1e-6


def test_the_source_furthest_behind_would_not_do():
    """Why the order is Tijdeman's: with these shares the simpler rule is more than a sample off."""
    weights = np.array([48, 1, 1, 4, 1, 1, 1, 150]) / 207
    simple, furthest = np.zeros(8), 0.0
    for number in range(1, 208):
        simple[np.argmax(weights * number - simple)] += 1
        furthest = max(furthest, np.abs(weights * number - simple).max())
    assert furthest > 1.1


def test_an_exhausted_source_leaves_its_share_to_the_others_in_proportion():
    blend = mixture([0.5, 0.3, 0.2], most=[20, None, None])
    taken = [name for name, _ in blend.take(240)]
    assert taken[:40].count("s0") == 20
    assert "s0" not in taken[41:]
    rest = taken[41:]
    assert abs(rest.count("s1") - 0.6 * len(rest)) <= 1.5
    assert blend.exhausted == {"s0"}


def test_all_sources_exhausted_is_an_error_before_the_run():
    blend = mixture([0.5, 0.5], most=[20, 30])
    check_enough(blend, 50)
    with pytest.raises(ValueError, match=r"takes 51 samples, but the epochs of data\.sources leave 50 .*s0 20, s1 30"):
        check_enough(blend, 51)
    with pytest.raises(ValueError, match="as often as their epochs allow"):
        list(blend.take(51))
    check_enough(mixture([0.5, 0.5], most=[20, None]), 10**9)


def test_workers_that_fetch_ahead_meet_an_end_where_no_whole_step_is_left():
    """Two sources of ten samples, half of which may be read: two steps of four, and a run of two steps is allowed."""
    start = mixture([0.5, 0.5], [10, 10], [5, 5])
    check_enough(start, 8)
    assert len(dealt(start, 4, 2, 2, [0])) == 8
    for most in (5, 11):  # a run without end meets the error, in the epoch that has no step
        with pytest.raises(ValueError, match="as often as their epochs allow"):
            dealt(mixture([0.5, 0.5], [10, 10], [most, most]), 4, 1, 2, [0, 1])


def dealt(start, batch, ranks, micro, epochs, position=None, seed=1):
    """What all ranks together read, in order."""
    total = sum(share.size for share in start.shares.values())
    samplers = []
    for rank in range(ranks):
        sampler = MixedSampler(
            range(total), num_replicas=ranks, rank=rank, batch_size=batch, micro_batch_size=micro, seed=seed
        )
        sampler.order = MixedOrder(start, seed)
        sampler.start_at(position or Position())
        samplers.append(sampler)
    seen = []
    for epoch in epochs:
        for sampler in samplers:
            sampler.set_epoch(epoch)
        ids = [list(sampler) for sampler in samplers]
        chunks = [[tuple(of[i : i + micro]) for i in range(0, len(of), micro)] for of in ids]
        seen += [i for together in zip(*chunks, strict=True) for chunk in together for i in chunk]
    return seen


def test_every_layout_reads_one_order_and_each_source_in_permutations_of_its_own():
    sizes = [13, 40, 7]
    one = dealt(mixture([0.5, 0.2, 0.3], sizes), 12, 1, 12, range(3))
    for ranks, micro in ((1, 1), (2, 3), (3, 2), (4, 3), (6, 2)):
        assert dealt(mixture([0.5, 0.2, 0.3], sizes), 12, ranks, micro, range(3)) == one
    assert (
        dealt(mixture([0.5, 0.2, 0.3], sizes), 5, 1, 5, range(3))[:60] == one[:60]
    )  # another batch size, the same order
    ramp = Ramp([Stage(7, 4, 0), Stage(None, 12, 0)])  # of an epoch's 60 samples 28 in seven steps, then two of twelve
    assert dealt(mixture([0.5, 0.2, 0.3], sizes), ramp, 2, 2, range(2)) == one[: 28 + 24 + 60]
    bounds = np.cumsum([0, *sizes])
    for n, size in enumerate(sizes):
        own = [i - bounds[n] for i in one if bounds[n] <= i < bounds[n + 1]]
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@given(st.integers(0, 40), st.integers(1, 5), st.integers(0, 60), WEIGHTS)
@settings(max_examples=40)
def test_a_mixture_goes_on_from_any_position_as_if_it_had_not_stopped(steps, batch, more, weights):
    sizes = [7 + 3 * n for n in range(len(weights))]
    most = [None, *([9] * (len(weights) - 1))]
    shares = mixture(weights, sizes, most).shares
    order = MixedOrder(Mixture(shares), 5)
    whole = order.indices(0, steps * batch + more).tolist()
    saved = state_of(MixedOrder(Mixture(shares), 5).after(steps * batch))
    resumed, said = continued(shares, saved)
    assert said == []
    assert MixedOrder(resumed, 5).indices(0, more).tolist() == whole[steps * batch :]


@given(st.integers(0, 60), st.integers(1, 60))
@settings(max_examples=40)
def test_in_another_mixture_every_source_goes_on_exactly_where_it_was(before, more):
    shares = mixture([0.2, 0.5, 0.3], [11, 17, 23]).shares
    order = MixedOrder(Mixture(shares), 5)
    first = order.indices(0, before).tolist()
    other = {"s1": Share(17, 0.75), "new": Share(9, 0.05), "s2": Share(23, 0.2)}
    resumed, said = continued(other, state_of(order.after(before)))
    assert said == [
        "data.sources.new is new: it begins with its first sample.",
        "data.sources.s0 is gone: how far it was read is forgotten.",
    ]
    counts = {"s1": 0, "new": 0, "s2": 0}
    for number, (name, _) in enumerate(resumed.copy().take(more), start=1):  # and no source catches up
        counts[name] += 1
        assert all(abs(other[n].weight * number - counts[n]) <= 0.75 + 1e-6 for n in counts)
    second = MixedOrder(resumed, 5).indices(0, more).tolist()
    own = [i - 11 for i in first if 11 <= i < 28] + [i for i in second if i < 17]
    assert own == MixedOrder(Mixture({"s1": Share(17, 1.0)}), 5).indices(0, len(own)).tolist()


def test_a_source_that_holds_something_else_begins_with_a_new_epoch():
    shares = mixture([0.5, 0.5], [10, 10]).shares
    saved = state_of(MixedOrder(Mixture(shares), 0).after(26))
    resumed, said = continued({"s0": Share(10, 0.5), "s1": Share(12, 0.5)}, saved)
    assert said == ["data.sources.s1 has 12 samples, and had 10: it begins with a new epoch."]
    assert (resumed.places["s0"].read, resumed.places["s1"].read) == (13, 24)


def test_a_source_with_other_text_of_as_many_samples_begins_with_a_new_epoch_too():
    shares = {name: replace(share, digest=name) for name, share in mixture([0.5, 0.5], [10, 10]).shares.items()}
    saved = state_of(MixedOrder(Mixture(shares), 0).after(26))
    now = {"s0": replace(shares["s0"], digest=""), "s1": replace(shares["s1"], digest="other")}
    resumed, said = continued(now, saved)
    assert said == ["data.sources.s1 holds other text than it did: it begins with a new epoch."]
    assert (resumed.places["s0"].read, resumed.places["s1"].read) == (13, 20)
    older = {name: {key: value for key, value in of.items() if key != "digest"} for name, of in saved.items()}
    assert continued(now, older)[1] == []


def test_the_order_in_which_sources_are_named_does_not_matter():
    """Also where several are as far behind; their samples lie elsewhere, but are the same."""
    shares = mixture([0.25] * 4, [7, 9, 11, 13], [None, 4, None, 6]).shares
    reversed_shares = dict(reversed(shares.items()))
    assert [*Mixture(shares).take(90)] == [*Mixture(reversed_shares).take(90)]


def test_more_epochs_for_an_exhausted_source_give_it_its_share_again_and_no_more():
    shares = mixture([0.5, 0.5], [10, 100], [10, None]).shares
    saved = state_of(MixedOrder(Mixture(shares), 0).after(60))
    resumed, _ = continued({"s0": Share(10, 0.5, 30), "s1": Share(100, 0.5)}, saved)
    assert [name for name, _ in resumed.take(20)].count("s0") == 10


SOURCES = {"a": SourceConfig(path="a", weight=0.25), "b": SourceConfig(path="b", weight=0.75, epochs=1.5)}
ALONE = {name: SourceConfig(path=source.path) for name, source in SOURCES.items()}


def config(sources=SOURCES, **fields):
    return DataConfig(path=None, batch_size=4, micro_batch_size=2, validation_samples=8, sources=sources, **fields)


def test_shares_by_weights_tokens_and_temperature():
    sizes = {"a": 100, "b": 900}
    assert shares_of(config(), sizes) == {"a": Share(100, 0.25), "b": Share(900, 0.75, 1350)}
    assert [s.weight for s in shares_of(config(ALONE, mixing="tokens"), sizes).values()] == [0.1, 0.9]
    assert [s.weight for s in shares_of(config(ALONE, mixing="temperature"), sizes).values()] == [0.25, 0.75]
    flat = shares_of(config(ALONE, mixing="temperature", temperature=1e9), sizes)
    assert flat["a"].weight == pytest.approx(0.5)
    for empty, said in (({"a": 0, "b": 9}, "a has too little text"), ({"a": 9, "b": 0}, "b has too little text")):
        with pytest.raises(ValueError, match=said):
            shares_of(config(), empty)


def weighted(**weights):
    return {name: SourceConfig(path=name, weight=weight) for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("sources", "fields", "said"),
    [
        (weighted(a=0.5, b=0.4), {}, r"the weights of data\.sources must sum to 1, but 0\.5 \+ 0\.4 = 0\.9"),
        (weighted(a=0.5, b=None), {}, r"data\.sources\.b has no weight; .* data\.mixing=tokens"),
        (weighted(a=1.0), {"mixing": "tokens"}, r"data\.mixing=tokens takes weights from .* but a of data\.sources"),
        (weighted(a=-1.0, b=2.0), {}, r"data\.sources\.a\.weight is -1\.0; it must be positive"),
        (
            {"a": SourceConfig(path="a", weight=1.0, epochs=0.0)},
            {},
            r"data\.sources\.a\.epochs is 0\.0; it must be pos",
        ),
        (weighted(a=1.0), {"training_batches": 2}, r"data\.training_batches=2 repeats the first batches of one source"),
    ],
)
def test_sources_that_cannot_be_mixed_are_refused(sources, fields, said):
    with pytest.raises(ValueError, match=said):
        check_sources(config(sources, **fields))


def test_a_path_beside_sources_is_refused():
    with pytest.raises(ValueError, match=r"data\.path='x' and data\.sources \(a, b\) both say what to train on"):
        check_sources(DataConfig(path="x", batch_size=4, micro_batch_size=2, validation_samples=8, sources=SOURCES))


def test_thirds_sum_to_one():
    check_sources(config(weighted(a=0.333333, b=0.333333, c=0.333334)))
    check_sources(config(weighted(**dict.fromkeys("abcdefghij", 0.1))))


# ---- whole runs in this process --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three sources whose samples begin with a letter and three digits."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, samples in (("a", 20), ("b", 31), ("c", 12)):
        (folder / name).mkdir()
        (folder / name / "train.txt").write_text("".join(f"{name}{i:03d}" for i in range(samples)) + ".")
        (folder / name / "validation.txt").write_text("".join(f"{name}{i:03d}" for i in range(9)) + ".")
    return folder


class Recorder(pl.LightningModule):
    """Learns nothing; writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.validation = [], []

    def training_step(self, batch, _):
        self.seen += [bytes(sample[:4].tolist()).decode() for sample in batch]
        return self.weight.sum()

    def validation_step(self, batch, _):
        self.validation += [bytes(sample[:4].tolist()).decode() for sample in batch]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def module_of(texts, batch=4, micro=2, **sources):
    given = {
        name: SourceConfig(path=str(texts / name), weight=w, epochs=e) for name, (w, e) in (sources or DEFAULT).items()
    }
    data = config(given, validation_fraction=0.4, cache_dir=str(texts / ".cache"))
    data = DataConfig(**{**vars(data), "batch_size": batch, "micro_batch_size": micro})
    return TextDataModule(data, 4, seed=1)


DEFAULT = {"a": (0.5, None), "b": (0.3, None), "c": (0.2, 1.0)}


def fit(data, steps, save=None, ckpt_path=None):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        accumulate_grad_batches=data.data.batch_size // data.data.micro_batch_size,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    recorder = Recorder()
    trainer.fit(recorder, data, ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return recorder


def test_a_run_is_resumed_to_the_sample_with_other_batch_sizes(texts, tmp_path):
    whole = fit(module_of(texts), 30)  # c, of 12 samples, is exhausted on the way
    assert sum(name.startswith("c") for name in whole.seen) == 12
    seen, steps, checkpoint = [], 0, None
    for batch, micro, more in ((4, 2, 3), (2, 1, 4), (6, 3, 9), (4, 4, 7), (1, 1, 6)):
        steps += more
        following = tmp_path / f"{steps}"
        seen += fit(module_of(texts, batch, micro), steps, following, checkpoint).seen
        checkpoint = following
    assert len(seen) == 108
    assert seen == whole.seen[:108]


def test_a_run_goes_on_with_another_mixture_where_each_source_was(texts, tmp_path, capsys):
    first = fit(module_of(texts), 5, tmp_path / "c").seen
    second = fit(module_of(texts, a=(0.1, None), b=(0.9, None)), 12, None, tmp_path / "c").seen
    assert "data.sources.c is gone: how far it was read is forgotten." in capsys.readouterr().out
    alone = fit(module_of(texts, b=(1.0, None)), 20).seen
    of_b = [name for name in first + second if name[0] == "b"]
    assert of_b == alone[: len(of_b)]
    assert [name[0] for name in second].count("b") in (25, 26)  # of 28


def test_validation_is_mixed_too_and_bits_per_byte_weigh_its_sources(texts):
    data = module_of(texts)
    names = [name for name, _ in data._validation_order()]
    assert (names.count("a"), names.count("b"), names.count("c")) == (4, 2, 2)
    assert data.bytes_per_token == pytest.approx(37 / 38)  # of each source; a separator has no bytes
    assert sorted(set(fit(data, 16).validation)) == sorted({f"{n}{i:03d}" for n, i in _first(names)})


def _first(names):
    for name, of in itertools.groupby(sorted(names)):
        yield from ((name, i) for i, _ in enumerate(of))


def test_a_source_is_known_by_its_tokens(texts):
    for folder in ("same", "other"):
        (texts / folder).mkdir(exist_ok=True)
        for file in (texts / "a").iterdir():
            content = file.read_text()
            (texts / folder / file.name).write_text(content if folder == "same" else content.replace("a01", "a10"))
    corpora = module_of(texts, a=(0.5, None), same=(0.2, None), other=(0.3, None)).corpora
    assert corpora["a"].digest == corpora["same"].digest != corpora["other"].digest
    data = module_of(texts, a=(0.5, None), other=(0.5, None))
    data.trainer = SimpleNamespace(global_step=2, max_steps=4, is_global_zero=False)
    assert {name: of["digest"] for name, of in data.state_dict()["sources"].items()} == {
        name: corpora[name].digest for name in ("a", "other")
    }


def test_the_processes_compare_all_sources(texts):
    data = module_of(texts)
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda own: own))
    data.setup("fit")
    data.trainer.strategy.broadcast = lambda own: own[:-1]  # the first process found one source less
    with pytest.raises(ValueError, match=r"different files below data\.sources"):
        data.setup("fit")


def test_a_mixture_with_a_tokenizer_of_its_own_does_not_go_on(texts, tmp_path):
    """A BPE is trained on the sources; with others its ids have other meanings."""

    def module(**sources):
        data = module_of(texts, **sources)
        data.data = replace(data.data, tokenizer="bpe", bpe_vocab_size=300)
        data.trainer = SimpleNamespace(global_step=2, max_steps=4, is_global_zero=False)
        return data

    (texts / "words").mkdir()
    for name in ("train", "validation"):
        (texts / "words" / f"{name}.txt").write_text(f"{name} by words that make other merges " * 9)
    state = module().state_dict()
    module().load_state_dict(state)
    other = module(a=(0.5, None), words=(0.5, None))
    other.load_state_dict({name: value for name, value in state.items() if name != "tokenizer"})  # from before
    with pytest.raises(
        ValueError, match=rf"{state['tokenizer']}, and data\.tokenizer=bpe is .*Use data\.tokenizer=the "
    ):
        other.load_state_dict(state)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.mkdir(parents=True)
    saved = tmp_path / "run" / "tokenizer.json"
    module().tokenizer.save(saved.parent)
    with pytest.raises(ValueError, match=rf"Use data\.tokenizer={re.escape(str(saved))}$"):
        other.refuse_other_tokenizer(state, checkpoint)
    other = module(a=(0.5, None), words=(0.5, None))
    other.data = replace(other.data, tokenizer=str(saved))
    other.load_state_dict(state)


def test_sets_of_texts_are_evaluated_with_the_tokenizer_of_all_sources(texts):
    data, sets = module_of(texts), InTrainingConfig({"held_out": str(texts / "a" / "validation.txt")})
    check_sets(SimpleNamespace(eval=sets, data=data.data), data)
    callback = NamedSets(sets, "text", 2, 4)
    callback.setup(SimpleNamespace(datamodule=data), None, "fit")
    ((_, samples),) = callback._sets
    assert bytes(samples[0].tokens[1:].tolist()) == b"a000"  # after a separator


def test_an_error_names_the_source(texts):
    (texts / "empty").mkdir(exist_ok=True)
    (texts / "empty" / "x.txt").touch()
    with pytest.raises(ValueError, match=r"data\.sources\.empty: path='.*empty' names 1 files, all of them empty"):
        _ = module_of(texts, a=(0.5, None), empty=(0.5, None)).corpora
