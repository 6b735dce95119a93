"""The one-way street of DESIGN.md section 1, and who may import what from outside, read by ast."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A module imports only from rows above its own, or from modules left of it in its own row.
STREET = [
    """
    startup __init__ data.__init__ errors presets command_line config config_flag signals
    spectral moments muon losses sharding data.manifest
    """,
    """
    flops data.docstrings data.documents data.hub data.tfds_text data.sources data.holdout
    data.tokenizer data.request data.overlap data.shards data.staging data.encoding data.reading
    data.mixing data.journal data.job data.prepare data.check data.dataset data.pipeline attention
    attention_check
    model optimizer decoder
    """,
    """
    train_step probes eval_step environment run_directory tensorboard writers checkpoint
    """,
    """
    progress evaluation resources rank_curves export.__init__ export.trained_run rank_surgery train
    determinism export.hf export.card export.verify export.directory
    export.benchmarks export.scores export.stock_model export.scorer export.downstream generation
    """,
    """
    study.__init__ study.quantities study.run_spectra study.study_files study.scores
    study.results study.statistics
    study.judgement study.clauses study.stability study.hypotheses study.items study.verdicts
    study.drawing study.figures study.arms study.original study.report_blocks
    study.report_charts study.report_data study.report_spectra study.report_verdicts
    study.report_sweep study.report_losses study.report_keys study.report_downstream
    study.report_record study.report_csv study.report_svg study.report_style
    study.report_html study.report_markdown study.report
    study.packing study.plan_config study.plan_arms study.plan
    study.plan_cost study.plan_lines study.sweep study.watching study.states study.table
    study.devices study.run
    """,
    """
    main
    """,
    """
    benchmark.__init__ benchmark.subjects benchmark.inputs benchmark.arrays benchmark.jax_work
    benchmark.run_work benchmark.torch_model benchmark.torch_muon benchmark.torch_work
    benchmark.worker benchmark.interleave benchmark.table benchmark.data
    """,
]
PLACES = {
    name: (row, position)
    for row, names in enumerate(STREET)
    for position, name in enumerate(names.split())
}
PURE = ("spectral", "muon", "losses", "attention")  # arrays in, arrays out: nothing of ours
# Answer in under a second, or are read by the report: no jax at import, however deep.
LIGHT = (
    "main",
    "command_line",
    "config_flag",
    "run_directory",
    "data.dataset",
    "data.check",
    "benchmark.subjects",
    "benchmark.interleave",
    "benchmark.table",
    "benchmark.data",
    "study.figures",
    "study.packing",
    "study.plan_cost",
    "study.plan_lines",
    "study.report",
    "study.results",
    "study.run",
    "study.statistics",
    "study.verdicts",
)
HEAVY = {"jax", "flax", "optax", "orbax", "grain", "clu", "tensorflow_datasets"}
ONLY_IN = {
    "flax": {"model"},
    "orbax": {"checkpoint"},
    "clu": {"tensorboard"},
    "torch": {
        "export.verify",
        "export.stock_model",
        "benchmark.torch_model",
        "benchmark.torch_muon",
        "benchmark.torch_work",
    },
    "tensorflow": set(),
    "transformers": {"export.verify"},
    "lm_eval": {"export.benchmarks", "export.stock_model", "export.scorer", "export.downstream"},
}


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


def test_every_module_has_its_place_on_the_street():
    assert sorted(PLACES) == module_names()
    assert sum(len(names.split()) for names in STREET) == len(PLACES)  # and one place only


@pytest.mark.parametrize("name", PLACES)
def test_imports_go_up_or_left(name):
    against = {other for other in ours(imports(path_of(name))) if PLACES[other] >= PLACES[name]}
    assert not against, f"{name} imports {against}, which stand below or right of it"


def test_pure_numerics_import_nothing_of_ours():
    for name in PURE:
        assert not ours(imports(path_of(name))), name
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


def test_commands_and_configs_are_the_end_of_the_street():
    """configs/ only fill in a run's config or a study's; no file of tools/ imports another one."""
    for path in (ROOT / "configs").glob("*.py"):
        owner = "study.plan_config" if path.stem == "study" else "config"
        assert ours(imports(path)) <= {owner}, path.name
    siblings = {path.stem for path in (ROOT / "tools").glob("*.py")}
    for path in (ROOT / "tools").glob("*.py"):
        assert not outsiders(imports(path)) & (siblings | {"tools", "configs", "tests"}), path.name
