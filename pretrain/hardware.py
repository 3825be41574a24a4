"""What accelerators can do, by their data sheets; and the machines that `plan` knows.

Where each number was read: docs/SCALING.md, "Sources".
"""

from dataclasses import dataclass

from pretrain.errors import ConfigError

# Dense operations per second by the name that CUDA gives the device (data sheets' figures with
# sparsity, halved): matrix products in bf16 or fp16 on tensor cores, and fp32 outside them
# (torch's default: TF32 is off for matrix products). The first name that fits.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250e12, 75e12),
    ("H200 NVL", 835e12, 60e12),
    ("H200", 989e12, 67e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
    ("L40", 181e12, 90.5e12),
    ("L4", 121e12, 30.3e12),
    ("A10G", 70e12, 31.5e12),
    ("A10", 125e12, 31.2e12),
    ("V100", 125e12, 15.7e12),
    ("T4", 65e12, 8.1e12),
)
WITHOUT_BF16 = ("V100", "T4")


@dataclass(frozen=True)
class Accelerator:
    """One GPU in a node of eight, as the vendor's own servers connect them.

    Attributes:
        name: in PEAKS.
        memory_bytes: of the device.
        memory_bandwidth: bytes/s of it.
        link_bandwidth: bytes/s that the GPU sends to others in its node, one direction.
        network_bandwidth: bytes/s that it sends to other nodes: its share of the node's adapters.
        host_bandwidth: bytes/s to and from the host's memory (PCIe), one direction.
    """

    name: str
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float

    def peak(self, precision: str) -> float:
        """Dense operations per second in "fp32", "bf16" or "fp16"."""
        half, single = next(row[1:] for row in PEAKS if row[0] == self.name)
        return single if precision == "fp32" else half


# SXM modules on NVLink, one adapter a GPU: DGX A100 (200 Gbit/s each), DGX H100, DGX H200 (400).
ACCELERATORS = {
    "a100": Accelerator("A100", 80e9, 2.039e12, 300e9, 25e9, 32e9),
    "a100-40": Accelerator("A100", 40e9, 1.555e12, 300e9, 25e9, 32e9),
    "h100": Accelerator("H100", 80e9, 3.35e12, 450e9, 50e9, 64e9),
    "h200": Accelerator("H200", 141e9, 4.8e12, 450e9, 50e9, 64e9),
}


def accelerator(name: str) -> Accelerator:
    """The accelerator of that name.

    Raises:
        ConfigError: it is not known.
    """
    try:
        return ACCELERATORS[name.lower()]
    except KeyError:
        raise ConfigError(
            f"--gpu={name!r} is not known; take one of {', '.join(ACCELERATORS)}, or add a row to "
            "pretrain/hardware.py"
        ) from None
