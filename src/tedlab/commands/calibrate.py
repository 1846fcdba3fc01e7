"""``tedlab calibrate out=FILE.yaml``: measures this machine, so that predictions can describe it."""

import os
from dataclasses import replace
from pathlib import Path

from tedlab.commands.application import hydra_entry
from tedlab.commands.literal import quoted
from tedlab.config import CalibrateConfig
from tedlab.errors import UsageError
from tedlab.ranges import LARGEST, Range

_DEVICES = ("cpu", "cuda")


def checked(config: CalibrateConfig) -> CalibrateConfig:
    """Checks a configuration and returns a copy with its device.

    Raises:
        UsageError: If a value is invalid; the message says what would be valid.
    """
    import torch

    from tedlab.predict.calibrate.calibration import default_device

    device = config.device or default_device()
    out = Path(config.out)
    if out.suffix != ".yaml":
        raise UsageError(f"out={out} is not a path that ends in .yaml: say where to put the cluster file")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"out={out} cannot be written: {above} is not a folder")
    if device not in _DEVICES:
        raise UsageError(f"device={device} is unknown; valid: {', '.join(_DEVICES)}")
    try:
        most = LARGEST if device == "cuda" else max(8, 4 * (os.cpu_count() or 1))
        Range(1, most, whole=True).check("processes", config.processes)
    except ValueError as error:
        raise UsageError(f"{error}") from None
    if device == "cuda" and config.processes > torch.cuda.device_count():
        raise UsageError(f"processes={config.processes}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return replace(config, device=device)


def task(config: CalibrateConfig) -> None:
    """Measures in ``config.processes`` processes."""
    from tedlab.launch.launcher import launch
    from tedlab.launch.outside import started_outside
    from tedlab.predict.calibrate.calibration import calibrate

    config = checked(config)
    if config.processes == 1 and not started_outside():
        calibrate(config)
    else:
        launch(calibrate, config, config.processes)


main = hydra_entry(task, "calibrate", CalibrateConfig, lambda arguments: quoted(arguments, ("out",)))
