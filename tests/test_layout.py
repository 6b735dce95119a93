"""The house of docs/architecture.md: who may import whom, and what from outside, read by ast."""

import ast
import functools
import graphlib
import pathlib
import re
import sys

import pytest

from qkjax import commands
from qkjax.runs import directory

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Rooms are files, and wings (folders). A room imports only from rows above its own, or
# from rooms left of it in its own row; inside a wing there is no circle.
STREET = (
    "errors muon attention losses",
    "files buckets presets sharding processes chips",
    "config",
    "model optimizer flops audit cli data __init__",
    "measures after_update train_step",
    "evaluation runs",
    "train targets trained export main tasks study verdicts report observatory commands",
)
PLACES = {
    room: (row, position)
    for row, rooms in enumerate(STREET)
    for position, room in enumerate(rooms.split())
}
PURE = (
    "muon",
    "losses",
    "attention",
    "measures.ranks",
    "measures.gram",
    "measures.spectral",
)  # arrays in, arrays out: nothing else of ours
# Answer in under a second, or are read by the report: no jax at import, however deep.
LIGHT = (
    "__init__",
    "main",
    "cli.command_line",
    "cli.config_flag",
    *(f"commands.{verb}" for verb in commands.VERBS),
    "data.check",
    "data.dataset",
    "observatory.gallery",
    "report.figures",
    "report.report",
    "runs.directory",
    "study.plan_cost",
    "study.run",
    "targets.estimate",
    "verdicts.judge",
    "verdicts.results",
    "verdicts.statistics",
)
HEAVY = {"jax", "flax", "optax", "orbax", "grain", "clu", "tensorflow_datasets"}
ONLY_IN = {
    "flax": {"model"},
    "orbax": {"runs.checkpoint"},
    "clu": {"runs.tensorboard"},
    "torch": {
        "export.verify",
        "observatory.capture",
        "observatory.loading",
        "tasks.stock_model",
    },
    "tensorflow": set(),
    "transformers": {"export.verify", "observatory.capture", "observatory.loading"},
    "wandb": {"cli.startup", "runs.wandb_writer"},
    "lm_eval": {"tasks.benchmarks", "tasks.stock_model", "tasks.scorer", "tasks.downstream"},
}


def room_of(name: str) -> str:
    return name.split(".")[0]


def path_of(name: str) -> pathlib.Path:
    return ROOT / "qkjax" / f"{name.replace('.', '/')}.py"


def module_names() -> list[str]:
    package = ROOT / "qkjax"
    files = sorted(package.rglob("*.py"))
    return [".".join(path.relative_to(package).with_suffix("").parts) for path in files]


def imports(path: pathlib.Path, *, nested: bool = True) -> set[str]:
    """Full dotted names that a file imports; `nested` also inside functions."""
    tree = ast.parse(path.read_text(), str(path))
    found = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(imported: set[str]) -> set[str]:
    """The modules of qkjax among full dotted names, by their names in `PLACES`."""
    found = set()
    for name in imported:
        if name.split(".")[0] != "qkjax":
            continue
        inner = name.removeprefix("qkjax").removeprefix(".")
        while inner and not path_of(inner).is_file():
            is_package = (ROOT / "qkjax" / inner.replace(".", "/")).is_dir()
            inner = f"{inner}.__init__" if is_package else inner.rpartition(".")[0]
        found.add(inner or "__init__")
    return found


def outsiders(imported: set[str]) -> set[str]:
    top = {name.split(".")[0] for name in imported}
    return top - set(sys.stdlib_module_names) - {"qkjax"}


def test_every_module_has_its_room_on_the_street():
    assert sorted(PLACES) == sorted({room_of(name) for name in module_names()})
    assert sum(len(rooms.split()) for rooms in STREET) == len(PLACES)  # and one place only


@pytest.mark.parametrize("name", module_names())
def test_imports_go_up_or_left(name):
    room = room_of(name)
    others = {other for other in ours(imports(path_of(name))) if room_of(other) != room}
    against = {other for other in others if PLACES[room_of(other)] >= PLACES[room]}
    assert not against, f"{name} imports {against}, which stand below or right of it"


