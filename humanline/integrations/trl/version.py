"""Which TRL this is written for. Imports TRL: says what to install where it is missing."""

from importlib.metadata import version

from humanline import install
from humanline.checks import require

try:
    import trl  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"humanline's TRL trainers need TRL, which cannot be imported ({error}): "
        f"{install.command('trl')}"
    ) from error

#: Versions whose hook points were read and tested.
KNOWN = ("1.15", "1.16")


def require_known_trl() -> None:
    """Raise unless the installed TRL is one whose inner functions are known.

    Raises:
        ImportError: it is not; those that are, are listed.
    """
    installed = version("trl")
    require(
        ".".join(installed.split(".")[:2]) in KNOWN,
        lambda: (
            f"humanline knows the inner functions of TRL {', '.join(KNOWN)}; installed is "
            f"{installed}, where they may have moved"
        ),
        error=ImportError,
    )
