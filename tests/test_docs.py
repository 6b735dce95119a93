"""README and docs name what exists: links, headings, files of the repository, modules."""

import ast
import csv
import dataclasses
import importlib.util
import json
import pathlib
import re
import shutil
import tarfile

import packing
import pytest
import synthetic_study
from synthetic_study import LOSS, PR, PR_BEFORE

import qkjax
from qkjax import files
from qkjax.data import manifest as manifest_lib
from qkjax.data import origins
from qkjax.data import tokenizer as tokenizer_lib
from qkjax.report import csv as report_csv
from qkjax.report import material
from qkjax.runs.directory import RunDirectory
from qkjax.verdicts import judge, results

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# The lab book tells what was: its older entries name files as they were called then.
PRESENT = [page for page in PAGES if page.name not in ("log.md", "CHANGELOG.md")]
FOLDERS = "benchmarks|docs|qkjax|tests|tools"
# An error beside its heading, two errors on one line, or one at the end of a sentence.
IN_PROSE = re.compile(r"Raises: *\S.*|^ *Raises \w+Error.*|.*[.;] [A-Z]\w+Error\b.*", re.MULTILINE)


# Pages that a reader opens; the lab book opens with how it is kept.
OPENING = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md"]


def name_of(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: pathlib.Path) -> set[str]:
    """The headings of a page as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links {target}"


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_files_that_are_named_exist(page):
    """`tools/test.sh`, `qkjax/study/*.py`, `tests/` and their like."""
    named = re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*-]*[\w*/]", page.read_text())
    missing = [name for name in set(named) if not any(ROOT.glob(name.rstrip("/")))]
    assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_modules_that_are_named_exist(page):
    """`python -m qkjax.main`, and the module of a dotted name such as `qkjax.muon.muon`."""
    for name in re.findall(r"\bqkjax\.(?!json\b)[\w.]*\w", page.read_text()):
        parts = name.split(".")
        modules = [ROOT.joinpath(*parts[:end]) for end in range(2, len(parts) + 1)]
        found = [path for path in modules if path.is_dir() or path.with_suffix(".py").is_file()]
        assert found or hasattr(qkjax, parts[1]), f"{page.name} names {name}"


def test_the_tree_in_the_readme_is_the_repository():
    """Every file and folder of the tree exists, and no wing of the package is left out."""
    page = (ROOT / "README.md").read_text()
    tree = page[page.index("## The code") :].split("\n\n")[1]
    drawn, folder = set(), ROOT
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        if indent == 4:
            folder = ROOT / name
        if indent in (4, 6):
            drawn.add(folder if indent == 4 else folder / name)
    assert len(drawn) > 12
    assert all(path.exists() for path in drawn), [path for path in drawn if not path.exists()]
    wings = {path.parent for path in (ROOT / "qkjax").glob("*/__init__.py")}
    assert wings <= drawn, wings - drawn


@pytest.fixture(scope="module")
def generated():
    """docs/write_generated.py as a module."""
    spec = importlib.util.spec_from_file_location("written", ROOT / "docs" / "write_generated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_screen_is_what_the_archives_say(generated):
    """Figure, sentence and table: nobody writes them by hand."""
    by_recipe = generated.published()
    runs = generated.read_all(by_recipe["original"])
    assert len(runs) > 2
    page = generated.README.read_text()
    again = "Run python docs/write_generated.py."
    assert generated.with_block(page, "results", generated.first_screen(by_recipe)) == page, again
    assert generated.svg(runs) == generated.FIGURE.read_text(), again
    assert all(hue in generated.FIGURE.read_text() for hue in generated.DARK.values())


def test_the_first_screen_names_seeds_and_what_is_missing(generated):
    runs = generated.read_all(generated.published()["original"])
    first = runs["adamw_qk"][0]
    other = first._replace(seed=137, values={k: v + 1 for k, v in first.values.items()})
    two = {arm: [first, other] if arm == "adamw_qk" else of[:1] for arm, of in runs.items()}
    two.pop("muon_qk", None)
    assert "1 seed of 3, so nothing is decided; not run yet: Muon + QK-Norm" in " ".join(
        generated.block(two).split()
    )
    assert "| AdamW + QK-Norm | 42, 137 | 4.815 (4.315 to 5.315) |" in generated.block(two)
    named = ("adamw_qk", "adamw_noqk")  # one seed of a control that is not named counts for nothing
    both = {arm: [first, other] for arm in named} | {"adamw_qk_to_one": [first]}
    assert "2 seeds of 3, so nothing is decided" in " ".join(generated.block(both).split())
    three = {arm: [first, other, other._replace(seed=256)] for arm in generated.ARMS}
    assert "3 seeds." in " ".join(generated.block(three).split())


H1 = "H1: Does QK-Norm lower the dimensionality of attention keys?"


def test_the_first_screen_has_the_verdicts_of_every_recipe(generated, tmp_path):
    options = {"seeds": (42, 137, 256), "scale": "small", "noise": {PR: 0.1, PR_BEFORE: 0.1}}
    controls = {f"adamw_qk_{word}": {PR: 40.0} for word in ("frozen", "undecayed")}
    decays = synthetic_study.arms(64, adamw_qk={PR: 19.0}, **controls)
    synthetic_study.write(tmp_path / "original", decays, recipe="original", **options)
    alike = synthetic_study.arms(64)
    synthetic_study.write(tmp_path / "fixed", alike, recipe="fixed", **options)
    found = {name: results.load_study(tmp_path / name) for name in ("original", "fixed")}
    rows = dict(_cells(generated.verdicts(found)))
    assert [words.split(";")[0] for words in rows[H1]] == [
        "post-RoPE raw: supported",
        "post-RoPE raw: negligible",
    ]
    assert rows["What of the PR that QK-Norm costs AdamW is the decay of gamma?"] == [
        "decay explains more than half",
        "not asked",
    ]
    assert not any("Muon is the decay" in question for question in rows)
    assert not any(question.startswith("H5") for question in rows)


def test_published_numbers_are_those_of_the_archives(generated, tmp_path):
    """results.csv and the tables of the page of every folder of docs/results."""
    assert generated.studies()
    for folder in generated.studies():
        page = folder / "README.md"
        written = generated.with_tables(page.read_text(), folder)
        assert written == page.read_text(), "Run python docs/write_generated.py."
        workdir = tmp_path / folder.name
        workdir.mkdir()
        generated.unpack(folder, workdir)
        numbers = report_csv.results_csv(material.gather(results.load_study(workdir)))
        made, published = (
            {tuple(row[:-1]): row[-1] for row in csv.reader(text.splitlines())}
            for text in (numbers, (folder / "results.csv").read_text())
        )
        assert made.keys() == published.keys()
        for name, value in published.items():
            try:
                assert float(made[name]) == pytest.approx(float(value), rel=1e-9, nan_ok=True), name
            except ValueError:  # a word or a digest
                assert made[name] == value, name


def test_a_published_sweep_is_unpacked_with_its_runs(generated, tmp_path):
    """As docs/results/small_fixed will hold it: the rates, and the short runs in one archive."""
    study, folder, workdir = (tmp_path / name for name in ("study", "folder", "workdir"))
    synthetic_study.write(study, synthetic_study.arms(64), seeds=(42, 137), scale="small")
    rates = {arm: {0.5: 3.6, 1.0: 3.5} for arm in synthetic_study.ARMS}
    prs = {"adamw_qk": {0.5: 30.0, 1.0: 20.0}}
    synthetic_study.write_sweep(study, rates, prs=prs)
    files.write_json(study / "dataset.json", {})
    (archive,) = packing.pack(study / "sweep", tmp_path / "packed", spectra="last")
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("lr_*", "runs"))
    archive.rename(folder / "sweep" / "runs.tar.gz")
    workdir.mkdir()
    generated.unpack(folder, workdir)
    found = material.gather(results.load_study(workdir))
    assert found.sweep_prs == {"adamw_qk": {0.5: 30.0, 1.0: 20.0}}
    assert found.study.learning_rates["muon_qk"]["chosen"] == 1.0


def test_contrasts_and_predictions_of_a_study(generated, tmp_path):
    """Differences of the means that were put in; words by where the intervals lie."""
    prs = {"noqk": 30.0, "qk": 19.0, "qk_undecayed": 30.4, "qk_frozen": 36.0, "qk_to_one": 41.0}
    changed = {f"adamw_{name}": {PR: pr, PR_BEFORE: 20.0} for name, pr in prs.items()}
    changed["adamw_qk"] |= {PR_BEFORE: 11.0, LOSS: 3.6}
    arms = synthetic_study.arms(64, **changed, muon_noqk={PR: 45.0})
    options = {"seeds": (42, 137, 256), "scale": "small", "recipe": "original"}
    noise = {PR: 0.1, PR_BEFORE: 0.1}
    synthetic_study.write(tmp_path, arms, noise=noise, **options)
    study = results.load_study(tmp_path)
    tables = generated.contrasts
    rows = dict(_cells(tables.contrasts(study)))
    assert rows["AdamW: gamma stays 1 - no QK-Norm"][0] == "42, 137, 256"
    for name, low, high in (
        ("AdamW: gamma stays 1 - no QK-Norm", 5, 7),
        ("AdamW: gamma decays to 0 - no QK-Norm", -12, -10),
        ("AdamW: gamma decays to 0 - gamma does not decay", -12.5, -10.5),
    ):
        first, last = map(float, re.search(r"\((.*) to (.*)\)", rows[name][4]).groups())
        assert low < first < last < high, rows[name]
    found = [cells for _, cells in _cells(tables.predictions(study))]
    assert [cells[-1] for cells in found] == [
        *("refuted", "refuted", "held", "held", "refuted"),  # 58 at the start, 50 to 55 predicted
        *("needs two seeds", "refuted", "needs two seeds", "refuted", "held"),  # no post-norm, q·k
    ]


def test_contrasts_use_the_seeds_that_their_arms_have(generated, tmp_path):
    """An arm with fewer seeds takes none from others, and a word of few seeds says so."""
    changed = {"adamw_qk_frozen": {PR: 36.0}, "adamw_qk": {PR: 19.0}}
    arms = synthetic_study.arms(64, **changed)
    missing = [("adamw_qk_frozen", 137), *(("muon_noqk", seed) for seed in (42, 137))]
    options = {"seeds": (42, 137), "scale": "small", "noise": {PR: 0.1}, "missing": missing}
    synthetic_study.write(tmp_path, arms, recipe="original", **options)
    study = results.load_study(tmp_path)
    rows = dict(_cells(generated.contrasts.contrasts(study)))
    assert rows["AdamW: gamma decays to 0 - no QK-Norm"][0] == "42, 137"
    assert (
        rows["AdamW: gamma stays 1 - no QK-Norm"][0] == "42"
        and "(" not in rows["AdamW: gamma stays 1 - no QK-Norm"][4]
    )
    found = [cells for _, cells in _cells(generated.contrasts.predictions(study))]
    assert [cells[-1] for cells in found[2:5]] == ["so far refuted", "needs two seeds"] * 1 + [
        "needs two seeds"
    ]
    without = dataclasses.replace(study, runs={})
    assert generated.contrasts.contrasts(without) == ""
    assert all(
        cells[-1] == "needs two seeds"
        for _, cells in _cells(generated.contrasts.predictions(without))
    )


def test_the_interval_of_two_of_the_four_arms_is_that_of_the_report(generated, tmp_path):
    options = {"seeds": (42, 137, 256), "scale": "small", "recipe": "fixed"}
    arms = synthetic_study.arms(64)
    noise = {PR: {arm: 3.0 if "adamw" in arm else 0.1 for arm in arms}}
    synthetic_study.write(tmp_path, arms, noise=noise, **options)
    study = results.load_study(tmp_path)
    clauses = {clause.name: clause for clause in judge.judge(study).verdict("H4").clauses}
    low, high = clauses["H4 PR against Muon+QK"].deciding
    row = dict(_cells(generated.contrasts.contrasts(study)))[
        "Muon: gamma does not decay - no QK-Norm"
    ]
    assert row[4].endswith(f"({-high:+.1f} to {-low:+.1f})")


def test_predictions_of_recipe_fixed(generated, tmp_path):
    """Each of them true, then each of them false."""
    true = {
        "adamw_qk": {PR: 30.0, LOSS: 3.6},
        "adamw_noqk": {PR: 28.0, PR_BEFORE: 22.0, LOSS: 3.6},
        "muon_qk": {PR: 41.0},
        "muon_noqk": {PR: 40.0, LOSS: 3.4},
    }
    false = {
        "adamw_qk": {PR: 18.0, LOSS: 3.7},
        "adamw_noqk": {PR: {122: 33.0, 244: 22.0, 1500: 20.0}, PR_BEFORE: 19.0, LOSS: 3.5},
        "muon_qk": {PR: 35.0},
        "muon_noqk": {PR: 40.0, LOSS: 3.49},
    }
    options = {"seeds": (42, 137, 256), "scale": "small", "recipe": "fixed"}
    rates = {arm: {1.0: 3.6, 2.0: 3.5, 4.0: 3.7} for arm in true}
    for name, changed, word in (("true", true, "held"), ("false", false, "refuted")):
        arms = synthetic_study.arms(64, **changed)
        directory = synthetic_study.write(
            tmp_path / name, arms, noise={PR: 0.05, LOSS: 0.0005}, **options
        )
        if word == "refuted":
            rates["muon_qk"] = {1.0: 3.4, 2.0: 3.5, 4.0: 3.7}
        synthetic_study.write_sweep(directory, rates)
        found = _cells(generated.contrasts.predictions(results.load_study(directory)))
        assert [cells[-1] for _, cells in found] == [*[word] * 7, f"so far {word}"]
    (tmp_path / "true" / "sweep" / "learning_rates.json").unlink()
    none = dataclasses.replace(results.load_study(tmp_path / "true"), runs={})
    found = _cells(generated.contrasts.predictions(none))
    assert [name for name, _ in found] == [f"F{number}" for number in range(1, 9)]
    assert {cells[-1] for _, cells in found} == {"needs two seeds"}


def test_the_page_says_where_decay_is_not_the_cause(generated, tmp_path):
    arms = synthetic_study.arms(64, adamw_qk={PR: 19.0}, adamw_qk_undecayed={PR: 19.2})
    options = {"seeds": (42, 137, 256), "scale": "small", "recipe": "original"}
    synthetic_study.write(tmp_path, arms, noise={PR: 0.1}, **options)
    said = generated.contrasts.predictions(results.load_study(tmp_path))
    assert said.startswith("**Decay of gamma is not the cause of the fall at this scale.**")


def _cells(table: str) -> list[tuple[str, list[str]]]:
    """The rows of a table by their first cell, or their second after a number."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return [(row[0], row[1:]) for row in rows]


