"""Presets are the published models, to the parameter, and each has a likeness that trains on a laptop."""

import subprocess
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from tedlab.cli import CONF
from tedlab.commands.models import PUBLISHED, TINY, Size, preset, table
from tedlab.config import TrainConfig, with_values
from tedlab.models import GPTSpec
from tedlab.run import build
from tedlab.validate import check_simulated, complete
from tests.certify.runs import composed
from tests.pool import WorkerPool

# From the models' config.json, as published on Hugging Face; what is left out is transformers' default.
DEEPSEEK = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral_8x7b": ("Mixtral", {"num_hidden_layers": 32}),
    "mixtral_8x22b": (
        "Mixtral",
        {
            **{"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48},
            **{"num_key_value_heads": 8, "vocab_size": 32000},
        },
    ),
    "olmoe_1b_7b": ("Olmoe", {"intermediate_size": 1024}),
    "qwen3_30b_a3b": ("Qwen3Moe", {"num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True}),
    "qwen3_235b_a22b": (
        "Qwen3Moe",
        {
            **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64},
            **{"moe_intermediate_size": 1536, "head_dim": 128, "norm_topk_prob": True},
        },
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        {
            **{"hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27, "num_attention_heads": 16},
            **{"num_key_value_heads": 16, "q_lora_rank": None, "moe_intermediate_size": 1408, "n_routed_experts": 64},
            **{"n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "vocab_size": 102400},
            **DEEPSEEK,
        },
    ),
    "deepseek_v3": ("DeepseekV3", {"num_hidden_layers": 61}),
    "moonlight_16b": (
        "DeepseekV3",
        {
            **{"hidden_size": 2048, "intermediate_size": 11264, "num_hidden_layers": 27, "num_attention_heads": 16},
            **{"num_key_value_heads": 16, "q_lora_rank": None, "moe_intermediate_size": 1408, "n_routed_experts": 64},
            **{"n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "vocab_size": 163840},
            **{"n_group": 1, "topk_group": 1, **DEEPSEEK},
        },
    ),
    "gpt_oss_20b": ("GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt_oss_120b": ("GptOss", {}),
}
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")  # names of their number
ALL = [*PUBLISHED, *(f"{name}{TINY}" for name in PUBLISHED)]


def size(parameters: Mapping[str, int], of: int, top_k: int) -> Size:
    """Adds up parameters by name; of experts, of which there are ``of``, only ``top_k`` are active."""
    experts = sum(number for name, number in parameters.items() if ".experts." in name)
    total = sum(parameters.values())
    return Size(total, total - experts * (of - top_k) // of)


def stated(config: TrainConfig) -> Size:
    parameters = {p.name: prod(p.shape) for p in GPTSpec(config.model, config.moe).parameters()}
    return size(parameters, config.moe.num_experts, config.moe.top_k)


@pytest.mark.slow
def test_presets_have_the_parameters_of_transformers_models() -> None:
    """Which it counts without making any."""
    transformers = pytest.importorskip("transformers")
    found = {}
    for name, (family, sizes) in THEIRS.items():
        theirs = getattr(transformers, f"{family}Config")(**sizes)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(theirs)
        own = {key: parameter.numel() for key, parameter in model.named_parameters()}
        experts = next(number for key in EXPERTS if (number := getattr(theirs, key, None)))
        found[name] = size(own, experts, theirs.num_experts_per_tok)
    assert found == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_parameters_that_the_table_states(name: str) -> None:
    assert stated(composed(f"preset={name}")) == PUBLISHED[name]


@pytest.mark.parametrize("name", ALL)
def test_the_table_reads_presets_as_hydra_composes_them(name: str) -> None:
    """All that presets set; a value that they leave out is a default."""
    config, read = composed(f"preset={name}"), preset(name)

    def check(given: Any, made: Any, path: str) -> None:
        if isinstance(given, Mapping):
            for key, value in given.items():
                check(value, getattr(made, str(key)), f"{path}.{key}")
        else:
            assert given == made, path

    check(read.model, config.model, "model")
    check(read.moe, config.moe, "moe")


class Losses(Callback):
    """The losses of a run."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(float(outputs["train/loss"]))


def trained(configs: list[TrainConfig]) -> list[list[float]]:
    """The losses of each run, one after the other in this process."""
    found = []
    for config in configs:
        losses = Losses()
        trainer, module, data = build(complete(config), [losses], logged=False)
        trainer.fit(module, data)
        found.append(losses.found)
    return found


@pytest.mark.slow
def test_the_likenesses_learn(pool: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in ("one", "two"):
        (tmp_path / "text" / name).write_text("the quick brown fox jumps over the lazy dog. " * 200)
    given = [f"data.path={tmp_path / 'text'}", f"data.cache_dir={tmp_path / 'cache'}", "data.validation_samples=16"]
    given += ["data=text", "data.validation_fraction=0.5", "parallel=single", "trainer.max_steps=8"]
    given += ["optim.warmup_steps=2", "checkpoint.every=null", "+trainer.enable_progress_bar=false"]
    configs = [composed(f"preset={name}{TINY}", *given) for name in PUBLISHED]
    configs = [with_values(c, {"output_dir": str(tmp_path / str(n))}) for n, c in enumerate(configs)]
    for name, losses in zip(PUBLISHED, pool.run(1, trained, configs)[0], strict=True):
        assert losses[-1] < losses[0] - 1, (name, losses)


@pytest.mark.parametrize("name", ALL)
def test_a_preset_can_be_trained_with_tensor_and_expert_parallelism(name: str) -> None:
    check_simulated(composed(f"preset={name}", "parallel=tp2_ep2"))


def test_every_preset_of_a_model_is_in_the_table_and_has_a_likeness() -> None:
    files = {file.stem for file in (CONF / "preset").glob("*.yaml")}
    assert files == {*ALL}
    assert [*table().columns[0].cells] == [*PUBLISHED]


def test_the_command_imports_no_torch() -> None:
    """So that it answers in less than a second."""
    check = "import runpy, sys; runpy.run_module('tedlab', run_name='__main__'); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", f"import sys; sys.argv = ['tedlab', 'models']; {check}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "gpt_oss_120b" in shown
