"""Reads XLA's text of a compiled program: kernels, the loops around them, bytes, FLOP, collectives.

The text is that of `jax.stages.Compiled.as_text()` after all passes of the compiler, of one device.
A kernel is an instruction of the entry, or of the body of a loop, that runs on the device; what is
inside a fusion only counts FLOP. Bytes are those of device memory: operands read, results written,
each once, as far as a kernel reads or writes slices of them, only these.

In a TPU's program the layout of an array says where and how it lies: `{1,0:T(8,128)S(1)}` is in
the core's vector memory (S(1); no S is device memory), in tiles of 8 x 128, to which it is padded.
Vector memory counts no bytes: what enters or leaves it counts once, in the copy that moves it or in
the kernel that has one side of its arrays there.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "optimization-barrier",
    "domain",
    "add-dependency",
}
# Custom calls that only name memory, or say something about it.
_FREE_CALLS = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# The Pallas kernels of splash attention: matrix products of the square in each, and its direction.
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_SPLASH_KERNELS = {
    "fwd": (2.0, "forward"),
    "dq": (3.0, "backward of queries"),
    "dkv": (4.0, "backward of keys"),  # and values
}
_SOLVERS = re.compile(r"syevd|syevj|gesvd|geqrf|orgqr|cusolver|qr_|Qr|Householder|Eigh", re.I)


class Array(NamedTuple):
    """The shape of a value."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a TPU's vector or scalar memory, not in the device's
    places: int  # elements with what pads them to whole tiles of a TPU

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def footprint(self) -> int:
        """Bytes, in any memory."""
        return self.places * _bits(self.dtype) // 8

    @property
    def bytes(self) -> int:
        """In the device's memory."""
        return 0 if self.on_chip else self.footprint


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]  # of the result; several of a tuple
    opcode: str
    operands: tuple[str, ...]
    text: str  # what follows the operands: attributes
    is_root: bool

    def called(self, attribute: str) -> list[str]:
        """Names of the computations of an attribute, as calls=%name or calls={%a, %b}."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.text)
        return _NAME.findall(found[1]) if found else []

    @property
    def target(self) -> str:
        """The target of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """Where in our program it comes from."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.text)
        return found[1] if found else ""

    @property
    def trips(self) -> int | None:
        """The iterations of a loop; None where the compiler does not know."""
        found = re.search(r'known_trip_count"?[:=]\s*\{"n":"(\d+)"', self.text)
        return int(found[1]) if found else None


class Product(NamedTuple):
    """A matrix product."""

    dtypes: tuple[str, str]  # of the operands
    flop: float
    precise: bool  # float32 that may not be rounded
    op_name: str


class Collective(NamedTuple):
    """A transfer between devices, at its place in the program."""

    kind: str
    dtype: str
    bytes: int  # on one device, of its larger side: all of what is gathered or scattered
    times: int


class Kernel(NamedTuple):
    """Something that runs on the device."""

    name: str
    op_name: str
    times: int  # by the loops around it
    bytes: int  # of device memory, each time
    products: tuple[Product, ...]
    attention_flop: float  # of a fused attention call, causal
    attention: str  # "forward", "backward" (or of what, where it is two kernels) or ""
    decompositions: int  # of a library of linear algebra, one after another; FLOP are not known
    is_copy: bool  # started, and waited for later: it moves while other kernels run


class Program:
    """A compiled program of one device."""

    def __init__(self, text: str) -> None:
        """Args: text: of `Compiled.as_text()`."""
        self.header = text[: text.index("\n")]
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        current: dict[str, Instruction] = {}
        for line in _joined(text):
            opened = _COMPUTATION.match(line) if line and not line[0].isspace() else None
            if opened:
                current = self._computations[opened[2]] = {}
                if opened[1]:
                    self._entry = opened[2]
            elif found := _parse(line):
                current[found.name] = found
        self.kernels: list[Kernel] = []
        self.collectives: list[Collective] = []
        self.unknown_loops = 0
        self._walk(self._entry, 1)

    def donated(self) -> set[int]:
        """Numbers of the arguments whose memory a result takes over."""
        found = re.search(r"input_output_alias=\{(.*?)\}, entry", self.header)
        return {int(n) for n in re.findall(r": \((\d+), \{\}", found[1] if found else "")}

    def instructions(self) -> Iterator[Instruction]:
        """All, inside fusions too."""
        for computation in self._computations.values():
            yield from computation.values()

    def buffers(self) -> Iterator[tuple[Instruction, Array]]:
        """What is in device memory: the arrays of every instruction outside fusions."""
        fused = {
            name
            for i in self.instructions()
            if i.opcode == "fusion" or i.called("to_apply")
            for name in (*i.called("calls"), *(i.called("to_apply") if i.opcode != "call" else ()))
        }
        for name, computation in self._computations.items():
            if name in fused:
                continue
            for instruction in computation.values():
                for array in instruction.arrays:
                    if not array.on_chip:
                        yield instruction, array

    def scatters(self) -> Iterator[tuple[Instruction, bool]]:
        """Every scatter, and whether its indices are known to be unique."""
        for instruction in self.instructions():
            if instruction.opcode == "scatter":
                yield instruction, "unique_indices=true" in instruction.text

    def _walk(self, computation: str, times: int) -> None:
        inside = self._computations[computation]
        for i in inside.values():
            kind = i.opcode.removesuffix("-start")
            if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
                continue
            if i.opcode == "custom-call" and i.target in _FREE_CALLS:
                continue
            if i.opcode == "while":
                trips = i.trips or self._limit(i.called("condition")[0])
                self.unknown_loops += trips is None
                self._walk(i.called("body")[0], times * (1 if trips is None else trips))
            elif i.opcode == "conditional":
                for branch in (
                    *i.called("branch_computations"),
                    *i.called("true_computation"),
                    *i.called("false_computation"),
                ):
                    self._walk(branch, times)
            elif i.opcode == "call" or (i.opcode == "async-start" and i.called("calls")):
                for name in (*i.called("to_apply"), *i.called("calls")):
                    self._walk(name, times)
            elif kind in COLLECTIVES:
                taken = _sizes(
                    a for name in i.operands if name in inside for a in inside[name].arrays
                )
                given = _sizes(i.arrays)
                if i.opcode.endswith("-start") and kind != "all-reduce":
                    given -= taken  # which its result also names
                for dtype, size in (given | taken).items():  # the larger of each
                    if size:
                        self.collectives.append(Collective(kind, dtype, size, times))
            else:
                self.kernels.append(self._kernel(i, inside, times))

    def _limit(self, condition: str) -> int | None:
        """Iterations of a loop that counts from 0 to below a constant, as jax's scans do."""
        inside = self._computations[condition]
        for i in inside.values():
            if i.opcode == "compare" and "direction=LT" in i.text:
                limit = inside.get(i.operands[1])
                found = re.match(r"(\d+)", limit.text) if limit else None
                if found and limit and limit.opcode == "constant":
                    return int(found[1])
        return None

    def _kernel(self, i: Instruction, inside: dict[str, Instruction], times: int) -> Kernel:
        flop, direction = _attention(i, inside)
        fused = i.called("calls") if i.opcode == "fusion" else []
        products = (
            tuple(p for name in fused for p in self._products(name))
            if fused
            else tuple(_product(i, inside))
        )
        size = (
            self._fusion_bytes(i, inside, fused[0]) if len(fused) == 1 else _plain_bytes(i, inside)
        )
        return Kernel(
            i.name,
            i.op_name,
            times,
            size,
            products,
            flop,
            direction,
            _decompositions(i),
            i.opcode.endswith("-start"),
        )

    def _products(self, computation: str) -> Iterator[Product]:
        inside = self._computations[computation]
        for i in inside.values():
            if i.opcode == "fusion":
                for name in i.called("calls"):
                    yield from self._products(name)
            else:
                yield from _product(i, inside)

    def _fusion_bytes(self, i: Instruction, outside: dict[str, Instruction], name: str) -> int:
        total = 0
        for number, operand in enumerate(i.operands):
            arrays = outside[operand].arrays if operand in outside else ()
            whole = sum(array.bytes for array in arrays)
            parameter = self._parameter(name, number)
            total += self._read(name, parameter, whole) if parameter else whole
        root = next(inner for inner in self._computations[name].values() if inner.is_root)
        results = root.operands if root.opcode == "tuple" else (root.name,)
        for result, array in zip(results, i.arrays, strict=False):
            total += self._written(name, result, array.bytes)
        return total

    def _parameter(self, computation: str, number: int) -> str | None:
        for i in self._computations[computation].values():
            if i.opcode == "parameter" and re.match(rf"{number}\b", i.text):
                return i.name
        return None

    def _read(self, computation: str, value: str, whole: int) -> int:
        """Bytes that a fusion reads of one operand, which is `whole` bytes in device memory."""
        total = 0
        for user in self._computations[computation].values() if whole else ():
            if value not in user.operands:
                continue
            if user.opcode in ("bitcast", "reshape") and user.arrays:
                total += self._read(computation, user.name, whole)
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(array.footprint for array in user.arrays)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value:
                total += 0  # updated in place
            elif user.opcode == "fusion":  # a TPU's fusions stand in one another
                (inner,) = user.called("calls")
                for number, operand in enumerate(user.operands):
                    parameter = self._parameter(inner, number)
                    if operand == value and parameter:
                        total += self._read(inner, parameter, whole)
            else:
                return whole
        return min(total, whole)

    def _written(self, computation: str, value: str, whole: int) -> int:
        """Bytes that a fusion writes of one result, which is `whole` bytes in device memory."""
        inside = self._computations[computation]
        result = inside.get(value)
        if not whole or result is None:
            return whole
        if result.opcode in ("bitcast", "reshape", "copy") and result.operands:
            return self._written(computation, result.operands[0], whole)
        if result.opcode != "dynamic-update-slice" or result.operands[1] not in inside:
            return whole
        update = inside[result.operands[1]]
        return min(whole, sum(array.footprint for array in update.arrays))


