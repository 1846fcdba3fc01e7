"""``tedlab certify [overrides]``: proves that a training configuration equals one process, or says where not.

Takes the overrides of ``tedlab train``. Exits with 1 on a mismatch.
"""

import sys

from tedlab.commands.application import hydra_entry
from tedlab.config import TrainConfig


def task(config: TrainConfig) -> float:
    """Certifies one configuration and returns the largest error."""
    from tedlab.certify.show import certify_visibly
    from tedlab.validate import check_simulated

    check_simulated(config)  # it need not fit this machine, since it is shrunk
    certificate = certify_visibly(config)
    if not certificate.ok:
        sys.exit(1)
    return max(row.error for row in certificate.rows)


main = hydra_entry(task, "certify", TrainConfig)
