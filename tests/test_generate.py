"""``tedlab generate``: errors of one line before anything is loaded; text that can be had again."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from tedlab.checkpoint.contents import consolidate
from tedlab.commands.generate import main, prepare, unescaped
from tedlab.config import GenerateConfig, ModelConfig, MoEConfig, RecomputeConfig, SharedConfig
from tedlab.degrees import ParallelDegrees
from tedlab.generate import Continued, _check_memory, generate
from tedlab.models import GPTSpec
from tedlab.moe import routers
from tedlab.opened import model_of
from tests import oracle
from tests.commands import run_command
from tests.pool import WorkerPool
from tests.test_conf import compose
from tests.training import Job, Layout, language_model, loader, trainer

PROMPT = "the start "


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["run=nowhere/at/all"], ["nowhere/at/all", "not a run directory", "config.yaml"]),
        (["run={empty}"], ["not a run directory", "config.yaml"]),
        (["runs=x"], ["runs", "Did you mean 'run'?"]),
        (["prompt=x"], ["run"]),
        (["run={empty}", "tokens=many"], ["tokens", "many"]),
        (["run={empty}", "temperature=hot"], ["temperature", "hot"]),
        (["some_directory"], ["some_directory", "key=value"]),
        (["run={empty}", "tokens=-1"], ["tokens", "-1"]),
        (["run={empty}", "temperature=-1"], ["temperature", "-1"]),
        (["run={empty}", "parallel=tp2"], ["'parallel'", "temperature"]),
    ],
    ids=lambda value: " ".join(value[-1:]),
)
def test_bad_arguments_end_in_a_short_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], fragments: list[str]
) -> None:
    code = run_command(main, *(argument.format(empty=tmp_path) for argument in arguments))
    assert code  # a message, which Python prints to stderr, or 1
    message = f"{code}" if isinstance(code, str) else capfd.readouterr().err
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert len(message.strip().splitlines()) <= 7, message
    assert list(tmp_path.iterdir()) == []


PROMPTS = ["def ", " a, b = c[0]  # it's {x}\n", "${seed} \\${seed} \\", '"quoted"', "'quoted'", "100", "null", ""]


@pytest.mark.parametrize("text", PROMPTS)
def test_a_prompt_arrives_as_it_was_typed(text: str) -> None:
    assert compose(*prepare([f"prompt={text}", "run=here", "tokens=3"]), name="generate") == GenerateConfig(
        run="here", prompt=text, tokens=3
    )


def test_a_router_that_sees_the_future_writes_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("data: {}\n")
    trained = ModelConfig(2, 8, 2, 16, 8, vocab_size=512), MoEConfig(num_experts=4, gating="expert_choice")
    monkeypatch.setattr("tedlab.opened.model_of", lambda path: trained)
    with pytest.raises(ValueError, match=r"moe\.gating=expert_choice, which chooses for a token by more than"):
        generate(GenerateConfig(run=str(tmp_path)))


# ---- a trained model ------------------------------------------------------------------------------------------------


CAPACITY = MoEConfig(num_experts=4, capacity_factor=0.5)
PAIRS = MoEConfig(num_experts=4, dispatch="dropless", shared=SharedConfig(1, combine="cg1"), shortcut="pos2")


def save_run(layout: Layout, directory: str, moe: MoEConfig) -> dict[str, Any]:
    """Two steps of training in every process of the layout, and the checkpoint where a run leaves it."""
    job = Job(steps=2, moe=moe)
    module = language_model(job)
    fit = trainer(layout, max_steps=job.steps, accumulate_grad_batches=job.micro_batches // layout.data)
    fit.fit(module, loader(layout, job, fit.global_rank))
    fit.save_checkpoint(Path(directory, "checkpoints", "last.ckpt"))
    return {"model": job.model, "moe": job.moe}


def continue_text(config: GenerateConfig) -> list[str]:
    """The texts, as the pieces say the first of them as well; or what the command would print in their place."""
    pieces: list[str] = []
    try:
        texts = generate(config, show=pieces.append)
    except (FileNotFoundError, ValueError) as error:
        return [f"{error}"]
    assert "".join(pieces) == texts[0]
    return texts


@pytest.fixture(scope="module")
def run_directory(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of four processes leaves."""
    return finished(pool, tmp_path_factory.mktemp("run"), CAPACITY)


LETTERS = "abcdefghijklmnopqrstuvwxyz ,.!?"


