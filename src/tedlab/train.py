"""``python -m tedlab.train``: composes a configuration, checks it, and launches the run."""

from tedlab.cli import hydra_entry
from tedlab.config import TrainConfig


def train(config: TrainConfig) -> float:
    """Runs one job and returns the metric that a sweeper minimises."""
    from tedlab.launch import launch, started_outside
    from tedlab.run import run
    from tedlab.validate import check

    degrees = check(config)
    if not started_outside():
        print(f"Starting {degrees}.\nRun directory: {config.output_dir}", flush=True)
    summary = launch(run, config, int(config.trainer["devices"]))
    return float(summary.get(config.objective, float("nan")))


main = hydra_entry(train)

if __name__ == "__main__":
    main()
