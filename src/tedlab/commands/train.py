"""``tedlab train``: composes a configuration, checks it, and launches the run."""

import signal
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from tedlab.commands.application import hydra_entry
from tedlab.config import TrainConfig
from tedlab.errors import UsageError


def train(config: TrainConfig) -> float:
    """Runs one job and returns the metric that a sweeper minimises."""
    from tedlab.commands.continued import keep_command
    from tedlab.degrees import parallel_degrees
    from tedlab.errors import WorkerFailed
    from tedlab.launch import outside
    from tedlab.launch.launcher import launch
    from tedlab.launch.locks import run_directory
    from tedlab.launch.requeue import queue_again
    from tedlab.resume import named_values, resume
    from tedlab.run import run
    from tedlab.validate import complete, notes

    outside.check(config.parallel.world_size)
    started_outside = outside.started_outside()
    if started_outside and outside.restarts():
        config = after_restart(config)
    # A program that calls this has chosen its data, and names nothing else.
    named = named_values(HydraConfig.get()) if HydraConfig.initialized() else {"data.path"}
    config, resumed = resume(without_absent_loggers(config), named)
    composed, config = config, complete(config)
    degrees = parallel_degrees(config.parallel)
    held = not started_outside or outside.first_outside()  # one process holds it for all
    with run_directory(Path(config.output_dir)) if held else nullcontext() as lock:
        if config.certificate:
            certify_first(composed)
        if held and HydraConfig.initialized():
            keep_command(Path(config.output_dir), HydraConfig.get())
        if held:
            show_differences()
            what = f"{'Using' if started_outside else 'Starting'} {degrees}."
            said = [*resumed, *notes(config), what, f"Run directory: {config.output_dir}"]
            print(*said, sep="\n", flush=True)
        try:
            summary = launch(run, config, int(config.trainer["devices"]), lock)
        except (WorkerFailed, SystemExit) as error:
            if not started_outside:  # otherwise the first process has written it
                with suppress(OSError):  # where a disk is full, that is what the error says
                    leave_summary(config, error)
            if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
                queue_again()
            raise
    return float(summary.get(config.objective, float("nan")))


def without_absent_loggers(config: TrainConfig) -> TrainConfig:
    """Returns a copy without what an experiment's file says about a logger that ``logger=…`` leaves out."""
    if config.choices.get("experiment") is None:
        return config
    kept = {name: of for name, of in config.logger.items() if not isinstance(of, dict) or "_target_" in of}
    return replace(config, logger=kept)


def show_differences() -> None:
    """Prints what the command line changes of the presets, if a command line has begun this run."""
    if not HydraConfig.initialized() or not GlobalHydra.instance().is_initialized():
        return
    import hydra

    from tedlab.commands.differences import difference_tree, split
    from tedlab.console import output

    chosen, overrides = HydraConfig.get().runtime.choices, [*HydraConfig.get().overrides.task]
    presets, values = split(overrides, [str(group) for group in chosen])
    if not presets and not values:
        return
    preset = hydra.compose(HydraConfig.get().job.config_name, presets) if values else OmegaConf.create()
    tree = difference_tree(overrides, [str(group) for group in chosen], preset)
    output().print(tree)


def leave_summary(config: TrainConfig, error: BaseException) -> None:
    """Writes ``summary.json`` with the reason why a run did not finish; its first process may have ended abruptly."""
    from tedlab.errors import WorkerFailed
    from tedlab.launch.outcome import FAILED, FINISHED, INTERRUPTED, Outcome, read_summary, write_unfinished

    directory = Path(config.output_dir)
    summary = read_summary(directory)
    if summary and summary.get("state", FINISHED) == FINISHED:
        return  # this run had finished, or an earlier one here that this run has not touched
    if isinstance(error, WorkerFailed):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        outcome = Outcome(FAILED, " ".join(dict.fromkeys([lines[0], lines[-1]])))
    else:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 128
        outcome = Outcome(INTERRUPTED, signal.Signals(code - 128).name if code > 128 else "it was ended")
    write_unfinished(directory, outcome)


def after_restart(config: TrainConfig) -> TrainConfig:
    """Returns a copy with which processes that torchrun has restarted (``--max-restarts``) resume their run.

    They resume from its last checkpoint. Without one, they start as the first processes did.
    """
    from tedlab.checkpoint import read_meta
    from tedlab.launch import outside

    last = Path(config.output_dir, "checkpoints", "last.ckpt")
    if last.exists():
        config = replace(config, ckpt_path=str(last))
        where = f"from {last}, step {read_meta(last)['global_step']}"
    else:
        where = f"from the beginning: {last} does not exist (is hydra.run.dir the same for every start?)"
    if outside.first_outside():
        print(f"Restart {outside.restarts()} by torchrun: the run goes on {where}.", flush=True)
    return config


def certify_first(config: TrainConfig) -> None:
    """Certifies the configuration. ``certificate.json`` in the run directory and W&B's configuration keep the verdict.

    Raises:
        UsageError: If the configuration does not equal one process.
    """
    from tedlab.certify.show import certify_visibly
    from tedlab.report import CERTIFICATE

    certificate = certify_visibly(config)
    if not certificate.ok:
        raise UsageError(
            f"The configuration failed its certificate ({config.output_dir}/{CERTIFICATE}); nothing was trained."
        )


main = hydra_entry(train, "train", TrainConfig)
