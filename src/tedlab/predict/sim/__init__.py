"""One rank of any cluster in one process on a CPU: memory, communication, FLOPs and predicted time of a step."""

from tedlab.predict.sim.simulation import Simulation, simulate

__all__ = ["Simulation", "simulate"]
