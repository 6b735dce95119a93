"""Reads XLA's text of a compiled program: kernels, the loops around them, bytes, FLOP, collectives.

The text is that of `jax.stages.Compiled.as_text()` after all passes of the compiler, of one device.
A kernel is an instruction of the entry, or of the body of a loop, that runs on the device; what is
inside a fusion only counts FLOP. Bytes are those of device memory: operands read, results written,
as far as a kernel reads or writes slices of them, only these.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
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
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_SOLVERS = re.compile(r"syevd|syevj|gesvd|geqrf|orgqr|cusolver|qr_|Qr|Householder|Eigh", re.I)


class Array(NamedTuple):
    """The shape of a value."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a TPU's vector memory, not in the device's

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """In the device's memory."""
        return 0 if self.on_chip else self.size * _bits(self.dtype) // 8


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
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """Where in our program it comes from."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.text)
        return found[1] if found else ""

    @property
    def trips(self) -> int | None:
        """Of a loop; None where the compiler does not know."""
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
    bytes: int  # of its result on one device
    times: int


class Kernel(NamedTuple):
    """Something that runs on the device."""

    name: str
    op_name: str
    times: int  # by the loops around it
    bytes: int  # of device memory, each time
    products: tuple[Product, ...]
    attention_flop: float  # of a fused attention call, causal
    attention: str  # "forward", "backward" or ""
    decompositions: int  # of a library of linear algebra, one after another; FLOP are not known


class Program:
    """A compiled program of one device."""

    def __init__(self, text: str) -> None:
        """Args: text: of `Compiled.as_text()`."""
        self.header = text[: text.index("\n")]
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
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
        """What stands in device memory: the arrays of every instruction outside fusions."""
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
                half = 2 if i.opcode.endswith("-start") and kind != "all-reduce" else 1
                by_dtype = Counter[str]()
                for array in i.arrays:
                    by_dtype[array.dtype] += array.size * _bits(array.dtype) // 8
                for dtype, size in by_dtype.items():
                    if size:
                        self.collectives.append(Collective(kind, dtype, size // half, times))
            else:
                self.kernels.append(self._kernel(i, inside, times))

    def _limit(self, condition: str) -> int | None:
        """Turns of a loop that counts from 0 to below a constant, as jax's scans do."""
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
        inside = self._computations[name]
        parameters = {
            int(re.match(r"(\d+)", p.text)[1]): p  # type: ignore[index]
            for p in inside.values()
            if p.opcode == "parameter"
        }
        users: dict[str, list[Instruction]] = {}
        for user in inside.values():
            for operand in user.operands:
                users.setdefault(operand, []).append(user)
        total = 0
        for number, operand in enumerate(i.operands):
            arrays = outside[operand].arrays if operand in outside else ()
            whole = sum(array.bytes for array in arrays)
            if number in parameters:
                total += min(whole, _read(parameters[number], users, whole))
            else:
                total += whole
        root = next(x for x in inside.values() if x.is_root)
        results = root.operands if root.opcode == "tuple" else (root.name,)
        for result, array in zip(results, i.arrays, strict=False):
            total += min(array.bytes, _written(inside.get(result), inside, array.bytes))
        return total


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
        yield Array(dtype, numbers, "S(1)" in layout)


def _read(parameter: Instruction, users: dict[str, list[Instruction]], whole: int) -> int:
    """Bytes that a fusion reads of one operand."""
    total = 0
    for user in users.get(parameter.name, ()):
        if user.opcode in ("bitcast", "reshape") and user.arrays:
            total += _read(user, users, whole)
        elif user.opcode in ("dynamic-slice", "slice", "gather"):
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            total += 0  # updated in place
        else:
            return whole
    return total


def _written(result: Instruction | None, inside: dict[str, Instruction], whole: int) -> int:
    """Bytes that a fusion writes of one result."""
    while result is not None and result.opcode in ("bitcast", "reshape", "copy"):
        result = inside.get(result.operands[0]) if result.operands else None
    if result is None or result.opcode != "dynamic-update-slice":
        return whole
    update = inside.get(result.operands[1])
    return sum(array.size * _bits(array.dtype) // 8 for array in update.arrays) if update else whole


def _plain_bytes(i: Instruction, inside: dict[str, Instruction]) -> int:
    """Of an instruction that is a kernel of its own."""
    if i.opcode.endswith("-start"):  # a copy or slice, whose result also names its source
        moved = min((a.size * _bits(a.dtype) // 8 for a in i.arrays if a.dims), default=0)
        source = inside[i.operands[0]].arrays if i.operands[0] in inside else ()
        return moved * (1 if any(a.on_chip for a in (*i.arrays, *source)) else 2)
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
    out = i.arrays[0].size
    if i.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text)
        axes = [int(n) for n in found[1].split(",") if n] if found else []
        depth = math.prod(left.arrays[0].dims[axis] for axis in axes)
    else:
        depth = _convolution_depth(i.text, right.arrays[0])
    dtypes = (left.arrays[0].dtype, right.arrays[0].dtype)
    yield Product(dtypes, 2.0 * out * depth, "highest" in i.text, i.op_name)


def _convolution_depth(text: str, kernel: Array) -> int:
    """Products summed for one element: TPUs write matrix products as convolutions."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", text)
    if labels is None:
        return 1
    depth = 1
    for label, size in zip(labels[1], kernel.dims, strict=False):
        if label == "i":
            depth *= size
        elif label != "o":  # a window; one that is as dilated as it is wide holds one element
            depth *= _window(text, int(label), size)
    return depth


def _window(text: str, axis: int, size: int) -> int:
    window = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(pair.split("=") for pair in window[1].split() if "=" in pair) if window else {}

    def field(name: str) -> int:
        values = fields.get(name, "").split("x")
        return int(values[axis]) if len(values) > axis and values[axis].isdigit() else 1

    return 1 if max(field("lhs_dilate"), field("stride")) >= size - 1 > 0 else size


def _decompositions(i: Instruction) -> int:
    """That a call makes one after another: one of a batch, where the library has a batched form."""
    if i.opcode != "custom-call" or not _SOLVERS.search(i.target):
        return 0
    dims = i.arrays[0].dims
    jacobi = "algorithm = 2" in i.text or ("gesvdj" in i.target and max(dims[-2:]) <= 32)
    return 1 if jacobi else math.prod(dims[:-2])


def _attention(i: Instruction, inside: dict[str, Instruction]) -> tuple[float, str]:
    """FLOP of cuDNN's causal attention, and its direction."""
    if not i.target.startswith("__cudnn$fmhaSoftmax"):
        return 0.0, ""
    q, k = (inside[name].arrays[0].dims for name in i.operands[:2])  # [B, T, H, K], [B, S, G, K]
    forward = 2.0 * math.prod(q) * k[1]  # two products of the square, half of which is masked
    backward = "Backward" in i.target
    return (2.5 * forward, "backward") if backward else (forward, "forward")
