"""What a card's makers say it does, and what is estimated of its memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """SMs, their clock (Hz) and the memory's bytes a second, from the makers' data sheets."""

    name: str
    sms: int
    clock: float
    bandwidth: float

    def issuing(self, instructions: float) -> float:
        """Seconds of so many instructions of a thread."""
        return instructions / (ISSUE * self.sms * self.clock)

    def exponentials(self, number: float) -> float:
        """Seconds of so many."""
        return number / (MUFU * self.sms * self.clock)

    def waiting(self, read: float, in_flight: float) -> float:
        """Seconds until so many bytes have come, of which so many are in flight an SM."""
        return read * LATENCY / (in_flight * self.sms)


CARDS = {
    "sm_90": Card("H100 SXM", 132, 1.755e9, 3.35e12),
    "sm_100": Card("B200", 148, 1.85e9, 8.0e12),
}
ISSUE, MUFU = 128, 16  # lanes a cycle of an SM
LATENCY = 700e-9  # of a load that misses the caches, under load: an estimate
