"""What examples/ says runs: scripts as they stand, notebooks cell by cell."""

import json
import pathlib
import re
import runpy
import subprocess
import sys
import tomllib

import pytest

from qkjax import commands

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def test_the_notebook_reads_a_published_run(tmp_path, capsys, monkeypatch):
    """From the folder where Jupyter opens it; the ratio by hand is the recorded one."""
    monkeypatch.chdir(EXAMPLES)
    notebook = json.loads((EXAMPLES / "read_a_run.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # nothing of one machine is committed
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    names = runpy.run_path(str(script))
    recorded = names["summary"]["pr/key/post_rope/raw"]
    assert names["by_hand"] == pytest.approx(recorded, rel=2**-10)  # float16 has 11 bits
    assert f"recorded {recorded:.2f}" in capsys.readouterr().out
    assert names["spectra"]["key_post_rope_raw"].shape == (4, 2, 64)


@pytest.mark.long
def test_muon_trains_a_model_of_flax_nnx(capsys):
    names = runpy.run_path(str(EXAMPLES / "muon_in_flax_nnx.py"))
    printed = capsys.readouterr().out
    start, end = map(float, re.findall(r"\d\.\d+", printed)[:2])
    assert end < start / 4, printed
    kernels = {layer: getattr(names["net"], layer).kernel[...] for layer in ("up", "down")}
    assert {layer: names["rule"](k) for layer, k in kernels.items()} == {
        "up": "muon",
        "down": "adamw",
    }


@pytest.mark.long
def test_the_participation_ratio_of_torch_vectors(capsys):
    pytest.importorskip("torch")
    names = runpy.run_path(str(EXAMPLES / "participation_ratio_in_torch.py"))
    keys = names["keys"].double()
    assert keys.shape == (512, 2, 32)
    s = names["torch"].linalg.svdvals(keys[:, 1] - keys[:, 1].mean(0))
    assert f"head 1: raw {names['raw']:.1f}, centred {s.sum() ** 2 / (s**2).sum():.1f} of 32" in (
        capsys.readouterr().out
    )


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: (instruction, its arguments)."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]


def test_the_dockerfile_installs_the_package_and_runs_as_a_user():
    """Docker is not asked: what it copies exists, is let through, and is what a build reads."""
    found = instructions()
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in found} == known and found[0][0] == "FROM"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = {name for kind, rest in found if kind == "COPY" for name in rest.split()[:-1]}
    needed = {"pyproject.toml", "setup.py", "constraints.txt", "qkjax", "configs"}
    assert copied == needed | {project["readme"], *project["license-files"]}
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {name[1:] for name in ignored if name[0] == "!"} == copied and ignored[0] == "*"
    extras = re.findall(r"EXTRAS=([\w,]+)", (ROOT / "Dockerfile").read_text())
    assert len(extras) > 1
    assert {name for each in extras for name in each.split(",")} <= {
        *project["optional-dependencies"]
    }
    base = re.fullmatch(r"python:3\.(\d+)-slim-\w+", found[0][1])
    assert base and project["requires-python"] == f">=3.{base[1]}"
    users = [rest for kind, rest in found if kind == "USER"]
    assert users and users[-1] != "root"
    for kind, rest in found:
        if kind in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list), "the exec form: signals reach the run"


@pytest.mark.process
def test_hadolint_finds_nothing_in_the_dockerfile():
    """It reads the shell of RUN lines as well (ShellCheck)."""
    hadolint = pathlib.Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("no hadolint for this platform")
    found = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr


def test_a_command_in_the_dockerfile_is_one_that_exists():
    words = re.findall(r"qkjax(?::\w+)? (\w+) --", (ROOT / "Dockerfile").read_text())
    assert words and set(words) <= {*commands.VERBS}