def finished(pool: WorkerPool, directory: Path, moe: MoEConfig) -> Path:
    """What a run of four processes leaves. The model knows 64 tokens, so its tokenizer has letters only."""
    from hydra.core.hydra_config import HydraConfig
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from tedlab.report import resolved_yaml

    parts = pool.run(4, save_run, Layout(4, tensor=2, expert=2), str(directory), moe)[0]
    model: ModelConfig = parts["model"]
    config = compose("logger=none")
    HydraConfig.instance().cfg = None
    config = replace(config, model=model, moe=parts["moe"], data=replace(config.data, path=None))
    (directory / "config.yaml").write_text(resolved_yaml(config))
    letters = ["<|endoftext|>", *LETTERS]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_a_model_of_the_last_release_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"layers": 2, "hidden": 8, "heads": 2, "ffn": 16, "sequence_length": 8, "vocab_size": 64}
    stored = {"hyper_parameters": {"model": {**model, "checkpoint": "block"}, "moe": {"num_experts": 4}}}
    monkeypatch.setattr("tedlab.checkpoint.read_meta", lambda path: stored)
    shape, _ = model_of(Path("unused"))
    assert shape == ModelConfig(**model, recompute=RecomputeConfig("block"))


def text(pool: WorkerPool, run: Path, **options: Any) -> str:
    config = GenerateConfig(run=str(run), **{"prompt": PROMPT, "tokens": 20, **options})
    return pool.run(1, continue_text, config)[0][0]


def test_greedy_text_can_be_had_again_and_keeps_the_prompt(pool: WorkerPool, run_directory: Path) -> None:
    first = text(pool, run_directory, temperature=0, seed=1)
    assert first == text(pool, run_directory, temperature=0, seed=2)
    assert first.startswith(PROMPT)
    assert len(first) > len(PROMPT)


WRITTEN = {
    "pos2": PAIRS,
    "dgmoe": replace(PAIRS, shared=SharedConfig(), shortcut="dgmoe"),
    "slices": replace(CAPACITY, slice="tokens", capacity_groups=2),  # positions of a text divide into no groups
}


@pytest.mark.parametrize(
    "moe", [pytest.param(moe, id=name, marks=[pytest.mark.slow] * (name != "pos2")) for name, moe in WRITTEN.items()]
)
def test_a_model_writes_what_plain_torch_does(pool: WorkerPool, tmp_path: Path, moe: MoEConfig) -> None:
    run = finished(pool, tmp_path / "run", moe)
    consolidate(run / "checkpoints" / "last.ckpt", tmp_path / "whole.safetensors")
    weights = {name: weight.double() for name, weight in load_file(tmp_path / "whole.safetensors").items()}
    ids = [1 + LETTERS.index(letter) for letter in "hello"]
    for _ in range(6):
        given = torch.tensor([ids[-Job().model.sequence_length :]])
        values = oracle.logits(weights, given, Job().model, replace(moe, capacity_factor=None), [])
        ids.append(int(values[0, -1, : 1 + len(LETTERS)].argmax()))
    expected = "".join(["", *LETTERS][number] for number in ids)
    assert text(pool, run, prompt="hello", tokens=6, temperature=0) == expected


def test_sampled_text_depends_on_the_seed_alone(pool: WorkerPool, run_directory: Path) -> None:
    first = text(pool, run_directory, temperature=1.5, seed=1)
    assert first == text(pool, run_directory, temperature=1.5, seed=1)
    assert first != text(pool, run_directory, temperature=1.5, seed=2)
    assert first.startswith(PROMPT)


def test_a_longer_continuation_begins_with_the_shorter_one(pool: WorkerPool, run_directory: Path) -> None:
    """Also beyond the model's sequence length."""
    short = text(pool, run_directory, temperature=0, tokens=5)
    assert text(pool, run_directory, temperature=0, tokens=25).startswith(short)


def test_no_tokens_and_no_prompt(pool: WorkerPool, run_directory: Path) -> None:
    assert text(pool, run_directory, tokens=0) == PROMPT
    assert text(pool, run_directory, prompt="", tokens=10, temperature=0) != ""


def test_a_missing_checkpoint_is_told_with_those_that_exist(pool: WorkerPool, run_directory: Path) -> None:
    message = text(pool, run_directory, checkpoint="step_7.ckpt")
    assert "step_7.ckpt is not a complete checkpoint" in message
    assert "last.ckpt" in message


