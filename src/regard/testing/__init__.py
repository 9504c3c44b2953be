"""The contract: checks that every mechanism must pass, public, so that anybody can run them.

for name in regard.testing.checks_for(card):
    regard.testing.run_check(card, name)
"""

from regard.testing.contract import CHECKS, checks_for, run_check
from regard.testing.subject import Subject

__all__ = ["CHECKS", "Subject", "checks_for", "run_check"]
