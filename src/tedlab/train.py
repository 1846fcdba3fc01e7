"""``python -m tedlab.train``: composes a configuration, checks it, and launches the run."""

from tedlab.cli import UsageError, hydra_entry
from tedlab.config import TrainConfig


def train(config: TrainConfig) -> float:
    """Runs one job and returns the metric that a sweeper minimises."""
    from tedlab.launch import launch, started_outside
    from tedlab.run import run
    from tedlab.validate import check, notes

    degrees = check(config)
    if config.certificate:
        certify_first(config)
    if not started_outside():
        print(*notes(config), f"Starting {degrees}.\nRun directory: {config.output_dir}", sep="\n", flush=True)
    summary = launch(run, config, int(config.trainer["devices"]))
    return float(summary.get(config.objective, float("nan")))


def certify_first(config: TrainConfig) -> None:
    """Certifies the configuration. ``certificate.json`` in the run directory and W&B's configuration keep the verdict.

    Raises:
        UsageError: if it does not equal one process.
    """
    from tedlab.certify.show import certify_visibly
    from tedlab.report import CERTIFICATE

    certificate = certify_visibly(config)
    if not certificate.ok:
        raise UsageError(
            f"The configuration failed its certificate ({config.output_dir}/{CERTIFICATE}); nothing was trained."
        )


main = hydra_entry(train)

if __name__ == "__main__":
    main()
