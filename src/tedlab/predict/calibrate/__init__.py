"""What this machine can do, measured: a cluster file for predictions, and a picture of how well it fits."""

from tedlab.predict.calibrate.calibration import calibrate

__all__ = ["calibrate"]
