"""GPU kinds as a table: memory, peak FLOP/s, and what their memory and links carry, from the vendors' data sheets."""

import re
from dataclasses import dataclass

from parallel.errors import InputError, one_of


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of device, as its vendor's data sheet gives it."""

    flops: float
    """Peak FLOP/s in bfloat16 with dense matrices (where the sheet gives the rate with 2:4 sparsity alone, half)."""
    memory_gb: float
    """Memory (GB, 10^9 bytes), of the largest variant with this name unless the name says the size."""
    memory_gb_s: float
    """What that memory carries (GB/s)."""
    link_gb_s: float
    """To the other GPUs of a node, one direction (GB/s): half of the sheet's figure for NVLink or Infinity Fabric;
    PCIe 4.0 x16 has 32, PCIe 5.0 x16 has 64."""


def _gpu(tflops: float, memory_gb: float, memory_gb_s: float, link_gb_s: float) -> Gpu:
    return Gpu(flops=tflops * 1e12, memory_gb=memory_gb, memory_gb_s=memory_gb_s, link_gb_s=link_gb_s)


GPUS: dict[str, Gpu] = {
    "B300": _gpu(2250, 288, 8000, 900),
    "B200": _gpu(2250, 180, 8000, 900),
    "GB300": _gpu(2500, 288, 8000, 900),
    "GB200": _gpu(2500, 186, 8000, 900),
    "GH200": _gpu(989, 96, 4000, 450),
    "H200": _gpu(989, 141, 4800, 450),
    "H200 NVL": _gpu(835, 141, 4800, 450),
    "H100": _gpu(989, 80, 3350, 450),
    "H100 NVL": _gpu(835, 94, 3900, 300),
    "H100 PCIe": _gpu(756, 80, 2000, 64),
    "H800": _gpu(989, 80, 3350, 200),
    "H20": _gpu(148, 96, 4000, 450),
    "A100": _gpu(312, 80, 2039, 300),
    "A800": _gpu(312, 80, 2039, 200),
    "A40": _gpu(149.7, 48, 696, 32),
    "A30": _gpu(165, 24, 933, 32),
    "A10": _gpu(125, 24, 600, 32),
    "A10G": _gpu(70, 24, 600, 32),
    "L40S": _gpu(362, 48, 864, 32),
    "L40": _gpu(181, 48, 864, 32),
    "L4": _gpu(121, 24, 300, 32),
    "MI355X": _gpu(2500, 288, 8000, 538),
    "MI325X": _gpu(1307, 256, 6000, 448),
    "MI300X": _gpu(1307, 192, 5300, 448),
    "MI300A": _gpu(980, 128, 5300, 192),
    "MI250X": _gpu(191.5, 64, 1600, 100),
    "MI250": _gpu(181, 64, 1600, 100),
    "MI210": _gpu(181, 64, 1600, 100),
}
"""By the words of a device's name; the vendors' data sheets. Both dies of an MI250X have 383e12 FLOP/s and 128 GB, but
each is a device. Other variants of a kind have less memory (A100 40 GB, say): `cluster.memory_gb` says so."""

PEAK_FLOPS: dict[str, float] = {name: gpu.flops for name, gpu in GPUS.items()}
"""Peak FLOP/s of a device in bfloat16 with dense matrices, by the words of its name."""


def peak_flops(name: str | None) -> float | None:
    """Return the peak FLOP/s of a device by what `torch.cuda.get_device_name()` calls it; None if it is not known.

    Args:
        name: None for a CPU, whose peak is not known.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", name or ""))
    fitting = [key for key in PEAK_FLOPS if set(key.split()) <= words]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def gpu_of(name: str) -> Gpu:
    """Return a kind by its key, whatever the case of its letters.

    Raises:
        InputError: no such kind; the line names the nearest.
    """
    by_lower = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in by_lower:
        near = name if name in GPUS else name.upper()
        raise InputError(one_of("GPU", near, GPUS).replace(repr(near), repr(name), 1))
    return by_lower[name.lower()]
