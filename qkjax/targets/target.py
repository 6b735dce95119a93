"""What --aot=TARGET names: a chip and how many of it. Imports no jax."""

import dataclasses
import math
import re

from qkjax import chips, errors

_FLAG = "--aot"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for."""

    chip: chips.Chip
    topology: tuple[int, ...]  # (8,) GPUs of one host, or the sides of a TPU slice

    @property
    def num_devices(self) -> int:
        """All of them."""
        return math.prod(self.topology)

    @property
    def extra(self) -> str:
        """The extra of this package that installs the compiler."""
        return f"aot-{self.chip.platform}"

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.topology))}"


def check_price(price: float | None, aot: str | None) -> None:
    """Refuses a price of hours that nothing estimates.

    Raises:
        UsageError: --price_per_hour without --aot.
    """
    if price is not None and aot is None:
        raise errors.UsageError(
            "--price_per_hour: is the price of a target's hours, and no target is named. Add "
            "--aot=h100, or multiply the hours that --dry_run shows."
        )


def parse(text: str) -> Target:
    """A target by name: h100, h100:8, v5e:2x4.

    Raises:
        UsageError: an unknown chip, one that nothing here compiles for, or no such slice.
    """
    name, colon, sides = text.strip().lower().partition(":")
    chip = chips.named(name, _FLAG)
    known = [c.name for c in chips.table().values() if is_compiled_for(c)]
    if not is_compiled_for(chip):
        raise errors.UsageError(
            f"{_FLAG}: the compiler has no description of {name}. Give one of {', '.join(known)}; "
            "--dry_run alone estimates hours on every chip."
        )
    if chip.platform == "gpu":
        if not re.fullmatch(r"[1-9]\d{0,2}", sides or ("" if colon else "1")):
            raise errors.UsageError(
                f"{_FLAG}: {text!r}, expected a number of GPUs after the colon. "
                f"Give {_FLAG}={name}:8."
            )
        return Target(chip, (int(sides or 1),))
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", sides):
        raise errors.UsageError(
            f"{_FLAG}: {text!r}, expected the sides of a slice after the colon. "
            f"Give {_FLAG}={name}:2x4."
        )
    return Target(chip, tuple(int(side) for side in sides.split("x")))


def is_compiled_for(chip: chips.Chip) -> bool:
    """Whether a compiler for it can be installed here."""
    return chip.compiler is not None or chip.name in ("v5e", "v5p", "v6e")
