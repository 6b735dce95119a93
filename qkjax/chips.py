"""What the chips can do, by their makers' data sheets: peaks, memory, bandwidths (chips.json)."""

import dataclasses
import functools
import pathlib
from typing import Any

from qkjax import errors, files, presets

# The shares of the peak that a model's FLOP take at least and at most in practice: what hours are
# given at where nothing is measured and nothing compiled.
USUAL_MFU = (0.2, 0.4)
_FILE = pathlib.Path(__file__).with_name("chips.json")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device; rates in FLOP/s and bytes/s, memory in bytes."""

    name: str
    kinds: tuple[str, ...]  # jax's device_kind
    bfloat16: float  # dense, with float32 sums
    float32: float
    float64: float  # 0: none
    memory: float
    bandwidth: float  # of the memory
    link: float  # to the other devices of a host or slice, one direction
    compiler: dict[str, Any] | None  # what XLA's compiler must know of a GPU

    @property
    def platform(self) -> str:
        """The platform of jax's devices: "gpu" or "tpu"."""
        return "tpu" if self.kinds[0].startswith("TPU") else "gpu"

    @property
    def has_slow_float64(self) -> bool:
        """Whether float64 is there for programs that need it, not for speed: 1/64 of float32."""
        return 0 < self.float64 < self.float32 / 16


@functools.cache
def table() -> dict[str, Chip]:
    """Every chip by name, in the order of the file."""
    values = files.read_object(_FILE, "Install qkjax again") or {}
    return {
        name: Chip(
            name,
            tuple(chip["kinds"]),
            bfloat16=1e12 * chip["bfloat16"],
            float32=1e12 * chip["float32"],
            float64=1e12 * chip["float64"],
            memory=1e9 * chip["memory"],
            bandwidth=1e9 * chip["bandwidth"],
            link=1e9 * chip["link"],
            compiler=chip.get("compiler"),
        )
        for name, chip in values["chips"].items()
    }


def of_kind(device_kind: str) -> Chip | None:
    """The chip that jax calls so; None where the table has none (CPUs)."""
    return next((chip for chip in table().values() if device_kind in chip.kinds), None)


def named(name: str, flag: str) -> Chip:
    """The chip of that name.

    Raises:
        UsageError: there is none.
    """
    chip = table().get(name)
    if chip is None:
        raise errors.UsageError(
            f"{flag}: unknown chip {name!r}.{presets.suggest(name, tuple(table()))} "
            f"Give one of {', '.join(table())}."
        )
    return chip


def hours_table(flop: float) -> list[str]:
    """Lines for people: the time that one device of each chip takes for `flop`, at `USUAL_MFU`."""
    low, high = USUAL_MFU
    lines = [f"{'one device':<12} {'memory':>8} {f'at {high:.0%} MFU':>14} {f'at {low:.0%}':>12}"]
    for chip in table().values():
        fast, slow = (flop / (mfu * chip.bfloat16) / 3600 for mfu in (high, low))
        lines.append(
            f"{chip.name:<12} {chip.memory / 1e9:>5.0f} GB {_time(fast):>14} {_time(slow):>12}"
        )
    return lines


def _time(hours: float) -> str:
    return f"{hours:,.2f} h" if hours >= 0.1 else f"{3600 * hours:,.2f} s"
