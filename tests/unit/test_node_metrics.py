"""What a node tells of itself: sampled beside the training, taken without waiting."""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain import node_metrics
from pretrain.node_metrics import NodeMetrics, by_node


def taken(monitor: NodeMetrics) -> dict[str, float]:
    ends = time.monotonic() + 30
    while not (found := monitor.take()):
        assert time.monotonic() < ends
        time.sleep(0.01)
    return found


def test_means_since_the_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([{"cpu": 10.0}, {"cpu": 30.0}])
    done = threading.Event()

    def sample(self: NodeMetrics) -> dict[str, float]:
        try:
            return next(values)
        except StopIteration:
            done.set()
            raise

    monkeypatch.setattr(NodeMetrics, "_sample", sample)
    monitor = NodeMetrics(tmp_path, 0.01)
    assert done.wait(30)  # and its error ends nothing
    assert monitor.take() == {"cpu": 20.0} and monitor.take() == {}
    monitor.close()


def test_what_is_looked_at(tmp_path: Path) -> None:
    monitor = NodeMetrics(tmp_path, 0.01)
    found = taken(monitor)
    monitor.close()
    assert 0 <= found["cpu_utilization_percentage"] <= 100
    assert 0 < found["system_memory_usage_percentage"] < 100
    assert found["system_memory_usage_megabytes"] > 10 and found["disk_available_megabytes"] > 0
    assert found["network_receive_megabytes"] >= 0 and found["network_transmit_megabytes"] >= 0


def test_a_disk_that_stands_still_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, go_on = threading.Event(), threading.Event()

    def hang(path: str) -> None:
        stuck.set()
        go_on.wait(60)

    monkeypatch.setattr(node_metrics.psutil, "disk_usage", hang)
    monitor = NodeMetrics(tmp_path, 0.01)
    assert stuck.wait(30)
    began = time.perf_counter()
    assert monitor.take() == {}
    monitor.close()
    assert time.perf_counter() - began < 0.5
    go_on.set()


def test_gpus_by_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for NVML: there is no GPU here. What the real one answers was not seen."""
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetMemoryInfo=lambda i: SimpleNamespace(used=4e9 * (i + 1), total=16e9),
        nvmlDeviceGetUtilizationRates=lambda i: SimpleNamespace(gpu=90 + i),
        nvmlDeviceGetPowerUsage=lambda i: 300_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monitor = NodeMetrics(tmp_path, 0.01)
    found = taken(monitor)
    monitor.close()
    assert found["gpu_1_utilization_percentage"] == 91 and found["gpu_0_power_usage_watts"] == 300
    assert found["gpu_1_memory_usage_percentage"] == 50
    assert found["gpu_0_memory_usage_megabytes"] == 4000


def test_nodes_are_numbered_by_their_first_rank() -> None:
    # Two hosts of two ranks; the second host has made no sample since the last log.
    assert by_node([{"cpu": 1.0}, None, {}, None]) == {"system/node-0/cpu": 1.0}
    assert by_node([{}, None, {"cpu": 2.0}, None]) == {"system/node-1/cpu": 2.0}
