"""``tedlab calibrate out=FILE.yaml``: measures this machine, for predictions that are about it.

    out=FILE.yaml   the cluster file to write; a picture of the fit goes beside it
    processes=N     that measure at the same time and communicate (1); under torchrun or srun: those that it started
    device=D        cpu or cuda (cuda where there is a GPU)
    quick=true      a rough idea in seconds

Then: ``tedlab simulate cluster=FILE.yaml …``.
"""

import os
import sys
from pathlib import Path

from tedlab.cli import UsageError
from tedlab.launch.launcher import WorkerFailed, launch, leave_if_started_outside
from tedlab.launch.outside import WrongEnvironment, started_outside
from tedlab.predict.calibrate.calibration import CalibrateConfig, calibrate
from tedlab.ranges import LARGEST, Range

_DEVICES = ("cpu", "cuda")


def parse(arguments: list[str]) -> CalibrateConfig:
    """The command line as a configuration.

    Raises:
        UsageError: for an argument that does not exist or a value that cannot be; says what would be valid.
    """
    import torch

    known = {"out": "", "processes": "1", "device": "cuda" if torch.cuda.is_available() else "cpu", "quick": "false"}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in known or not equals:
            raise UsageError(f"{argument}: there is no such argument. Valid: {', '.join(f'{n}=…' for n in known)}")
        known[name] = value
    out = Path(known["out"])
    if out.suffix != ".yaml":
        raise UsageError(f"out={known['out']} is not a path that ends in .yaml: say where to put the cluster file")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"out={out} cannot be written: {above} is not a folder")
    if known["device"] not in _DEVICES:
        raise UsageError(f"device={known['device']} is unknown; valid: {', '.join(_DEVICES)}")
    try:
        most = LARGEST if known["device"] == "cuda" else max(8, 4 * (os.cpu_count() or 1))
        processes = Range(1, most, whole=True).parse("processes", known["processes"])
    except ValueError as error:
        raise UsageError(f"{error}") from None
    if known["device"] == "cuda" and processes > torch.cuda.device_count():
        raise UsageError(
            f"processes={known['processes']}, but torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    if known["quick"] not in ("true", "false"):
        raise UsageError(f"quick={known['quick']} is neither true nor false")
    return CalibrateConfig(out, known["device"], processes, known["quick"] == "true")


def main() -> None:
    """The command."""
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    try:
        config = parse(sys.argv[1:])
        if config.processes == 1 and not started_outside():
            calibrate(config)
        else:
            launch(calibrate, config, config.processes)
    except (UsageError, WorkerFailed, WrongEnvironment) as error:
        sys.exit(f"{error}")
    leave_if_started_outside()
