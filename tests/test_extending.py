"""docs/extending.md: its code, put where its sentences say, works as written."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "extending.md"
# What the last sentence before a block says of it.
WHERE = {
    "file": r"new file\s`(?P<file>configs/\w+\.py)`:$",
    "entry": r"entry of\s`(?P<name>\w+)` in\s`(?P<file>[\w/]+\.py)`",
    "function": r"function in\s`(?P<file>[\w/]+\.py)`(, above\s`(?P<name>\w+)`)?:$",
    "lines": r"lines of\s`(?P<name>\w+)` in\s`(?P<file>[\w/]+\.py)`, above its last `return`:$",
    "field": r"field of\s`(?P<name>\w+)` in\s`(?P<file>[\w/]+\.py)`",
}


class Block(NamedTuple):
    kind: str  # of WHERE, or "command"
    file: str
    name: str
    text: str


def blocks() -> list[Block]:
    """The indented blocks of the page, in its order."""
    found, before = [], ""
    for part in re.split(r"\n\n(?=\S)", PAGE.read_text()):
        prose, _, code = part.partition("\n\n    ")
        before = prose or before
        if not code:
            continue
        text = re.sub(r"^    ", "", code, flags=re.MULTILINE).rstrip() + "\n"
        if text.startswith("python "):
            found.append(Block("command", "", "", text))
            continue
        sentence = re.split(r"(?<=[.)]) (?=[A-Z(])", before)[-1]
        places = {kind: re.search(where, sentence) for kind, where in WHERE.items()}
        [(kind, place)] = [(kind, place) for kind, place in places.items() if place]
        named = place.groupdict()
        found.append(Block(kind, named["file"], named.get("name") or "", text))
    return found


def put(block: Block, root: pathlib.Path) -> None:
    """Changes a copy of the repository as the page asks."""
    path = root / block.file
    if block.kind == "file":
        assert not path.exists()
        path.write_text(block.text)
        return
    source = path.read_text()
    if block.kind == "field":  # before the first one
        [start] = re.finditer(rf'^class {block.name}:\n    """.*"""\n\n', source, re.MULTILINE)
        at, text = start.end(), re.sub("^", "    ", block.text, flags=re.MULTILINE).rstrip() + "\n"
    elif block.kind == "lines":
        [body] = re.finditer(rf"^def {block.name}\(.*?(?=\n\n\n)", source, re.MULTILINE | re.DOTALL)
        at = source.rindex("\n    return ", *body.span()) + 1
        text = re.sub("^", "    ", block.text, flags=re.MULTILINE).rstrip() + "\n"
    elif block.kind == "entry":
        [start] = re.finditer(rf"^{block.name}\b.*= \{{", source, re.MULTILINE)
        at, text = start.end(), "\n" + re.sub("^", "    ", block.text, flags=re.MULTILINE).rstrip()
    elif block.name:
        [start] = re.finditer(rf"^{block.name}\b", source, re.MULTILINE)
        at, text = start.start(), block.text + "\n\n"
    else:
        at, text = len(source), "\n\n" + block.text
    path.write_text(source[:at] + text + source[at:])


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of the repository with everything of the page in it."""
    root = tmp_path_factory.mktemp("extended")
    for folder in ("qkjax", "configs", "tools"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for block in blocks():
        if block.kind != "command":
            put(block, root)
    return root


def python(root: pathlib.Path, *arguments: str) -> str:
    paths = os.pathsep.join([str(root), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_page_has_every_kind_of_block():
    kinds = [block.kind for block in blocks()]
    assert [kinds.count(kind) for kind in (*WHERE, "command")] == [2, 5, 3, 1, 1, 4]


ARMS = """
import json, pathlib, sys
from qkjax import config, presets
from qkjax.cli import config_flag
from qkjax.report import quantities
files = [pathlib.Path("configs") / f"{name}.py" for name in ("muon_noqk_mup", "lion_noqk")]
arms = [config.resolve(config_flag.load(file, "tiny")) for file in files]
print(json.dumps([[arm.arm for arm in arms], arms[0].muon.scale, arms[1].optimizer.learning_rate,
                  arms[1].optimizer.embedding_clip,
                  [name in quantities.NAMES for name in ("nrank", "key_mean_length")],
                  "jax" in sys.modules]))
"""


@pytest.mark.process
def test_arms_optimiser_field_and_metric_are_known(extended):
    found = json.loads(python(extended, "-c", ARMS))
    assert found == [["muon_noqk_mup", "lion_noqk"], "mup", 2.4e-4, 0.0, [True, True], False]


RUN = """
import json, pathlib
import qkjax
qkjax.prepare_process()
import small_run
from qkjax import train
dataset = small_run.make_dataset(pathlib.Path("dataset"))
config = small_run.make_config(dataset, "lion", optimizer__embedding_clip=0.1,
                               train__tokens=3 * small_run.TOKENS_PER_STEP)
train.train_and_evaluate(config, "run")
"""


@pytest.mark.long
@pytest.mark.process
def test_a_run_and_the_commands_of_the_page_work_as_written(extended):
    """Lion with the new hook, measured by the new metric; the study's plans; the figure."""
    python(extended, "-c", RUN)
    rows = [json.loads(line) for line in (extended / "run" / "metrics.jsonl").open()]
    assert all(1 <= row["nrank/key/post_rope/raw"] <= 16 for row in (rows[0], rows[3]))
    for row in (rows[0], rows[3]):  # a mean is no longer than the mean length
        assert 0 < row["norm/mean_key"] < row["norm/key"]
    assert all(row["train/longest_row"] > 0.1 for row in rows[1:])
    table = (extended / "run" / "parameters.txt").read_text()
    assert re.search(r"attention/key/kernel .* lion +0\.00024 +0\.5\n", table)
    assert re.search(r"embedding .* adamw +0\.0012 ", table)
    shutil.copytree(extended / "run", extended / "other")
    for block in blocks():
        if block.kind == "command":
            command = block.text.replace("RUN RUN", "run other").split()[1:]
            planned = ["--dry_run"] if "run_study" in block.text else ["--out=figures"]
            printed = python(extended, *command, *planned)
            for arm in re.findall(r"--config\.arms=(\S+)", block.text):
                assert all(f"runs/{name}/seed_42" in printed for name in arm.split(","))
    assert list((extended / "figures").glob("*.svg"))