def _sizes(arrays: Iterable[Array]) -> Counter[str]:
    """Bytes by dtype."""
    sizes = Counter[str]()
    for array in arrays:
        sizes[array.dtype] += array.size * _bits(array.dtype) // 8
    return sizes


def _joined(text: str) -> Iterator[str]:
    """Lines, but one for an instruction: the metadata of Pallas kernels have line ends."""
    kept: list[str] = []
    for line in text.splitlines():
        is_next = bool(kept) and not _HEAD.match(line) and not _COMPUTATION.match(line)
        if is_next and line and line != "}":
            kept.append(line)
            continue
        if kept:
            yield " ".join(kept)
        kept = [line] if _HEAD.match(line) else []
        if not kept:
            yield line
    if kept:
        yield " ".join(kept)


def _parse(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    end = _closing(line, head.end()) if line[head.end()] == "(" else line.find(" ", head.end())
    shape = line[head.end() : end]
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    stop = _closing(line, opcode.end() - 1)
    inner = line[opcode.end() : stop - 1]
    text = inner + line[stop:] if opcode[1] in ("parameter", "constant") else line[stop:]
    return Instruction(
        head[1],
        tuple(_arrays(shape)),
        opcode[1],
        tuple(_NAME.findall(inner)),
        text,
        line.lstrip().startswith("ROOT "),
    )


def _closing(line: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(line)):
        if line[position] == "(":
            depth += 1
        elif line[position] == ")":
            depth -= 1
            if not depth:
                return position + 1
    return len(line)


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        numbers = tuple(int(n) for n in re.findall(r"\d+", dims))
        yield Array(dtype, numbers, "S(" in layout, _places(numbers, layout))


def _places(dims: tuple[int, ...], layout: str) -> int:
    """Elements of an array with its padding: `{1,2,0:T(8,128)}` names axes from the innermost."""
    order, _, rest = layout.strip("{}").partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if tile is None:
        return math.prod(dims)
    sides = [int(side) for side in tile[1].split(",")]
    inner = [dims[int(axis)] for axis in order.split(",") if axis]
    inner += [1] * (len(sides) - len(inner))
    for position, side in enumerate(reversed(sides)):
        inner[position] = -(-inner[position] // side) * side
    return math.prod(inner)


def _plain_bytes(i: Instruction, inside: dict[str, Instruction]) -> int:
    """The bytes of an instruction that is its own kernel."""
    if i.opcode.endswith("-start"):  # a copy or slice, whose result also names its source
        sides = [array for array in i.arrays if array.dims]
        moved = min((array.footprint for array in sides), default=0)
        return moved * sum(not array.on_chip for array in sides)
    results = sum(array.bytes for array in i.arrays)
    operands = [
        sum(array.bytes for array in inside[name].arrays) if name in inside else 0
        for name in i.operands
    ]
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * results
    if i.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if i.opcode == "scatter":  # read, changed and written where the updates go
        return sum(operands[1:]) + 2 * operands[-1]
    return results + sum(operands)


def _product(i: Instruction, inside: dict[str, Instruction]) -> Iterator[Product]:
    if i.opcode not in ("dot", "convolution") or len(i.operands) < 2:
        return
    left, right = (inside.get(name) for name in i.operands[:2])
    if left is None or right is None or not left.arrays or not right.arrays:
        return
    depth: float
    if i.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text)
        axes = [int(n) for n in found[1].split(",") if n] if found else []
        depth = math.prod(left.arrays[0].dims[axis] for axis in axes)
    else:
        depth = _convolution_depth(i.text, left.arrays[0], right.arrays[0], i.arrays[0])
    dtypes = (left.arrays[0].dtype, right.arrays[0].dtype)
    flop = 2.0 * i.arrays[0].size * depth
    yield Product(dtypes, flop, "highest" in i.text, i.op_name)


def _convolution_depth(text: str, left: Array, kernel: Array, out: Array) -> float:
    """Products summed for one element: TPUs write matrix products as convolutions.

    A batch of them is an axis with a window in which each result meets one element, by stride,
    dilation or padding; of a contraction it meets all.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    if labels is None:
        return 1
    depth: float = kernel.dims[labels[2].index("i")]
    for axis in filter(str.isdigit, labels[2]):
        sizes = (
            array.dims[order.index(axis)]
            for order, array in zip(labels.groups(), (left, kernel, out), strict=True)
        )
        depth *= _met(text, int(axis), *sizes)
    return depth


def _met(text: str, axis: int, size: int, width: int, results: int) -> float:
    """Elements of an axis that a result meets through a window, in the mean over the results."""
    window = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(pair.split("=") for pair in window[1].split() if "=" in pair) if window else {}

    def field(name: str, default: int) -> int:
        if name not in fields:
            return default
        return int(fields[name].split("x")[axis].partition("_")[0])

    stride, before, dilation = field("stride", 1), field("pad", 0), field("lhs_dilate", 1)
    places = range(0, size * dilation, dilation)  # of the elements
    starts = (result * stride - before for result in range(results))
    return sum(start + i in places for start in starts for i in range(width)) / results


def _decompositions(i: Instruction) -> int:
    """That a call makes one after another: one of a batch, where the library has a batched form."""
    if i.opcode != "custom-call" or not _SOLVERS.search(i.target):
        return 0
    dims = i.arrays[0].dims
    jacobi = "algorithm = 2" in i.text or ("gesvdj" in i.target and max(dims[-2:]) <= 32)
    return 1 if jacobi else math.prod(dims[:-2])


def _attention(i: Instruction, inside: dict[str, Instruction]) -> tuple[float, str]:
    """FLOP of causal attention in a fused kernel, half of the square, and its direction."""
    if i.target.startswith("__cudnn$fmhaSoftmax"):
        q, k = (
            inside[name].arrays[0].dims for name in i.operands[:2]
        )  # [B, T, H, K], [B, S, G, K]
        forward = 2.0 * math.prod(q) * k[1]  # two products of the square, half of which is masked
        backward = "Backward" in i.target
        return (2.5 * forward, "backward") if backward else (forward, "forward")
    kernel = _SPLASH.search(i.op_name) if i.target == "tpu_custom_call" else None
    if kernel is None:
        return 0.0, ""
    operands = [inside[name].arrays[0] for name in i.operands if name in inside]
    # [B, H, T, K], or [H, T, K] of one sequence, after the mask's arrays, which are integers
    q = next(array.dims for array in operands if array.dtype[0] in "bf")
    products, direction = _SPLASH_KERNELS[kernel[1]]
    return products * math.prod(q) * q[-2], direction
