"""Archives of results: what is in them, what they unpack to, and the limits."""

import io
import json
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import packing
import pytest
import small_run
import synthetic_study

from qkjax import errors, files, train
from qkjax.report import report
from qkjax.runs.directory import RunDirectory
from qkjax.runs.results import PR, RunResult, load_run
from qkjax.verdicts import results

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def study(tmp_path) -> pathlib.Path:
    """Four arms, two seeds, with spectra; one run has a checkpoint."""
    directory = tmp_path / "study"
    synthetic_study.write(directory, synthetic_study.arms(), seeds=(42, 43), spectra=True)
    checkpoint = directory / "runs" / "muon_qk" / "seed_42" / "checkpoints"
    for name in ("5/meta/metadata", "5/params/data", "381/meta/metadata", "381/params/data"):
        files.replace(checkpoint / name, name.encode())
    return directory


def unpack(paths: list[pathlib.Path], into: pathlib.Path) -> pathlib.Path:
    for path in paths:
        with tarfile.open(path) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 on
            archive.extractall(into)
    return into


def test_unpacked_archives_are_the_study_that_the_report_reads(study, tmp_path):
    paths = packing.pack(study, tmp_path / "packed")
    copy = results.load_study(unpack(paths, tmp_path / "home"))
    original = results.load_study(study)
    assert copy.values(PR) == original.values(PR)
    for key, run in original.runs.items():
        np.testing.assert_array_equal(copy.runs[key].sequence_losses, run.sequence_losses)
        assert copy.runs[key].rows == run.rows


def test_scores_surgery_notes_and_earlier_plans_come_home_too(study, tmp_path):
    synthetic_study.write_downstream(study, {"muon_qk": 0.3, "adamw_qk": 0.3}, seeds=(42, 43))
    note = {"status": "skipped", "detail": "no data"}
    for name in ("logs/downstream/muon_noqk/seed_42.json", "dataset.json", "study.1.json"):
        files.write_json(study / name, note)
    synthetic_study.write_surgery(study, {"muon_qk": (9, 12)}, seeds=(42, 43))
    home = unpack(packing.pack(study, tmp_path / "packed"), tmp_path / "home")
    for folder in ("downstream", "logs", "surgery"):
        written = [path for path in (study / folder).rglob("*.*") if path.is_file()]
        assert written
        for path in written:
            assert (home / path.relative_to(study)).read_bytes() == path.read_bytes()
    assert (home / "dataset.json").exists() and (home / "study.1.json").exists()
    assert len(results.load_study(home).items) == 4


def test_paths_of_the_machine_stay_there(study, tmp_path):
    for run in study.glob("runs/*/*/"):
        record = json.loads((run / "environment.json").read_text())
        record["command"] = [
            "/opt/some/bin/python",
            "--config=configs/muon_qk.py:tiny",
            f"--workdir={run}",
        ]
        record["variables"] = {"XLA_FLAGS": "--a=b", "CACHE": "/home/someone/.cache/jax"}
        files.write_json(run / "environment.json", record)
    synthetic_study.seal(study)
    home = unpack(packing.pack(study, tmp_path / "packed"), tmp_path / "home")
    results.load_study(home)  # by digests that know of it
    record = json.loads((home / "runs" / "muon_qk" / "seed_42" / "environment.json").read_text())
    assert record["command"] == [
        "python",
        "--config=configs/muon_qk.py:tiny",
        "--workdir=seed_42",
    ]
    assert record["variables"] == {"XLA_FLAGS": "--a=b", "CACHE": "jax"}


def test_spectra_are_float16_where_that_is_harmless(study, tmp_path):
    path = study / "runs" / "adamw_qk" / "seed_42" / "spectra" / "final.npz"
    with np.load(path) as loaded:
        arrays = dict(loaded)
    arrays |= {"key_norm_max": np.full((2, 2), 1e5, np.float32)}  # beyond float16
    arrays |= {"value_mean": np.full((2, 2), 1e-7, np.float32)}  # below its normal numbers
    arrays |= {"aa": np.array([np.nan, 0.5], np.float32)}
    np.savez(path, **arrays)
    synthetic_study.seal(study)
    home = unpack(packing.pack(study, tmp_path / "packed"), tmp_path / "home")
    with np.load(home / path.relative_to(study)) as packed:
        assert packed["key_post_rope_raw"].dtype == packed["aa"].dtype == np.float16
        assert packed["key_norm_max"].dtype == packed["value_mean"].dtype == np.float32
        for name, array in arrays.items():
            np.testing.assert_allclose(packed[name], array, rtol=2**-10)


