"""How this process was launched, as torchrun and accelerate launch say it: in its environment."""

import os

from humanline.training.errors import UserError

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> tuple[int, int, int]:
    """Rank, number of ranks, and rank on this machine, as the launcher's variables have them.

    Raises:
        UserError: some are missing.
    """
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks == "1":
        return 0, 1, 0
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {ranks}, but {', '.join(missing)} is not set: start several processes "
            "with torchrun or accelerate launch"
        )
    numbers = (os.environ["RANK"], ranks, os.environ["LOCAL_RANK"])
    if not all(number.isdecimal() for number in numbers):
        raise UserError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, got {', '.join(numbers)}"
        )
    return tuple(map(int, numbers))


def is_first() -> bool:
    """Whether this process is the one that prints what all would say alike."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def other_engine() -> str | None:
    """The engine that accelerate launch was configured for, if it is not DDP."""
    for engine in ("FSDP", "DeepSpeed"):
        if os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "").lower() == "true":
            return engine
    return None
