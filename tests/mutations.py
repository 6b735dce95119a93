"""Mutations of run and study files, and what every command that reads them makes of each.

    python tests/mutations.py --number=5000 --seed=0

A mutation changes one file of a finished study or of a run, hands it to the commands that read it,
and puts the file back. It is a fault of ours where a command ends with a traceback, or where a
number of its output changes and neither the command nor its page names the file. Prints a table
and every fault; exit code 1 where there is one.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging as std_logging
import pathlib
import pickle
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import small_run
import synthetic_study
from absl import logging

from qkjax import files
from qkjax.cli import command_line, config_flag
from qkjax.report import csv as report_csv
from qkjax.report import material, quantities, run_spectra
from qkjax.runs.directory import RunDirectory
from qkjax.study import plan, plan_cost, states, sweep, table
from qkjax.trained import rank_curves
from qkjax.verdicts import results

ROOT = pathlib.Path(__file__).resolve().parents[1]
ARMS, SEEDS = ("adamw_qk", "muon_qk"), (42, 43)
_EXIT_CODES = (0, 2, 3, 4)


class Outcome(NamedTuple):
    """What a command made of the files."""

    code: int  # of its exit; 1 is a traceback
    numbers: str  # its result; equal text is equal numbers
    said: str  # standard error, log and notes


class Fault(NamedTuple):
    """A mutation that was not taken as it must be."""

    kind: str  # "traceback" or "silent change"
    file: str
    mutation: str
    command: str
    detail: str


@dataclasses.dataclass
class World:
    """A directory, the commands that read each part of it, and what they make of it as it is."""

    root: pathlib.Path
    paths: list[pathlib.Path]  # that are mutated
    commands: Callable[[pathlib.Path], dict[str, Callable[[], str]]]  # those that read the path
    sound: dict[str, Outcome] = dataclasses.field(default_factory=dict)


# --------------------------------------------------------------------------------------------
# Worlds.


@functools.cache
def make_plan() -> plan.Plan:
    """Two arms, two seeds, a sweep of two rates, rank surgery."""
    values = config_flag.load(ROOT / "configs" / "study.py", "tiny")
    values.arms, values.controls, values.seeds = ARMS, (), SEEDS
    values.tokens, values.sweep.tokens, values.surgery.tokens = 40_960, 10_240, 64
    values.export = False
    values.downstream = "somewhere"
    return plan.make_plan(values)


def make_study(directory: pathlib.Path) -> World:
    """A finished study, as its executor leaves it."""
    study = make_plan()
    states.settle_plan(study, directory)
    files.write_sealed(
        directory / "dataset.json",
        {"name": "synthetic", "fingerprint": synthetic_study.FINGERPRINT},
    )
    arms = synthetic_study.arms(32, muon_qk={synthetic_study.LOSS: 3.4, synthetic_study.PR: 16.0})
    chance = np.random.default_rng(0)
    kept = states.StudyFiles(study, directory)
    for step in study.steps:
        if step.kind in (plan.SWEEP, plan.TRAINING[-1], plan.RUN):
            rate = kept.learning_rate(step)
            shift = {name: 0.01 * chance.standard_normal() for name in synthetic_study.DEFAULTS}
            synthetic_study.write_run(
                directory / step.name,
                study.run_config(step, rate).for_platform("cpu"),
                arms[step.arm],
                shift,
                spectra=step.kind == plan.RUN,
            )
        elif step.kind == plan.CHOICE:
            sweep.choose(study, directory, step.arm)
        elif step.kind == plan.SURGERY:
            seed = step.name.rpartition("_")[2]
            ranks = study.surgery_ranks(step.arm)
            rows = [
                rank_curves.Row(
                    *("all", "pre_rope", "centred", "top"),
                    *(rank, None, 64, f"{step.arm}-{seed}", 3.5),
                    0.0 if rank > 10 else 0.02 * (12 - rank),
                )
                for rank in ranks
            ]
            files.replace(directory / f"{step.name}.csv", rank_curves.to_csv(rows))
    synthetic_study.write_downstream(
        directory, dict.fromkeys(ARMS, 0.3), seeds=SEEDS, items=12, sample=True
    )
    for path in directory.glob("downstream/*/*.json"):
        items = files.sha256(path.with_suffix(".items.jsonl"))
        record = files.read_object(path, "") or {}
        files.write_sealed(path, {**record, "items_sha256": items})
    files.write_sealed(
        directory / "logs" / "exports" / "note.json", {"status": "failed", "detail": "why"}
    )
    paths = sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path.suffix in (".json", ".jsonl", ".npz", ".csv")
    )

    def report() -> str:
        found = material.gather(results.load_study(directory))
        said = "\n".join((*found.warnings, *found.study.notes))
        return f"{report_csv.results_csv(found)}{said}\n{_text_of(found)}"

    def status() -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            table.print_status(states.StudyFiles(study, directory))
        return out.getvalue()

    def costs() -> str:
        return repr(plan.shell_lines(study, ["x"], "/")) + repr(plan_cost.measured_rates(directory))

    def compared() -> str:
        runs = run_spectra.load_runs([directory / "runs" / arm / "seed_42" for arm in ARMS])
        return run_spectra.comparison_csv(run_spectra.compare(runs, quantities.quantity("pr")))

    def commands(path: pathlib.Path) -> dict[str, Callable[[], str]]:
        found = {"report": report, "study --status": status, "study --dry_run": costs}
        if "runs" in path.parts and path.parent.name != "validation":
            found["compare"] = compared
        return found

    return World(directory, paths, commands)


def make_runs(directory: pathlib.Path) -> World:
    """A dataset, a finished run on it, and one that was stopped on the way."""
    from qkjax import train
    from qkjax.data import pipeline
    from qkjax.export import directory as export_directory
    from qkjax.trained import generation, rank_surgery

    train.make_programs = functools.cache(train.make_programs)
    scratch = directory.with_name("scratch")
    directory.mkdir(parents=True)
    config = small_run.make_config(small_run.make_dataset(directory / "data"))
    with contextlib.redirect_stdout(io.StringIO()):
        train.train_and_evaluate(config, directory / "whole")
        original = pipeline.TrainLoader.__next__

        def stop(loader: pipeline.TrainLoader) -> pipeline.Batch:
            if loader.step == 8:
                raise KeyboardInterrupt
            return original(loader)

        pipeline.TrainLoader.__next__ = stop  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            train.train_and_evaluate(config, directory / "part")
        pipeline.TrainLoader.__next__ = original  # type: ignore[method-assign]
    paths = sorted(
        path
        for run in ("whole", "part")
        for path in (directory / run).rglob("*")
        if path.is_file() and "events.out" not in path.name and path.name != "run.lock"
    )

    def copied(run: str) -> pathlib.Path:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(directory / run, scratch / "run")
        return scratch / "run"

    def resume(run: str) -> str:
        place = copied(run)
        with contextlib.redirect_stdout(io.StringIO()):
            summary = train.train_and_evaluate(config, place)
        arrays = {
            path.name: [(key, x.dtype.str, x.tobytes()) for key, x in _npz(path).items()]
            for path in sorted(place.glob("*/*.npz"))
        }
        rows = [
            {name: value for name, value in row.items() if not name.startswith("perf/")}
            for row in RunDirectory(place).read_metrics()
        ]
        digest = summary["params_sha256"]
        if run == "part":  # a whole run's is not read again
            digest += small_run.identity(place)[1]
        return repr((digest, rows, arrays))

    def export(run: str) -> str:
        request = export_directory.Request(copied(run), scratch / "out")
        export_directory.export(request, report=lambda line: None)
        parts = [path.read_bytes() for path in sorted((scratch / "out").iterdir())]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def surgery(run: str) -> str:
        request = rank_surgery.Request(ranks=(4,), layers=("all",), kinds=("top",), tokens=32)
        found = rank_surgery.measure(copied(run), request, report=lambda line: None)
        return repr(found.rows)

    def generate(run: str) -> str:
        said: list[str] = []
        request = generation.Request(copied(run), "a", 3, generation.Sampling(0.0, 1.0, 0))
        generation.run(request, write=said.append, report=lambda line: None)
        return "".join(said)

    def plotted(run: str) -> str:
        found = run_spectra.load_run(directory / run)
        return "\n".join((*found.notes, hashlib.sha256(pickle.dumps(found[3:-1])).hexdigest()))

    def commands(path: pathlib.Path) -> dict[str, Callable[[], str]]:
        run = path.relative_to(directory).parts[0]
        every = {"resume": resume, "plot": plotted, "generate": generate}
        every |= {"export": export, "surgery": surgery} if run == "whole" else {}
        return {f"{name} {run}": functools.partial(call, run) for name, call in every.items()}

    return World(directory, paths, commands)


def make_dataset(directory: pathlib.Path) -> World:
    """A prepared dataset, given to its check and to what training reads before its first step."""
    from qkjax.data import check, pipeline
    from qkjax.data import dataset as dataset_lib

    directory.mkdir(parents=True)
    place = small_run.make_dataset(directory / "data")
    config = small_run.make_config(place)
    fingerprint = dataset_lib.open_dataset(config).manifest.fingerprint

    def checked() -> str:
        return check.summary(check.check(str(place)))

    def trained() -> str:
        opened = dataset_lib.open_dataset(config, fingerprint)
        loader = pipeline.TrainLoader(
            opened.directory, opened.manifest, seed=0, sequences_per_step=80
        )
        with contextlib.closing(loader):
            batches = [next(loader).tokens.tobytes() for _ in range(2)]
        held_out = pipeline.read_validation(
            opened.directory, opened.manifest, num_tokens=0, sequences_per_batch=7
        )
        batches += [batch.tokens.tobytes() for batch in held_out]
        return hashlib.sha256(b"".join(batches)).hexdigest()

    paths = sorted(path for path in place.iterdir() if path.is_file())
    return World(directory, paths, lambda path: {"check": checked, "training": trained})


def _npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    return files.read_arrays(path, "")


def _text_of(found: material.Material) -> str:
    """Everything that the page is made of, as text: where it is equal, so is the page."""
    parts = pickle.dumps(
        (found.spectra, found.ends, found.surgery, found.sweep_prs, found.judgement.verdicts)
    )
    plan_ = {name: found.study.plan.get(name) for name in (*make_plan().to_dict(), "parents")}
    read = (found.study.downstream, found.study.items, {"plan": plan_})
    rest = repr([{str(k): json.dumps(v, sort_keys=True) for k, v in x.items()} for x in read])
    return hashlib.sha256(parts + rest.encode()).hexdigest()


# --------------------------------------------------------------------------------------------
# Mutations. Each takes bytes and chance; ValueError: it has nothing to change here.


def truncated(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def emptied(data: bytes, chance: random.Random) -> bytes:
    return b""


def bits_flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def not_utf8(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + b"\xff\xfe\x00" + data[at:]


def overwritten(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + chance.randbytes(16) + data[at + 16 :]


def extended(data: bytes, chance: random.Random) -> bytes:
    return data + chance.choice((b"\x00" * 64, b"{}", b"\n[1]\n", data[-40:]))


def nested(data: bytes, chance: random.Random) -> bytes:
    return b"[" * 20_000 + b"]" * 20_000


def other_json(data: bytes, chance: random.Random) -> bytes:
    return chance.choice((b"{}", b"[]", b"null", b"1", b'"x"', b"NaN", b"[{}]"))


def lines_changed(data: bytes, chance: random.Random) -> bytes:
    """A line twice, lost, exchanged with its neighbour, or cut."""
    lines = data.split(b"\n")
    i = chance.randrange(max(1, len(lines) - 1))
    how = chance.randrange(5)
    if how == 0:
        lines.insert(i, lines[i])
    elif how == 1:
        del lines[i]
    elif how == 2 and len(lines) > i + 1:
        lines[i], lines[i + 1] = lines[i + 1], lines[i]
    elif how == 3:
        lines[i] = lines[i][: len(lines[i]) // 2]
    else:
        lines.insert(i, b"")
    return b"\n".join(lines)


def value_changed(data: bytes, chance: random.Random) -> bytes:
    """One value of a JSON file, or of one line of a JSON lines file."""
    try:
        return _json_changed(data, chance)
    except json.JSONDecodeError:
        lines = data.split(b"\n")
        i = chance.randrange(max(1, len(lines) - 1))
        lines[i] = _json_changed(lines[i], chance)
        return b"\n".join(lines)


def _json_changed(data: bytes, chance: random.Random) -> bytes:
    tree = json.loads(data)
    places = list(_places(tree))
    if not places:
        raise ValueError("nothing in it")
    holder, key = chance.choice(places)
    kind = chance.randrange(8)
    old = holder[key]
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(["extra", "", "val/loss", "\u00fc", "files"])] = old
    elif kind == 2 and isinstance(old, list):
        old += old[:1] or [0]
    elif kind == 3 and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = chance.choice((old + 1, old * 1.01 + 1e-6, -old, 0))
    else:
        holder[key] = chance.choice(ODD)
    return json.dumps(tree, indent=chance.choice((None, 2)) if b"\n " in data else None).encode()


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 10**30, -(10**400), 1e308, float("nan"), float("inf")),
    *("", "x", "\x00", "../../x", "\ud800", "9" * 5000, [], [[]], {}, {"a": {}}, [None], ["x"]),
)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items) if isinstance(tree, dict | list) else ():
        yield tree, key
        yield from _places(value)


def text_number_changed(data: bytes, chance: random.Random) -> bytes:
    """A digit becomes another one."""
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if not digits:
        raise ValueError("no digit")
    i = chance.choice(digits)
    other = chance.choice([d for d in b"0123456789" if d != data[i]])
    return data[:i] + bytes([other]) + data[i + 1 :]


def huge_number(data: bytes, chance: random.Random) -> bytes:
    """A number becomes 1e999, which JSON allows, or has more digits than Python converts."""
    text = data.decode("latin-1")
    numbers = [i for i in range(1, len(text)) if text[i].isdigit() and text[i - 1] in " ,:["]
    if not numbers:
        raise ValueError("no number")
    i = chance.choice(numbers)
    end = i
    while end < len(text) and text[end] in "0123456789.eE+-":
        end += 1
    return (text[:i] + chance.choice(("1e999", "9" * 5000, "-0", "1_0")) + text[end:]).encode(
        "latin-1"
    )


def array_changed(data: bytes, chance: random.Random) -> bytes:
    """One array of an npz file: another value, shape, type or name, or none."""
    with np.load(io.BytesIO(data)) as archive:
        arrays = dict(archive)
    name = chance.choice(sorted(arrays))
    array = arrays.pop(name)
    how = chance.randrange(11)
    if how == 0:
        changed = np.array(array)
        if changed.size:
            changed.flat[chance.randrange(changed.size)] *= 1.01
        arrays[name] = changed
    elif how < 10:
        arrays[name] = (
            lambda: np.full_like(array, np.nan),
            lambda: np.zeros_like(array),
            lambda: -array,
            lambda: array[..., :-1] if array.ndim else array[None],
            lambda: array.astype(object).astype(str),
            lambda: array.astype(np.complex64),
            lambda: array.astype(np.int64),
            lambda: array[None],
            lambda: np.float32(1.0),
        )[how - 1]()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


_ANY = (truncated, emptied, bits_flipped, not_utf8, overwritten, extended)
_TEXT = (lines_changed, text_number_changed)
MUTATIONS: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    ".json": (*_ANY, *_TEXT, nested, other_json, huge_number, *(value_changed,) * 6),
    ".jsonl": (*_ANY, *_TEXT * 2, nested, huge_number, *(value_changed,) * 6),
    ".csv": (*_ANY, *_TEXT * 4),
    ".npz": (*_ANY, bits_flipped, overwritten, *(array_changed,) * 4),
}


def swapped(path: pathlib.Path, world: World, chance: random.Random) -> bytes:
    """The file of the same name of another run, or another file of the same kind."""
    others = [p for p in world.paths if p.suffix == path.suffix and p != path]
    same = [p for p in others if p.name == path.name]
    if not others:
        raise ValueError("no other")
    return chance.choice(same if same and chance.random() < 0.7 else others).read_bytes()


# --------------------------------------------------------------------------------------------
# One mutation, and many.


def outcome(command: Callable[[], str]) -> Outcome:
    """Runs a command in this process, as `command_line.run` does; nothing it raises gets out."""
    numbers = ""

    def work() -> None:
        nonlocal numbers
        numbers = command()

    log = io.StringIO()
    handler = std_logging.StreamHandler(log)
    logger = std_logging.getLogger("absl")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stderr(log):
            code = command_line.exit_code(work)
    except BaseException:
        return Outcome(1, "", traceback.format_exc())
    finally:
        logger.removeHandler(handler)
    return Outcome(code, numbers, log.getvalue())


def fault_of(
    path: pathlib.Path, root: pathlib.Path, sound: Outcome, found: Outcome
) -> tuple[str, str] | None:
    """The kind of fault and its detail; None where the command did what it must."""
    if found.code not in _EXIT_CODES:
        return "traceback", found.said
    if found.code:
        if found.said.count("ERROR: ") != 1:
            return "traceback", f"not one ERROR line: {found.said}"
        return None
    if found.numbers == sound.numbers:
        return None
    names = {path.name, path.parent.name} - {root.name}
    new = "\n".join(
        line
        for line in (found.said + found.numbers).splitlines()
        if line not in sound.said + sound.numbers
    )
    words = ("damaged", "refused", "missing", "skipped", "unfinished", "left out", "not started")
    if any(name in new for name in names) and any(word in new for word in words):
        return None
    return "silent change", new[:300]


def mutate(world: World, chance: random.Random) -> tuple[list[Fault], str]:
    """One mutation of one file; the faults, and whether it was refused, told or taken as equal."""
    path = _choose(world, chance)
    kinds = MUTATIONS.get(path.suffix) or (MUTATIONS[".json"] if _is_json(path) else _ANY)
    mutation = chance.choice((*kinds, swapped))
    old = path.read_bytes()
    try:
        if mutation is swapped:
            new = swapped(path, world, chance)
        else:
            new = mutation(old, chance)
    except (ValueError, OverflowError, TypeError, IndexError):
        new = emptied(old, chance)
    if new == old:
        new = old[:-1]
    commands = world.commands(path)
    for name in commands.keys() - world.sound.keys():
        world.sound[name] = outcome(commands[name])
        assert world.sound[name].code == 0, world.sound[name]
    path.write_bytes(new)
    faults, words = [], set()
    try:
        for name, command in commands.items():
            found = outcome(command)
            fault = fault_of(path, world.root, world.sound[name], found)
            if fault:
                where = str(path.relative_to(world.root))
                faults.append(Fault(fault[0], where, mutation.__name__, name, fault[1]))
            equal = found.numbers == world.sound[name].numbers
            words.add("refused" if found.code else "equal" if equal else "told")
    finally:
        path.write_bytes(old)
    worst = "fault" if faults else min(words, key=("refused", "told", "equal").index)
    return faults, worst


def _is_json(path: pathlib.Path) -> bool:
    """Of files without an ending, as Orbax writes them."""
    return path.read_bytes()[:1] == b"{"


def _choose(world: World, chance: random.Random) -> pathlib.Path:
    """A file, each kind of file alike: there are many more arrays than summaries."""
    kinds: dict[tuple[str, str], list[pathlib.Path]] = collections.defaultdict(list)
    for path in world.paths:
        top = path.relative_to(world.root).parts[0]
        name = path.parent.name if path.suffix == ".npz" else path.name
        if "checkpoints" in path.parts and not _is_json(path):
            name = "checkpoint"
        kinds[top, name if not name.startswith("seed_") else path.suffix].append(path)
    return chance.choice(kinds[chance.choice(sorted(kinds))])


def main() -> int:
    """Runs N mutations and prints what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--datasets", type=float, default=0.0, help="share of datasets")
    parser.add_argument(
        "--runs", type=float, default=0.2, help="share of runs, which are slower than studies"
    )
    chosen = parser.parse_args()
    logging.use_absl_handler()
    chance = random.Random(chosen.seed)
    counts: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[tuple[str, ...]] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        worlds = [make_study(pathlib.Path(folder) / "study")]
        worlds += [make_runs(pathlib.Path(folder) / "runs")] if chosen.runs else []
        worlds += [make_dataset(pathlib.Path(folder) / "dataset")] if chosen.datasets else []
        shares = [1 - chosen.runs - chosen.datasets, chosen.runs, chosen.datasets]
        shares = [shares[0], *filter(None, shares[1:])]
        for number in range(chosen.number):
            (world,) = chance.choices(worlds, shares)
            faults, word = mutate(world, chance)
            counts[word] += 1
            for fault in faults:
                last = fault.detail.strip().splitlines()[-1:] or [""]
                name = pathlib.Path(fault.file).name
                key = (fault.kind, fault.command, name, fault.mutation, last[0][:150])
                seen[key] += 1
                counts[fault.kind] += 1
                if seen[key] == 1:
                    print(number, *fault[:4], fault.detail[-1500:], sep="\n  ", flush=True)
    print(f"mutations {chosen.number:,}", *(f"{k} {v:,}" for k, v in counts.items()), sep="\n")
    return 1 if counts["traceback"] + counts["silent change"] else 0


if __name__ == "__main__":
    sys.exit(main())