def test_the_last_spectra_alone_are_a_run_that_the_report_reads(study, tmp_path, stub_charts):
    """Digests list what is there; the report says the same."""
    everything = unpack(packing.pack(study, tmp_path / "all"), tmp_path / "whole")
    home = unpack(packing.pack(study, tmp_path / "packed", spectra="last"), tmp_path / "home")
    for key, run in results.load_study(home).runs.items():
        kept = RunDirectory(run.workdir).spectra_steps()
        known = RunDirectory(results.load_study(study).runs[key].workdir).spectra_steps()
        assert len(known) > 1 and kept == known[-1:]
        RunDirectory(run.workdir).check_files()
    pages = [report.make_report(folder) for folder in (everything, home)]
    said = [(page.parent / "report.md").read_text() for page in pages]
    assert said[0] == said[1]


def test_an_unfinished_run_comes_home_whole_and_goes_on(tmp_path):
    """Its checkpoint lists the spectra, so they are neither narrowed nor left out."""
    dataset = small_run.make_dataset(tmp_path / "dataset")
    workdir = tmp_path / "run"
    config = small_run.make_config(
        dataset, "adamw", "learned", train__tokens=4 * small_run.TOKENS_PER_STEP
    )
    train.train_and_evaluate(config, workdir)
    digest = json.loads((workdir / "summary.json").read_text())["params_sha256"]
    (workdir / "summary.json").unlink()
    packed = packing.pack(workdir, tmp_path / "packed", checkpoints=True, spectra="last")
    home = unpack(packed, tmp_path / "home") / "run"
    RunDirectory(home).check_files()
    names = sorted(path.name for path in (workdir / "spectra").iterdir())
    assert len(names) > 1 and sorted(path.name for path in (home / "spectra").iterdir()) == names
    train.train_and_evaluate(config, home)
    assert json.loads((home / "summary.json").read_text())["params_sha256"] == digest


def test_checkpoints_only_where_asked_and_only_the_latest(study, tmp_path):
    run = pathlib.Path("runs/muon_qk/seed_42/checkpoints")
    home = unpack(packing.pack(study, tmp_path / "packed"), tmp_path / "home")
    found = sorted(str(p.relative_to(home / run)) for p in (home / run).rglob("*") if p.is_file())
    assert found == ["381/meta/metadata", "5/meta/metadata"]  # digests of every step
    home = unpack(packing.pack(study, tmp_path / "full", checkpoints=True), tmp_path / "with")
    assert (home / run / "381/params/data").read_bytes() == b"381/params/data"
    assert not (home / run / "5/params").exists()


def test_the_same_study_gives_the_same_bytes(study, tmp_path):
    first, again = (packing.pack(study, tmp_path / name) for name in ("first", "again"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


def test_runs_stay_whole_and_archives_within_the_limits(study, tmp_path):
    (whole,) = packing.pack(study, tmp_path / "one")
    limits = packing.Limits(archives=4, bytes_each=int(0.4 * whole.stat().st_size))
    paths = packing.pack(study, tmp_path / "packed", limits=limits)
    assert 2 < len(paths) <= 4
    holders: dict[str, set[int]] = {}
    for i, path in enumerate(paths):
        assert path.stat().st_size <= limits.bytes_each
        with tarfile.open(path) as archive:
            for name in archive.getnames():
                if name.startswith("runs/"):
                    holders.setdefault("/".join(name.split("/")[:3]), set()).add(i)
    assert len(holders) == 8 and all(len(places) == 1 for places in holders.values())


@pytest.mark.parametrize("share", [0.05, 0.6])  # of all: less than a run; less than all runs
def test_too_much_writes_nothing(study, tmp_path, share):
    (whole,) = packing.pack(study, tmp_path / "one")
    limits = packing.Limits(archives=1, bytes_each=int(share * whole.stat().st_size))
    with pytest.raises(errors.UsageError, match="expected at most 1 archives of"):
        packing.pack(study, tmp_path / "packed", limits=limits)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "object", "method", "array"])
def test_a_damaged_spectrum_is_named(study, tmp_path, damage):
    path = study / "runs" / "adamw_qk" / "seed_42" / "spectra" / "final.npz"
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 10] = 99  # a way to compress that nobody knows
    array = io.BytesIO()
    np.save(array, np.zeros(2))
    damaged = {"cut": content[:100], "empty": b"", "object": b"{}", "method": content}
    path.write_bytes(damaged.get(damage, array.getvalue()))
    with pytest.raises(errors.UsageError, match=r"seed_42/spectra/final.npz: damaged .*Restore it"):
        packing.pack(study, tmp_path / "packed")


@pytest.mark.process
def test_the_command_packs_a_single_run(study, tmp_path):
    run = study / "runs" / "adamw_qk" / "seed_42"
    command = [sys.executable, "tools/airgapped/pack_results.py", f"--out={tmp_path / 'packed'}"]
    done = subprocess.run(
        [*command, f"--workdir={run}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path / "packed" / "seed_42-0.tar.gz"))
    home = unpack([tmp_path / "packed" / "seed_42-0.tar.gz"], tmp_path / "home")
    assert isinstance(load_run(home / "seed_42"), RunResult)
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'home' / 'seed_42' / 'spectra'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "holds no run" in done.stderr
