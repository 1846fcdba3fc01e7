"""tedlab: train Mixture-of-Experts transformers under tensor × expert × data parallelism.

``import tedlab`` registers the Lightning strategy, so that ``Trainer(strategy="ted")`` works.
"""

from tedlab.degrees import ParallelDegrees
from tedlab.strategy import TEDStrategy
from tedlab.topology import Topology

__all__ = ["ParallelDegrees", "TEDStrategy", "Topology"]
