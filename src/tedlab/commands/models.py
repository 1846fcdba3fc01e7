"""``tedlab models``: the published models of which there are presets, with their sizes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from tedlab.cli import CONF
from tedlab.commands.arguments import ArgumentParser
from tedlab.console import output
from tedlab.tables import FittingTable

TINY = "_tiny"  # ends the name of a preset's likeness for laptops
_GROUPS = ("model", "moe")


class Size(NamedTuple):
    """Numbers of parameters of a published model.

    Attributes:
        total: All.
        active: Those that one token uses, tables included, which are only top_k experts of each layer.
    """

    total: int
    active: int


# As transformers counts them; stated, because to count them takes the seconds that importing torch takes.
PUBLISHED = {
    "mixtral_8x7b": Size(46_702_792_704, 12_879_925_248),
    "mixtral_8x22b": Size(140_620_634_112, 39_152_031_744),
    "olmoe_1b_7b": Size(6_919_161_856, 1_282_017_280),
    "qwen3_30b_a3b": Size(30_532_122_624, 3_353_032_704),
    "qwen3_235b_a22b": Size(235_093_634_560, 22_190_763_520),
    "deepseek_v2_lite": Size(15_706_484_224, 2_661_150_208),
    "deepseek_v3": Size(671_026_404_352, 37_552_282_624),
    "moonlight_16b": Size(15_960_108_544, 2_914_774_528),
    "gpt_oss_20b": Size(20_914_757_184, 4_187_440_704),
    "gpt_oss_120b": Size(116_829_156_672, 5_711_982_912),
}


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    ArgumentParser(prog="tedlab models", description=__doc__).parse_args(arguments)
    console = output()
    console.print(table())
    console.print(
        f"tedlab train preset=NAME trains one of them, and preset=NAME{TINY} its likeness of a few hundred thousand "
        "parameters, for laptops. plan, simulate and certify take both. See docs/models.md."
    )


def table() -> Table:
    """Returns the presets of published models, one a row."""
    shown = FittingTable(box=None, padding=(0, 1, 0, 0))
    for name in ("preset", "parameters", "active", "layers", "heads", "experts", "wide"):
        words = name in ("preset", "heads", "experts")
        shown.add_column(name, justify="left" if words else "right")
    for name, size in PUBLISHED.items():
        model, moe = (preset(name)[group] for group in _GROUPS)
        numbers = f"{size.total:,}", f"{size.active:,}", str(model.layers)
        shown.add_row(name, *numbers, _heads(model), _experts(moe), f"{moe.get('ffn', model.ffn):,}")
    return shown


def preset(name: str) -> DictConfig:
    """Returns the values of a preset's model and experts, without those that it leaves at their defaults."""
    given = OmegaConf.load(CONF / "preset" / f"{name}.yaml")
    assert isinstance(given, DictConfig)
    parts = [OmegaConf.create({group: {} for group in _GROUPS}), *_defaults(given.pop("defaults"))]
    merged = OmegaConf.merge(*parts, given)
    assert isinstance(merged, DictConfig)
    return merged


def _defaults(entries: Any) -> Iterator[DictConfig]:
    """Yields what each entry of a defaults list stands for: another preset, or a file of a group."""
    for entry in entries:
        if isinstance(entry, str):
            if entry != "_self_":
                yield preset(entry)
            continue
        for group, option in entry.items():
            folder = Path(str(group).removeprefix("override /"))
            yield OmegaConf.create({folder.name: OmegaConf.load(CONF / folder / f"{option}.yaml")})


def _heads(model: DictConfig) -> str:
    """Describes the heads, those of keys if they are fewer, and latent attention."""
    keys = model.get("kv_heads", model.heads)
    latent = " MLA" if OmegaConf.select(model, "attention.latent.kv_rank") else ""
    return f"{model.heads}/{keys}" if keys != model.heads else f"{model.heads}{latent}"


def _experts(moe: DictConfig) -> str:
    """Describes a token's experts, and those that all tokens share."""
    shared = OmegaConf.select(moe, "shared.experts")
    return f"{moe.top_k}/{moe.num_experts}" + (f" + {shared}" if shared else "")


if __name__ == "__main__":
    main()
