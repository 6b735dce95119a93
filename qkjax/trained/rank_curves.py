"""What rank surgery found: rows of loss against rank, their CSV and one answer.

Without jax: the report uses it too.
"""

import csv
import hashlib
import io
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from qkjax import errors, files

KINDS = ("top", "random")
ALL = "all"  # every layer's keys are projected, instead of one layer's
_SEAL = "table_sha256"
TOLERANCE = 0.01  # nats of validation loss


class Row(NamedTuple):
    """The validation loss with one projection."""

    layer: str  # "all", or the index of the one layer whose keys are projected
    stage: str
    centring: str  # "raw", or "centred": the mean key stays, what varies around it is projected
    kind: str  # "top" or "random"
    rank: int
    seed: int | None  # of random directions
    tokens: int  # of the validation split
    params_sha256: str  # of the parameters that were measured
    val_loss: float  # nats per predicted token
    delta: float  # val_loss minus that of the model as it is


def dimensions_used(rows: Sequence[Row]) -> int | None:
    """The smallest rank measured whose top directions, in all layers, lose at most 0.01 nat.

    Returns:
        None where no rank does, or the layers were not measured together.
    """
    return min((row.rank for row in _used(rows) if row.delta <= TOLERANCE), default=None)


def answer(rows: Sequence[Row], head_dim: int) -> str:
    """`dimensions_used` as a sentence, with the next smaller rank measured and what it loses."""
    used = sorted(_used(rows), key=lambda row: row.rank)
    if not used:
        return "dimensions used: unknown, the layers were not projected together (--layers=all)"
    rank = dimensions_used(rows)
    if rank is None:
        most = used[-1]
        return (
            f"dimensions used: more than {most.rank} of {head_dim} "
            f"(rank {most.rank} loses {most.delta:.4f} nat, allowed is {TOLERANCE})"
        )
    text = f"dimensions used, to within {TOLERANCE} nat: {rank} of {head_dim}"
    fewer = [row for row in used if row.rank < rank]
    if fewer:
        return f"{text} (rank {fewer[-1].rank} loses {fewer[-1].delta:.4f} nat)"
    return text if rank == 1 else f"{text}, or fewer (no smaller rank was measured)"


def _used(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.layer == ALL and row.kind == "top"]


def to_csv(rows: Sequence[Row]) -> bytes:
    """The rows as a CSV file with a header; numbers keep their float32 digits.

    The last column is the same in every row: the sha256 of the other columns, header and all.
    """
    plain = [list(Row._fields)]
    for row in rows:
        cells = ["" if cell is None else str(cell) for cell in row[:-2]]
        plain.append([*cells, f"{row.val_loss:.9g}", f"{row.delta:.6g}"])
    digest = _digest(plain)
    return _text([[*cells, digest if i else _SEAL] for i, cells in enumerate(plain)]).encode()


def _text(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _digest(lines: Sequence[Sequence[str]]) -> str:
    return hashlib.sha256(_text(lines).encode()).hexdigest()


def read_csv(path: pathlib.Path) -> list[Row]:
    """The rows of a measurement that `to_csv` wrote; none where there is no such file.

    Raises:
        UsageError: the file is damaged.
        StorageError: the disk failed.
    """
    fix = "Move it away and measure again (`qkjax surgery`)."
    try:
        lines = list(csv.reader(path.read_text("utf-8").splitlines()))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise files.storage_error(path, error) from error
    except (ValueError, csv.Error) as error:
        raise files.damaged(path, errors.one_line(error), fix) from error
    heads = [list(Row._fields), [*Row._fields, _SEAL]]  # earlier versions wrote no digest
    if len(lines) < 2 or lines[0] not in heads:
        raise files.damaged(path, f"expected rows under {','.join(heads[-1])}", fix)
    if lines[0] == heads[-1]:
        digest, found = _digest([cells[:-1] for cells in lines]), {c[-1] for c in lines[1:] if c}
        if found != {digest}:
            raise files.damaged(path, f"its rows are not those of their {_SEAL}", fix)
        lines = [cells[:-1] for cells in lines]
    try:
        return [_row(line) for line in lines[1:]]
    except (ValueError, TypeError) as error:
        raise files.damaged(path, errors.one_line(error), fix) from error


def _row(cells: Sequence[str]) -> Row:
    row = Row(*cells)  # type: ignore[arg-type]
    return row._replace(
        rank=int(row.rank),
        seed=int(row.seed) if row.seed else None,
        tokens=int(row.tokens),
        val_loss=float(row.val_loss),
        delta=float(row.delta),
    )
