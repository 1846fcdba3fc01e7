"""Simulates a step of one rank of any cluster in one process on a CPU: memory, communication, FLOPs and time."""

from tedlab.predict.sim.simulation import Simulation, simulate

__all__ = ["Simulation", "simulate"]
