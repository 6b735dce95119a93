"""How long a compiled program takes at least on a chip: a sum over its kernels."""

import dataclasses

from qkjax.chips import Chip
from qkjax.targets import hlo

# What kernels reach of a data sheet's number. Large bfloat16 products reach two thirds of a GPU's
# peak, fused attention four tenths (public measurements on H100: 600 to 700 and 350 to 450
# TFLOP/s), copies nine tenths of the memory's bandwidth.
OF_PRODUCTS = 0.66
OF_ATTENTION = 0.40
OF_BANDWIDTH = 0.90
OF_LINK = 0.80
ASSUMPTIONS = (
    f"{OF_PRODUCTS:.0%} of the peak in products, {OF_ATTENTION:.0%} in fused attention, "
    f"{OF_BANDWIDTH:.0%} of the memory's bandwidth, {OF_LINK:.0%} of the links'; kernels one after "
    "another without gaps, a TPU's copies overlap with them, transfers do not; solvers of linear "
    "algebra not counted"
)


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one execution."""

    kernels: float
    memory_bound: float  # the part of kernels that the memory's bandwidth decides
    transfers: float  # between devices

    @property
    def total(self) -> float:
        """All of it."""
        return self.kernels + self.transfers


def estimate(program: hlo.Program, chip: Chip, num_devices: int) -> Time:
    """The least time of a program on one of `num_devices` devices, at ASSUMPTIONS."""
    kernels = memory_bound = busy = 0.0
    for kernel in program.kernels:
        moving = kernel.bytes / (OF_BANDWIDTH * chip.bandwidth)
        computing = sum(p.flop / _rate(p, chip) for p in kernel.products)
        computing += kernel.attention_flop / (OF_ATTENTION * chip.bfloat16)
        busy += kernel.times * moving
        if kernel.is_copy:
            continue
        kernels += kernel.times * max(moving, computing)
        memory_bound += kernel.times * moving if moving >= computing else 0.0
    # Copies overlap with kernels that compute, as far as the memory has time for them.
    waiting = max(0.0, busy - kernels)
    shared = (num_devices - 1) / num_devices
    transfers = sum(
        c.times * c.bytes * shared * (2 if c.kind == "all-reduce" else 1) / (OF_LINK * chip.link)
        for c in program.collectives
    )
    return Time(kernels + waiting, memory_bound + waiting, transfers)


def _rate(product: hlo.Product, chip: Chip) -> float:
    """FLOP/s of a product by its operands."""
    if "f64" in product.dtypes:
        return OF_PRODUCTS * (chip.float64 or chip.float32 / 10)
    if "f32" in product.dtypes:
        if product.precise:
            return OF_PRODUCTS * chip.float32
        # One pass of TF32 or of bfloat16.
        return OF_PRODUCTS * chip.bfloat16 * (0.5 if chip.platform == "gpu" else 1.0)
    return OF_PRODUCTS * chip.bfloat16
