"""Run directories as a few small archives, for machines from which only small files come back.

An archive holds whole runs without checkpoints: everything that verdicts and the report read. Of
paths of the machine, in environment.json, the last name stays.
Unpacked over each other with `tar -xzf`, the archives of a study are that part of its directory.
"""

import dataclasses
import hashlib
import io
import pathlib
import re
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np

from qkjax import errors, files
from qkjax.runs.directory import RunDirectory

MEBIBYTE = 2**20
# Of a study, and of every run; sizes are those of an 88M run: 3 MB, of which half is spectra.
_STUDY_FILES = (
    "study.json",
    "study.*.json",
    "dataset.json",
    "sweep/learning_rates.json",
    "surgery/*/*.csv",
    "surgery/*/*.json",
    "logs/**/*.json",
    "report/*",
    "report/figures/*",
)
_SCORE_FILES = ("*.json", "*.items.jsonl")  # of every arm in downstream/
_RUN_FILES = (
    "config.json",
    "environment.json",
    "parameters.txt",
    "summary.json",
    "metrics.jsonl",
    "checkpoints/*/meta/metadata",
    "spectra/*.npz",
    "validation/*.npz",
)
# The folders of a path, which only that machine has: the last name stays.
_ABSOLUTE = re.compile(rb'([":=])/(?:[^/"\\:]+/)+')
_MAX_ROUNDING = 2.0**-10  # relative; an array that float16 would change by more stays float32


@dataclasses.dataclass(frozen=True)
class Limits:
    """What may leave the machine."""

    archives: int = 8
    bytes_each: int = 16 * MEBIBYTE


def pack(
    workdir: pathlib.Path,
    out: pathlib.Path,
    *,
    checkpoints: bool = False,
    spectra: str = "all",
    limits: Limits | None = None,
) -> list[pathlib.Path]:
    """Writes every run below `workdir`, finished or not, to archives `NAME-<i>.tar.gz` in `out`.

    Spectra of finished runs become float16 where that costs at most 2^-10 of every value; those of
    others stay as they are, for a resume. The same files give the same bytes.

    Args:
        workdir: a run directory, or one that holds some, such as a study.
        checkpoints: the latest checkpoint of each run too.
        spectra: "all"; "last": of finished runs those of the last evaluation, which the report
            draws.
    Returns:
        The archives, at most `limits.archives` of `limits.bytes_each`.
    Raises:
        UsageError: no run below `workdir`, a damaged file, or more than the limits hold; nothing
            is written.
        StorageError: the disk failed.
    """
    limits = limits or Limits()
    runs = sorted(path.parent for path in workdir.rglob("config.json") if _is_run(path.parent))
    if not runs:
        raise errors.UsageError(
            f"--workdir: {workdir} holds no run, expected a run directory or a study. Give another."
        )
    units = []
    if workdir not in runs:
        units = [list(_matching(workdir, _STUDY_FILES))]
        units += [list(_matching(arm, _SCORE_FILES)) for arm in workdir.glob("downstream/*/")]
    for run in runs:
        kept = list(_matching(run, _RUN_FILES))
        if spectra == "last" and _is_finished(run):
            earlier = RunDirectory(run).spectra_steps()[:-1]
            left_out = {RunDirectory(run).spectra(step) for step in earlier}
            kept = [path for path in kept if path not in left_out]
        units.append([*kept, *_latest_checkpoint(run)] if checkpoints else kept)
    try:
        packed = [_archive(workdir, group) for group in _groups(workdir, units, limits)]
        large = [len(data) for data in packed if len(data) > limits.bytes_each]
        if large or len(packed) > limits.archives:
            raise _too_much(workdir, sum(map(len, packed)), limits)
        out.mkdir(parents=True, exist_ok=True)
        paths = [out / f"{workdir.resolve().name}-{i}.tar.gz" for i in range(len(packed))]
        for path, data in zip(paths, packed, strict=True):
            files.replace(path, data)
    except OSError as error:
        raise files.storage_error(out, error) from error
    return paths


