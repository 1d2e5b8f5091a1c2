"""torch's caching allocator on one CUDA device."""

from __future__ import annotations

from typing import Any

import torch

_STATISTICS = {
    "allocated": "allocated_bytes",
    "reserved": "reserved_bytes",
    "inactive": "inactive_split_bytes",  # free parts of blocks that are partly in use
}


class CudaAllocator:
    """Bytes by kind: allocated, reserved and inactive; nothing before CUDA is initialised.

    Peaks are exact, since the allocator keeps them itself. `take_peaks` resets them:
    torch.cuda.max_memory_allocated and its like then speak of what came after.
    """

    peaks_of = frozenset(_STATISTICS)

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.current_device() if device.index is None else device.index

    @property
    def uuid(self) -> str:
        """As CUDA says it, without NVML's prefix."""
        return str(torch.cuda.get_device_properties(self._device).uuid)

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self._device)
        return {
            "device": properties.name,
            "uuid": self.uuid,
            "total_bytes": properties.total_memory,
        }

    def close(self) -> None:
        """Nothing is kept open."""

    def now(self) -> dict[str, float]:
        return self._statistics("current")

    def take_peaks(self) -> dict[str, float]:
        """Peaks since the last call."""
        peaks = self._statistics("peak")
        if peaks:
            torch.cuda.reset_peak_memory_stats(self._device)
        return peaks

    def _statistics(self, kind: str) -> dict[str, float]:
        found = torch.cuda.memory_stats_as_nested_dict(self._device)
        return {name: found[key]["all"][kind] for name, key in _STATISTICS.items() if key in found}
