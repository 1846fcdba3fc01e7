"""Measures what this machine can do, and writes a cluster file for predictions and a picture of how well it fits."""

from tedlab.predict.calibrate.calibration import calibrate

__all__ = ["calibrate"]