@pytest.mark.long
def test_published_reports_are_those_of_the_archives(generated, tmp_path):
    for folder in generated.studies():
        generated.write_report(folder, tmp_path)
        made = {path.name for path in (tmp_path / "figures").glob("*.svg")}
        assert made == {path.name for path in (folder / "figures").glob("*.svg")}
        assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()


def test_the_deviations_are_those_of_the_configs(generated):
    page = generated.DEVIATIONS.read_text()
    assert generated.recipes() in page, "Run python docs/write_generated.py."


def test_the_address_of_tensorboard_pins_what_a_run_writes():
    address = re.search(r"\?pinnedCards=(\[.*\])#timeseries", (ROOT / "docs/train.md").read_text())
    with tarfile.open(next((ROOT / "docs" / "results").rglob("*.tar.gz"))) as archive:
        name = next(name for name in archive.getnames() if name.endswith("metrics.jsonl"))
        rows = map(json.loads, archive.extractfile(name).read().splitlines())
        written = {tag for row in rows for tag in row}
    for card in json.loads(address[1]):
        assert card["tag"] in written, card


def test_the_readme_is_read_in_a_minute():
    assert 80 < len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", OPENING, ids=name_of)
def test_a_page_opens_with_what_its_reader_can_do(page):
    opening = page.read_text().split("\n\n")[1]
    assert opening.startswith("After this page you "), page.name


