"""What the code never does with files and addresses of others: found in its text, and tried."""

import ast
import pathlib
import pickle
import re
import tomllib

import numpy as np
import pytest

from qkjax import errors, files
from qkjax.cli import arguments
from qkjax.runs.directory import RunDirectory

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("qkjax", "tools", "benchmarks", "examples", "configs")
CODE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TEXTS = [*CODE, ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("tools/**/*.sh")]
# Modules that run what a file says, and calls that unpack archives or make guessable names.
MODULES = {"pickle", "dill", "joblib", "shelve", "marshal", "yaml"}
CALLS = {"extractall", "extract", "unpack_archive", "mktemp", "unsafe_load"}


def parsed() -> list[tuple[pathlib.Path, ast.AST]]:
    return [(path, node) for path in CODE for node in ast.walk(ast.parse(path.read_text()))]


def test_nothing_unpickles_reads_yaml_or_unpacks_an_archive():
    found = []
    for path, node in parsed():
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {node.module.partition(".")[0]} & MODULES
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            names = {node.func.attr} & CALLS
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if node.arg in ("allow_pickle", "trust_remote_code") and node.value.value is True:
                names = {node.arg}
        found += [f"{path.relative_to(ROOT)}: {name}" for name in names]
    assert len(CODE) > 100 and not found


class _Opened:
    ran = False

    def __reduce__(self):
        return (setattr, (_Opened, "ran", True))


@pytest.mark.parametrize("kind", ["pickle", "npy", "npz"])
def test_a_file_with_code_in_it_is_refused_and_runs_nothing(tmp_path, kind):
    path = tmp_path / "final.npz"
    _Opened.ran = False
    if kind == "pickle":
        path.write_bytes(pickle.dumps(_Opened()))
    else:
        with path.open("wb") as file:
            array = np.array([_Opened()], dtype=object)
            np.save(file, array) if kind == "npy" else np.savez(file, loss=array)
    with pytest.raises(errors.UsageError, match=r"final\.npz: damaged"):
        files.read_arrays(path, "Make it again.")
    assert not _Opened.ran


def test_a_name_that_no_file_system_takes_is_one_line(tmp_path):
    with pytest.raises(errors.UsageError, match="control character"):
        arguments.check(["command", "--workdir=runs/a\0b"])
    with pytest.raises(errors.StorageError, match="File name too long") as caught:
        RunDirectory.make(tmp_path / ("n" * 300))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_no_server_is_opened_to_the_network():
    open_to_all = re.compile(r"--bind_all|--host[= ]0\.0\.0\.0")
    found = [path.name for path in TEXTS if open_to_all.search(path.read_text())]
    assert not found


def test_versions_and_actions_are_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    assert len(names) > 50
    assert not [line for line in names if not re.match(r"[A-Za-z0-9._-]+==\d", line)]
    used = [
        line.split("uses:")[1].split("#")[0].strip()
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in path.read_text().splitlines()
        if "uses:" in line
    ]
    assert used and not [name for name in used if not re.search(r"@[0-9a-f]{40}$", name)]


def test_the_linter_looks_for_unsafe_calls():
    chosen = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    wanted = {"S102", "S108", "S301", "S307", "S506"}  # exec, /tmp names, pickle, eval, yaml
    assert wanted <= set(chosen["select"]) and not wanted & set(chosen.get("ignore", ()))
