"""What happens between one backward pass and the next: gradient reduction, the sharded and tiled step, schedules."""

from tedlab.optim.finite import FiniteGuard, NonFiniteError
from tedlab.optim.gradients import Gradients
from tedlab.optim.groups import Grouping
from tedlab.optim.kinds import MatrixOptimizer
from tedlab.optim.loss_scale import LossScaler
from tedlab.optim.muon import Muon, matrix_groups
from tedlab.optim.narrow import NarrowAdamW
from tedlab.optim.schedule import learning_rate_schedule, schedule_of, schedules
from tedlab.optim.sharded import ShardedOptimizer

__all__ = [
    "FiniteGuard",
    "Gradients",
    "Grouping",
    "LossScaler",
    "MatrixOptimizer",
    "Muon",
    "NarrowAdamW",
    "NonFiniteError",
    "ShardedOptimizer",
    "learning_rate_schedule",
    "matrix_groups",
    "schedule_of",
    "schedules",
]
