"""Asks SLURM to queue a job again that it takes the machine from."""

import os
import shutil
import subprocess
import sys
import time

_ENDED_S = 60  # by then SLURM has ended the job


def queue_again() -> None:
    """Queues this job again if SLURM preempts it, and submitit started it; then SLURM ends this process.

    Where a partition gives preempted jobs time to end, SLURM takes one that ends in that time for a failed one.
    Submitit goes on until it is killed, which tedlab does not: processes that wait for each other get the signal, too.
    A job that was cancelled stays so.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or job is None:
        return
    if shutil.which("scontrol") is None:
        print(f"SLURM is not asked to queue job {job} again: there is no scontrol here", file=sys.stderr)
        return
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout
    if "JobState=RUNNING" not in shown:
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"SLURM does not queue job {job} again: {done.stderr.strip()}", file=sys.stderr)
        return
    time.sleep(_ENDED_S)  # what submitit would write of an end would be taken for the result
