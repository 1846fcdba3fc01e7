"""Lending experts: a process with more rows than others lets others compute some, and lends them the weights for it.

This is Least-Loaded Expert Parallelism (arXiv 2601.17111). ``plan.py`` decides who computes which rows; it knows
neither devices nor ranks, and every process makes the same plan of the same counts. ``policy.py`` makes the policy that
a configuration names, ``slots.py`` and ``listing.py`` say which row goes where, ``exchange.py`` moves weights and
gradients.
"""

from tedlab.moe.lending.exchange import TAG, Loans, lend, loans_of
from tedlab.moe.lending.listing import by_slot, runs_of
from tedlab.moe.lending.plan import Loan, Plan, even, least_loaded
from tedlab.moe.lending.policy import Policy, policy_of
from tedlab.moe.lending.slots import Slots, slots_of

__all__ = [
    "TAG",
    "Loan",
    "Loans",
    "Plan",
    "Policy",
    "Slots",
    "by_slot",
    "even",
    "least_loaded",
    "lend",
    "loans_of",
    "policy_of",
    "runs_of",
    "slots_of",
]