@pytest.mark.parametrize("room", PLACES)
def test_no_circle_inside_a_wing(room):
    wing = {name for name in module_names() if room_of(name) == room}
    graph = {name: ours(imports(path_of(name))) & wing - {name} for name in wing}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_pure_numerics_import_nothing_of_ours():
    for name in PURE:
        assert ours(imports(path_of(name))) <= {*PURE}, name
        assert outsiders(imports(path_of(name))) <= {"jax", "numpy", "optax"}, name


def test_some_libraries_have_one_door():
    assert "flax" in outsiders(imports(path_of("model")))
    for name in module_names():
        for library in outsiders(imports(path_of(name))) & ONLY_IN.keys():
            assert name in ONLY_IN[library], f"{name} imports {library}"


@pytest.mark.parametrize("name", LIGHT)
def test_commands_and_reports_start_without_jax(name):
    reached, waiting = set(), {name}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        direct = imports(path_of(module), nested=False)
        assert not outsiders(direct) & HEAVY, f"{name} imports {direct & HEAVY} by way of {module}"
        waiting |= ours(direct) - reached


@functools.cache
def calls(path: pathlib.Path) -> set[str]:
    """Dotted names of what a file calls, as far as they are written out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
    return found


FOLDERS = ("qkjax", "tools", "configs", "examples")
# What only qkjax/files.py calls, but for modules that read what is not ours, or no file at all.
DOOR = {
    "os.replace": {},
    "os.rename": {},
    ".rename": {},  # of a path
    "shutil.move": {},
    "os.fsync": {},
    "fcntl.flock": {},
    "fcntl.lockf": {},
    "json.load": {},
    "json.loads": {
        "qkjax/runs/directory.py": "asks whether a last line is torn, and refuses nothing",
        "qkjax/data/origins.py": "skips lines that are damaged: their files are hashed again",
        "qkjax/data/request.py": "a copy of plain values",
        "qkjax/data/sources.py": "rows of users' text",
        "qkjax/data/overlap.py": "rows of public benchmarks",
        "qkjax/tasks/benchmarks.py": "rows of public benchmarks",
        "qkjax/data/tokenizer.py": "a tokenizer.json, which the tokenizers library has read",
        "qkjax/export/directory.py": "a tokenizer.json, which the tokenizers library has read",
        "qkjax/processes.py": "what the processes of a run tell each other",
    },
    "np.load": {},
    "np.save": {},
    "np.savez": {},
    "np.savez_compressed": {"tools/airgapped/packing.py": "into memory, for an archive"},
    "np.fromfile": {"qkjax/data/shards.py": "rows whose sha256 is known"},
    "np.memmap": {},
    "pickle.load": {},
}


def product() -> list[pathlib.Path]:
    """Every file of Python that users run; benchmarks/ and tests/ stand beside it."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("call", DOOR)
def test_there_is_one_door_to_the_disk(call):
    found = set()
    for path in product():
        if any(name.endswith(call) if call[0] == "." else name == call for name in calls(path)):
            found.add(str(path.relative_to(ROOT)))
    assert found - {"qkjax/files.py"} == {*DOOR[call]}, f"{call} belongs into qkjax/files.py"


