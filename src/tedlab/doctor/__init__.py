"""Tests a machine or an allocation before a job needs it: each check says what it found, and what to do."""

from tedlab.doctor.finding import Finding, Verdict
from tedlab.doctor.machine import examine_machine
from tedlab.doctor.world import examine_world, judge_world

__all__ = ["Finding", "Verdict", "examine_machine", "examine_world", "judge_world"]