def test_prompts_of_a_file_are_continued_as_if_each_were_alone(
    pool: WorkerPool, run_directory: Path, tmp_path: Path
) -> None:
    prompts = ["the start ", "a", "of it all"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    options = {"run": str(run_directory), "tokens": 7, "temperature": 0.0}
    together = pool.run(1, continue_text, GenerateConfig(prompts=str(tmp_path / "prompts.txt"), **options))[0]
    assert together == [text(pool, run_directory, prompt=prompt, tokens=7, temperature=0) for prompt in prompts]


LAYOUTS = [
    {"processes": 2, "tensor": 2},
    {"processes": 4, "tensor": 2, "expert": 2},
    {"processes": 2, "tensor": 2, "expert": 2, "expert_tensor": 1},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_writes_the_same(
    pool: WorkerPool, run_directory: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    (tmp_path / "prompts.txt").write_text("the start \na\nof it")
    options = {"run": str(run_directory), "prompts": str(tmp_path / "prompts.txt"), "tokens": 9, "temperature": 0.0}
    (one,) = pool.run(1, continue_text, GenerateConfig(**options))
    for rank in pool.run(layout["processes"], continue_text, GenerateConfig(**options, **layout)):
        assert rank == one


@pytest.mark.slow
def test_the_command_launches_the_processes_of_a_layout(pool: WorkerPool, run_directory: Path) -> None:
    command = [sys.executable, "-m", "tedlab", "generate", f"run={run_directory}", f"prompt={PROMPT}", "tokens=8"]
    command += ["temperature=0", "processes=2", "tensor=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, text(pool, run_directory, tokens=8, temperature=0) + "\n"), done.stderr


def test_what_is_computed_again_is_the_same_text(pool: WorkerPool, run_directory: Path) -> None:
    options = {"temperature": 1.1, "top_k": 12, "top_p": 0.9}
    assert text(pool, run_directory, **options) == text(pool, run_directory, cache=False, **options)


def test_a_stop_ends_a_text_and_is_no_part_of_it(pool: WorkerPool, run_directory: Path) -> None:
    whole = text(pool, run_directory, temperature=0)
    stop = whole[len(PROMPT) + 3 : len(PROMPT) + 5]
    stopped = text(pool, run_directory, temperature=0, stop=["not in it, surely", stop])
    assert stopped == PROMPT + whole[len(PROMPT) :].split(stop)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "longer than positions"}, "prompt 0 has 21 tokens; the model has room for 1 to 12"),
        ({"prompts": "nowhere.txt", "prompt": ""}, "No such file or directory: 'nowhere.txt'"),
        ({"prompts": "nowhere.txt"}, "both prompt and prompts=nowhere.txt are given: use one of the two"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"stop": ["x", ""]}, "stop has an empty text"),
        ({"processes": 3, "tensor": 3}, "model.heads (4) is not divisible by parallel.tensor (3)"),
        ({"processes": 2, "tensor": 4}, "4 does not divide the world size 2"),
        ({"device": "tpu"}, "device=tpu is unknown; valid: cpu, cuda"),
        ({"device": "cuda"}, "device=cuda needs a GPU for each process, but torch sees 0 here; use device=cpu"),
    ],
    ids=str,
)
def test_what_cannot_be_continued_is_told(
    pool: WorkerPool, run_directory: Path, options: dict[str, Any], message: str
) -> None:
    assert message in text(pool, run_directory, **options)


def test_nothing_is_shown_that_a_stop_takes_back() -> None:
    """The tokens are bytes, of which a stop's last character has two."""

    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode("utf-8", "replace")

    text, added = Continued(cast(Any, Bytes()), [*b"> "], ["né"]), [*"on né pas".encode()]
    shown = [text.known() for step in range(len(added)) if not text.ends(added[: step + 1])]
    assert shown == ["> o", "> o", "> on ", "> on ", "> on "]
    assert (text.ends(added), text.text) == (True, "> on ")


def test_a_shell_can_write_line_feeds_in_a_stop() -> None:
    given = compose(*prepare(["run=here", r"stop=[\n\n,a\tb]"]), name="generate").stop
    assert [unescaped(text) for text in given] == ["\n\n", "a\tb"]


@pytest.mark.parametrize(("gating", "known"), [("random", False), ("round_robin", False), ("hash", True)])
def test_routers_that_look_at_a_tokens_place_in_a_batch_write_no_text(gating: str, known: bool) -> None:
    assert ("generate" in routers[gating].supports) is known


def test_texts_for_which_there_is_no_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of 131,072 tokens in 64 blocks of 8,192 features are 512 GiB in fp32."""
    model = ModelConfig(64, 8192, 64, 1, sequence_length=131_072, vocab_size=64)
    monkeypatch.setattr("tedlab.generate.available_memory", lambda: 2.0**40)
    spec, prompts = GPTSpec(model, MoEConfig(4)), [[1]] * 5
    given = GenerateConfig(run="", tokens=10**9), spec, ParallelDegrees(1), prompts[:2], "cpu"
    _check_memory(*given)
    message = "5 texts of up to 131072 tokens needs 1536.0 GiB more .*: 2 texts would fit, or use cache=false"
    with pytest.raises(ValueError, match=message):
        _check_memory(*given[:3], prompts, "cpu")
    _check_memory(given[0], spec, ParallelDegrees(4, tensor=4), prompts, "cpu")  # a quarter each, of a quarter