def test_one_module_knows_the_names_of_a_run():
    """All others ask a RunDirectory; a config.json of transformers is another file."""
    paths = vars(directory.RunDirectory("run")).values()
    names = {path.name for path in paths if path.suffix}
    for name in module_names():
        found = names & {
            node.value
            for node in ast.walk(ast.parse(path_of(name).read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        stock = {"config.json"} if name.startswith(("export.", "observatory.")) else set()
        assert name == "runs.directory" or found <= stock, f"{name} writes {found} out"
    assert {"metrics.jsonl", "summary.json"} <= names


def test_the_door_is_not_passed_by_another_name():
    """`from json import loads` and `import numpy` would hide a call from the test above."""
    usual = {call.partition(".")[0]: None for call in DOOR} | {"numpy": "np"}
    for path in product():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in usual, f"{path}:{node.lineno}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    expected = usual.get(alias.name, alias.asname)
                    assert alias.asname == expected, f"{path}:{node.lineno}"


def test_configs_and_scripts_are_the_end_of_the_street():
    """configs/ only fill in a run's config or a study's; tools/*.py start a command."""
    for path in (ROOT / "configs").glob("*.py"):
        owners = {"study.plan_config", "presets"} if path.stem == "study" else {"config"}
        assert ours(imports(path)) <= owners, path.name
    siblings = {path.stem for path in (ROOT / "tools").glob("*.py")}
    for path in (ROOT / "tools").glob("*.py"):
        assert not outsiders(imports(path)) & (siblings | {"tools", "configs", "tests"}), path.name
        assert ours(imports(path)) <= {"commands.__init__"}, path.name


def test_benchmarks_stand_beside_the_package():
    for path in [*(ROOT / "qkjax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        assert "benchmarks" not in outsiders(imports(path)), path


def test_the_package_names_commands_that_a_wheel_has():
    """An installed wheel has no tools/: messages and docstrings name `qkjax VERB`."""
    for path in [*(ROOT / "qkjax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        text = path.read_text()
        scripts = re.findall(r"tools/\w+(?:/\w+)*\.(?:py|sh)", text)
        assert not scripts, f"{path.name} names {scripts}"
        verbs = re.findall(r"`qkjax ([a-z]+)", text)
        assert {*verbs} <= commands.VERBS.keys(), path.name


def test_no_test_file_borrows_from_another():
    """What several of them need is in references.py, small_model.py, small_run.py and such."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    others = {path.stem for path in paths}
    for path in paths:
        borrowed = {part for name in imports(path) for part in name.split(".")} & others
        assert not borrowed, f"{path.name} imports {borrowed}"


STARTERS = {"subprocess.run", "subprocess.Popen", "subprocess.check_output", "os.fork"}


def functions_that_start_processes(tree: ast.Module) -> list[ast.FunctionDef]:
    """Functions, methods and fixtures that call a starter, or name one that does."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    named = {}
    for node in nodes:
        inside = list(ast.walk(node))
        called = {ast.unparse(n.func) for n in inside if isinstance(n, ast.Call)}
        names = {n.id for n in inside if isinstance(n, ast.Name)}
        named[node.name] = called | names | {n.arg for n in inside if isinstance(n, ast.arg)}
    found = {*STARTERS, "multiprocessing.Process", "on_devices"}
    while more := {name for name, used in named.items() if name not in found and used & found}:
        found |= more
    return [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name in found]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda p: p.stem)
def test_what_starts_processes_is_marked(path):
    """`-m "not process"` runs where no process may be started, as in a notebook's sandbox."""
    tree = ast.parse(path.read_text(), str(path))
    whole = any(isinstance(n, ast.Assign) and "mark.process" in ast.unparse(n) for n in tree.body)
    unmarked = [
        function.name
        for function in functions_that_start_processes(tree)
        if function.name.startswith("test_")
        and not any("mark.process" in ast.unparse(mark) for mark in function.decorator_list)
    ]
    assert whole or not unmarked, f"{path.name}: mark {unmarked} with pytest.mark.process"


def test_the_picture_in_the_docs_is_this_street():
    """docs/architecture.md: rooms, rows and their order, and whether each is a file or a wing."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.findall(r"^\| (\d+) \| `(\w+)(\.py|/)` \|", page, re.MULTILINE)
    assert [(int(row), room) for row, room, _ in drawn] == [
        (row, room) for row, rooms in enumerate(STREET) for room in rooms.split()
    ]
    for _, room, ending in drawn:
        place = ROOT / "qkjax" / f"{room}{ending}"
        assert place.is_dir() if ending == "/" else place.is_file(), place
