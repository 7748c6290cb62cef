"""Bounds of a perception that never act: it is then no perception, and nothing else says so."""

import math

from torch import Tensor

from humanline.perception import Perception

STEPS = 20


class IdleBounds:
    """Watches the first :data:`STEPS` optimizer steps of a run.

    Args:
        perception: of the run; one that is no clamp, or has no finite bound, is not watched.
    """

    def __init__(self, perception: Perception):
        self.perception = perception
        bounds = perception.bounds
        self.watching = bounds is not None and any(map(math.isfinite, bounds))
        self.steps, self.clamped, self.tokens = 0, 0, 0

    def saw(self, kept: float | Tensor, tokens: float | Tensor) -> None:
        """So many of a batch's completion tokens kept their gradient: two numbers, which may be on
        a GPU and stay there."""
        if self.watching:
            self.clamped, self.tokens = self.clamped + tokens - kept, self.tokens + tokens

    def stepped(self) -> str | None:
        """To be called after each step: what to warn of, said once."""
        self.steps += 1
        if not self.watching or self.steps < STEPS:
            return None
        self.watching = False
        if float(self.clamped) > 0.01:  # a share times a count has a rounding
            return None
        low, high = self.perception.bounds
        return (
            f"perception has not acted: in the first {STEPS} steps none of {int(self.tokens)} "
            f"tokens had a log-ratio to the reference below {low:g} or above {high:g} nats. "
            "Narrower bounds would act, or a reference that is synced less often"
        )