def test_the_site_lists_every_page():
    """mkdocs.yml's nav; the build itself is tests/test_site.py."""
    listed = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    missing = [str(page) for page in pages if f"- {page}\n" not in listed]
    assert len(pages) > 15 and not missing, f"mkdocs.yml: nav lacks {missing}"


def test_imports_written_in_strings_and_scripts_exist():
    """No linter reads the code for other processes that tests hold in strings."""
    scripts = [p for folder in FOLDERS.split("|") for p in (ROOT / folder).rglob("*.[ps][yh]")]
    assert len(scripts) > 100
    for script in scripts:
        for module, names in re.findall(
            r"\bfrom (qkjax[.\w]*) import (\w+(?:, \w+)*)", script.read_text()
        ):
            place = ROOT.joinpath(*module.split("."))
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            assert file.is_file(), f"{script.name}: from {module}"
            for name in names.split(", "):
                is_module = (place / name).is_dir() or (place / f"{name}.py").is_file()
                assert is_module or re.search(rf"\b{name}\b", file.read_text()), (
                    f"{script.name}: from {module} import {name}"
                )


def test_the_format_names_every_file_of_a_run_and_a_dataset():
    page = (ROOT / "docs" / "run_directory.md").read_text()
    of_a_run = {path.name for path in vars(RunDirectory("here")).values()} - {"here"}
    assert len(of_a_run) > 6
    modules = (manifest_lib, origins, tokenizer_lib)
    for name in sorted(of_a_run | {module.FILE_NAME for module in modules}):
        assert re.search(rf"`{re.escape(name)}[`/]", page), name


def test_docstrings_name_errors_in_one_form():
    """In a block of their own, `Raises:`, one item a line: `UsageError: what is wrong.`"""
    modules = [path for folder in ("benchmarks", "qkjax") for path in (ROOT / folder).rglob("*.py")]
    found = []
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                odd = IN_PROSE.findall(ast.get_docstring(node) or "")
                found += [f"{module.name}: {line}" for line in odd]
    assert len(modules) > 100 and not found, "\n".join(found)


def test_the_tests_that_reliability_names_exist():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    found = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 30
    assert not [name for name in named if f"def {name}(" not in found]
