"""What a probe cannot do, and what to do about it."""

from __future__ import annotations

__all__ = ["Refused"]


class Refused(Exception):
    """A probe does not run, or not as it was asked to.

    :ivar problem: what is wrong, a sentence
    :ivar remedy: what to do about it
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return self.problem
