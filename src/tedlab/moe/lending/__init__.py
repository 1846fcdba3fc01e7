"""Lending experts: a process with more rows than others lets others compute some, and lends them the weights for it.

This is Least-Loaded Expert Parallelism (arXiv 2601.17111). ``plan.py`` decides who computes which rows. It knows
neither devices nor ranks: every process makes the same plan of the same counts.
"""

from tedlab.moe.lending.plan import Loan, Plan, even, least_loaded

__all__ = ["Loan", "Plan", "even", "least_loaded"]
