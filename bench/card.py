"""What a GPU's clocks and power are while it works: a timing without them cannot be judged."""

import ctypes
from dataclasses import dataclass

import torch

# of NVIDIA's management library, nvml.h
_SM, _MEMORY = 1, 2
_GPU_TEMPERATURE = 0


@dataclass(frozen=True)
class Card:
    """A GPU's state at one moment; None where the driver does not tell.

    Attributes:
        sm_mhz, memory_mhz: clocks of the multiprocessors and of the memory.
        watts: drawn by the whole board.
        celsius: temperature of the chip.
    """

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    watts: float | None = None
    celsius: float | None = None


def card(device: str) -> Card | None:
    """The state of a CUDA device now, without waiting for what it works on; None of a CPU, or where
    the management library, which comes with the driver, is not found."""
    if not device.startswith("cuda"):
        return None
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return read(library, f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def read(library, uuid: str) -> Card | None:
    """The state of the GPU that has this name, whatever devices a process is shown."""
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(
        uuid.encode(), ctypes.byref(handle)
    ):
        return None

    def number(function, *arguments, unit=1.0):
        value = ctypes.c_uint()
        failed = function(handle, *arguments, ctypes.byref(value))
        return None if failed else value.value * unit

    return Card(
        number(library.nvmlDeviceGetClockInfo, _SM),
        number(library.nvmlDeviceGetClockInfo, _MEMORY),
        number(library.nvmlDeviceGetPowerUsage, unit=1e-3),
        number(library.nvmlDeviceGetTemperature, _GPU_TEMPERATURE),
    )
