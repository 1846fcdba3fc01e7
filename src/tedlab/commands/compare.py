"""``tedlab compare DIR…``: compares runs in tables and in a report with charts."""

from pathlib import Path

from tedlab.commands.application import hydra_entry
from tedlab.commands.literal import quote, quoted
from tedlab.config import CompareConfig
from tedlab.errors import UsageError

_TEXTS = ("by", "out", "wandb", "group", "baseline")
_VALUES = (*_TEXTS, "x", "smoothing")
_FILES = (".html", ".csv", ".tex")
_SWITCHES = ("force", "workspace", "seeds")


def prepare(arguments: list[str]) -> list[str]:
    """Turns directories into ``runs=[…]``, ``--out FILE`` into ``out=FILE`` and ``--force`` into ``force=true``."""
    runs, others = [], []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in _SWITCHES:
            others.append(f"{name}=true")
        elif word.startswith("--") and name in _VALUES:
            others.append(f"{name}={value if equals else next(words, '')}")
        elif word.startswith("-") or ("=" in word and not Path(word).exists()):
            others.append(word)
        else:
            runs.append(quote(word))
    return quoted(others, _TEXTS) + ([f"runs=[{','.join(runs)}]"] if runs else [])


def task(config: CompareConfig) -> None:
    """Reads and compares runs, prints the result and writes the report."""
    if bool(config.runs) == bool(config.wandb):
        raise UsageError("Give run or sweep directories, or wandb=ENTITY/PROJECT group=GROUP")
    if bool(config.wandb) != bool(config.group):
        raise UsageError("wandb=ENTITY/PROJECT and group=GROUP belong together")
    if config.wandb and config.wandb.count("/") != 1:
        raise UsageError(f"wandb={config.wandb}: write it as ENTITY/PROJECT")
    if config.workspace and not config.wandb:
        raise UsageError("workspace=true needs wandb=ENTITY/PROJECT group=GROUP")
    if config.out is not None and Path(config.out).suffix not in _FILES:
        raise UsageError(
            f"out={config.out} must end in .html (a report), .csv (unrounded numbers) or .tex (rounded, for LaTeX)"
        )
    try:
        _compare(config)
    except OSError as error:
        raise UsageError(f"{error}") from None


def _compare(config: CompareConfig) -> None:
    from tedlab.compare.comparison import View, compare
    from tedlab.compare.page import write
    from tedlab.compare.runs import first_of, read_runs
    from tedlab.compare.seeds import averaged
    from tedlab.compare.tables import write_table
    from tedlab.compare.terminal import show
    from tedlab.console import output

    if config.wandb and config.group:
        from tedlab.compare.wandb_runs import read_group

        runs, notes = read_group(config.wandb, config.group, config.force)
    else:
        runs, notes = read_runs([Path(run) for run in config.runs], config.force)
    if config.seeds:
        runs = averaged(runs)
    if config.baseline is not None:
        runs = first_of(runs, config.baseline)
    by = [key.strip() for key in config.by.split(",")] if config.by else []
    comparison = compare(runs, by, notes, config.force, View(config.x, config.smoothing))
    show(comparison)
    if config.out is not None:
        out = Path(config.out)
        said = (
            f"Report: {write(comparison, out)}" if out.suffix == ".html" else f"Table: {write_table(comparison, out)}"
        )
        output().print(said, soft_wrap=True)
    if config.workspace and config.wandb and config.group:
        from tedlab.compare.workspace import save_workspace

        save_workspace(comparison, config.wandb, config.group)


main = hydra_entry(task, "compare", CompareConfig, prepare)
