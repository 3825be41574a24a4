"""How busy this host is: CPU, memory, disk, network and GPUs, sampled by a thread.

Names are MLflow's own (its UI has a tab for `system/`), so that one knows them.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


class NodeMetrics:
    """Means since they were last taken; nobody waits for a sample.

    Args:
        folder: whose disk is looked at.
        seconds: between two samples.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}
        self._count = 0
        self._stop = threading.Event()
        self._network = psutil.net_io_counters()
        self._gpus = _gpus()
        psutil.cpu_percent()  # it tells of the time since it was last asked
        threading.Thread(target=self._sample_for_ever, name="node-metrics", daemon=True).start()

    def take(self) -> dict[str, float]:
        """Mean of each since the last call; empty where no sample was made."""
        with self._lock:
            sums, count = self._sums, self._count
            self._sums, self._count = {}, 0
        return {name: value / count for name, value in sums.items()}

    def close(self) -> None:
        """Sample no more."""
        self._stop.set()

    def _sample_for_ever(self) -> None:
        while not self._stop.wait(self.seconds):
            with suppress(Exception):  # a driver that fails is no reason to say anything twice
                found = self._sample()
                with self._lock:
                    for name, value in found.items():
                        self._sums[name] = self._sums.get(name, 0.0) + value
                    self._count += 1

    def _sample(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self.folder))
        network, before = psutil.net_io_counters(), self._network
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (network.bytes_recv - before.bytes_recv) / 1e6,
            "network_transmit_megabytes": (network.bytes_sent - before.bytes_sent) / 1e6,
        }
        for i, gpu in enumerate(self._gpus):
            found |= {f"gpu_{i}_{name}": value for name, value in _gpu_sample(gpu).items()}
        return found


def by_node(of_ranks: Sequence[dict[str, float] | None]) -> dict[str, float]:
    """What each rank took, in rank order, as `system/node-0/NAME`. One rank of each host has a
    monitor; of the others it is None."""
    hosts = [taken for taken in of_ranks if taken is not None]
    return {
        f"system/node-{i}/{name}": value
        for i, taken in enumerate(hosts)
        for name, value in taken.items()
    }


def _gpus() -> list[Any]:
    """NVML's handles; none without a GPU or without the package nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no driver, or one of another kind
        return []


def _gpu_sample(handle: Any) -> dict[str, float]:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "memory_usage_megabytes": memory.used / 1e6,
        "memory_usage_percentage": memory.used / memory.total * 100,
        "power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
    }
