"""The package as others install it, and the environment that the scripts make."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging import specifiers

pytestmark = pytest.mark.process
ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from a copy: a build leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("qkjax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *flags, "-w", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    [built] = out.glob("qkjax-*.whl")
    return built


def test_a_wheel_holds_all_that_the_package_reads(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [entries] = [name for name in names if name.endswith("entry_points.txt")]
        assert "qkjax = qkjax.commands:main" in archive.read(entries).decode()
    ours = [path for path in (ROOT / "qkjax").rglob("*") if path.is_file()]
    configs = {f"qkjax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    expected = {str(p.relative_to(ROOT)) for p in ours if "__pycache__" not in p.parts}
    assert {name for name in names if ".dist-info/" not in name} == expected | configs


def test_an_installed_package_knows_its_configs_and_no_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import qkjax; from qkjax.cli import places; from qkjax.data import dataset;"
        "print(qkjax.__version__, places.checkout(), dataset.embedded_directory(4096, True))"
    )
    env = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path)}

    def call(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=env
        )

    assert call("-c", code).stdout == f"0.1.0 None {tmp_path / 'qkjax' / 'data' / 'embedded-v2'}\n"
    flags = ("--config=study:tiny,quick", "--dry_run")
    done = call("-m", "qkjax.commands", "study", *flags)
    assert done.returncode == 0, done.stderr
    assert "runs/muon_qk/seed_42" in done.stdout
    assert done.stderr.startswith(
        f"config: {site / 'qkjax' / 'configs' / 'study.py'}, because there is"
    )


# In place of an environment's python: notes what pip is asked for, and installs nothing.
PYTHON = """#!/bin/sh
if [ "$2" = pip ]; then echo "$PWD $*" >> "{log}"; else exec "{python}" "$@"; fi
"""


def test_a_copied_checkout_is_installed_again_for_its_own_place(tmp_path):
    """With its .venv, which would run the original's code."""
    log, checkout, copy = tmp_path / "log", tmp_path / "a checkout", tmp_path / "copy"
    (checkout / "tools").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "tools/set_up.sh"):
        shutil.copy(ROOT / name, checkout / name)
    (checkout / ".venv" / "bin").mkdir(parents=True)
    python = checkout / ".venv" / "bin" / "python"
    python.write_text(PYTHON.format(log=log, python=sys.executable))
    python.chmod(0o755)

    def set_up(root: pathlib.Path, extra: str = "test") -> int:
        """How often pip has been called in all."""
        script = 'set -euo pipefail; source "$1/tools/set_up.sh" "$2"'
        subprocess.run(["bash", "-c", script, "-", root, extra], check=True, capture_output=True)
        return len(log.read_text().splitlines())

    assert [set_up(checkout), set_up(checkout)] == [1, 1]
    assert [set_up(checkout, "report"), set_up(checkout, "report"), set_up(checkout)] == [2, 2, 2]
    shutil.copytree(checkout, copy)
    assert [set_up(copy), set_up(copy), set_up(checkout)] == [3, 3, 2 + 1]
    shutil.rmtree(checkout)
    shutil.copytree(copy, checkout)  # back, where an older line of the same place may stand
    assert set_up(checkout) == 4
    with open(checkout / "pyproject.toml", "a") as file:
        file.write("\n")
    assert [set_up(checkout), set_up(checkout)] == [5, 5]
    assert f"{copy} -m pip install" in log.read_text()


def test_every_pinned_version_installs_on_the_oldest_python():
    """README promises Python 3.11: Debian's 3.11.2 and Ubuntu's 3.11.0 too."""
    root = pathlib.Path(__file__).resolve().parents[1]
    lines = (root / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    looked_at, refused = 0, {}
    for name, version in pinned.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here
        looked_at += 1
        needed = distribution.metadata["Requires-Python"] or ""
        if not specifiers.SpecifierSet(needed).contains("3.11.0"):
            refused[f"{name}=={version}"] = needed
    assert looked_at > 100 and not refused


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "tools").glob("*.sh")))
def test_a_script_that_makes_an_environment_uses_it(name):
    """set_up.sh activates nothing: a bare `python` is whatever the machine has."""
    _, sourced, rest = (ROOT / "tools" / name).read_text().partition("source tools/set_up.sh")
    bare = re.findall(r"(?m)^(?:\(.*&& )?python3? .*", rest)
    assert not (sourced and bare), f"{name}: say .venv/bin/python in {bare}"