def _is_run(directory: pathlib.Path) -> bool:
    return RunDirectory(directory).metrics.is_file()


def _is_finished(run: pathlib.Path) -> bool:
    """Its summary lists its files; those of another run are listed by its checkpoints, for ever."""
    return RunDirectory(run).summary.is_file()


def _matching(directory: pathlib.Path, patterns: Sequence[str]) -> Iterator[pathlib.Path]:
    for pattern in patterns:
        yield from (path for path in sorted(directory.glob(pattern)) if path.is_file())


def _latest_checkpoint(run: pathlib.Path) -> list[pathlib.Path]:
    steps = [path for path in RunDirectory(run).checkpoints.glob("[0-9]*") if path.name.isdigit()]
    if not steps:
        return []
    latest = max(steps, key=lambda path: int(path.name))
    meta = latest / "meta" / "metadata"  # packed with every step
    return sorted(path for path in latest.rglob("*") if path.is_file() and path != meta)


def _groups(
    workdir: pathlib.Path, units: Sequence[list[pathlib.Path]], limits: Limits
) -> list[list[pathlib.Path]]:
    """First fit, the largest first: whole runs into as few archives as hold them."""
    sizes = [len(_archive(workdir, unit)) for unit in units]
    rooms: list[int] = []
    groups: list[list[pathlib.Path]] = []
    for i in sorted(range(len(units)), key=lambda i: -sizes[i]):
        fitting = (j for j, room in enumerate(rooms) if sizes[i] <= room)
        if (place := next(fitting, None)) is None:
            place = len(groups)
            groups.append([])
            rooms.append(limits.bytes_each)
        groups[place] += units[i]
        rooms[place] -= sizes[i]
    return [sorted(group) for group in groups if group]


def _archive(workdir: pathlib.Path, paths: Sequence[pathlib.Path]) -> bytes:
    """A tar.gz without times, owners or absolute paths."""
    # A study's files lie below it by their own names; a lone run is packed under its name.
    base = workdir.parent if _is_run(workdir) else workdir
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        for path in paths:
            data = _content(path, paths)
            member = tarfile.TarInfo(str(path.relative_to(base)))
            member.size, member.mode = len(data), 0o644
            archive.addfile(member, io.BytesIO(data))
    packed = buffer.getvalue()
    return packed[:4] + bytes(4) + packed[8:]  # without the time in gzip's header


def _content(path: pathlib.Path, packed: Sequence[pathlib.Path]) -> bytes:
    if path.parent.name == "spectra" and _is_finished(path.parent.parent):
        return _as_float16(path)
    if path.name == "environment.json":
        return _ABSOLUTE.sub(rb"\1", path.read_bytes())
    if path.name == "summary.json":  # it lists the sha256 of what is packed otherwise
        changed = [*path.parent.glob("spectra/*.npz"), *path.parent.glob("environment.json")]
        return RunDirectory(path.parent).summary_with(
            {
                p.relative_to(path.parent).as_posix(): hashlib.sha256(
                    _content(p, packed)
                ).hexdigest()
                if p in packed
                else None
                for p in changed
            }
        )
    return path.read_bytes()


def _as_float16(path: pathlib.Path) -> bytes:
    """The arrays of a spectra file, float32 ones as float16 where that is harmless."""
    found = files.read_arrays(path, "Restore it from a copy, or delete it.")
    arrays = {name: _narrow(array) for name, array in found.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # it also has a bool keyword
    return buffer.getvalue()


def _narrow(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    finite = np.isfinite(array)
    changed = np.abs(half[finite].astype(np.float64) - array[finite])
    harmless = bool((changed <= _MAX_ROUNDING * np.abs(array[finite])).all())
    return half if harmless else array


def _too_much(workdir: pathlib.Path, size: int, limits: Limits) -> errors.UsageError:
    return errors.UsageError(
        f"--workdir: {workdir} packs to {size / MEBIBYTE:,.1f} MiB, expected at most "
        f"{limits.archives} archives of {limits.bytes_each / MEBIBYTE:g} MiB with whole runs in "
        "each. Pack fewer runs, or leave checkpoints out."
    )
