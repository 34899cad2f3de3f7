"""`SyncPolicy`: at which training steps weights are sent."""

from __future__ import annotations

from dataclasses import dataclass

from packedcomm.errors import ArgumentError

__all__ = ["SyncPolicy"]


@dataclass(frozen=True, slots=True)
class SyncPolicy:
    """When a trainer syncs.

    Args:
        every: after every how many steps; 1 is after each.
        initial: whether to sync before the first step, so that serving starts from the trainer's
            weights.
        final: whether to sync after the last step even if its turn hasn't come.

    Raises:
        ArgumentError: `every` isn't an integer >= 1.
    """

    every: int = 1
    initial: bool = True
    final: bool = True

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise ArgumentError(f"SyncPolicy.every must be an integer >= 1, got {self.every!r}")

    def due(self, step: int, *, last: bool = False) -> bool:
        """Whether to sync when `step` steps are done.

        Args:
            step: 0 before the first step.
            last: whether no further step follows.

        Raises:
            ArgumentError: `step` is negative.
        """
        if type(step) is not int or step < 0:
            raise ArgumentError(f"step must be an integer >= 0, got {step!r}")
        if step == 0:
            return self.initial
        return step % self.every == 0 or (last and self.final)
