"""What it costs to see that replicas are equal: the checksum of all parameters that one process holds.

See README.md.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.steps import composed
from benchmarks.surroundings import surroundings
from tedlab.checksum import checksum
from tedlab.predict.volumes import ClosedForm

WARM_UP, ROUNDS = 3, 20


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replica_check", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="of tedlab train: a preset, and changes to it")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    form = ClosedForm(composed(arguments.overrides))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [parameter.elements(form.degrees) for parameter in form.spec.parameters()]
    parameters = [torch.rand(size, device=device, dtype=form.parameter) for size in sizes]
    seconds = []
    for _ in range(WARM_UP + ROUNDS):
        began = time.perf_counter()
        checksum(parameters, device).item()
        seconds.append(time.perf_counter() - began)
    took, moved = statistics.median(seconds[WARM_UP:]), sum(sizes) * form.parameter.itemsize
    facts = surroundings(device)
    print(
        f"{len(sizes)} parameters, {sum(sizes):,} elements of {form.parameter} on {facts['device']}: "
        f"{took * 1e3:.2f} ms, {moved / took / 1e9:.1f} GB/s"
    )
    if arguments.out is not None:
        measured = {"parameters": len(sizes), "elements": sum(sizes), "seconds": took}
        arguments.out.write_text(json.dumps(facts | measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
