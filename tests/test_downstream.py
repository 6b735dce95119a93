"""Downstream evaluation: two backends that agree, what is written, files, refusals, no network."""

import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import random_run
import small_run
import synthetic_study

from qkjax import errors, files
from qkjax.data import prepare
from qkjax.export import directory, hf
from qkjax.runs import checkpoint
from qkjax.tasks import benchmarks, downstream
from qkjax.verdicts import judge, results

pytest.importorskip("lm_eval", reason="tasks are scored with lm-eval")
from qkjax.tasks import scorer

ROOT = pathlib.Path(__file__).resolve().parents[1]
T = 384  # tokens: some of the prompts below are longer
SHOTS, ITEMS, PASSAGES = 12, 10, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run, a run whose documents start with nothing, an export of the first; tasks/."""
    place = tmp_path_factory.mktemp("downstream")
    fields = {"model__sequence_length": T, "train__tokens_per_step": T, "train__tokens": 20 * T}
    for name, end_of_text in (("run", True), ("joined", False)):
        dataset = small_run.make_dataset(place / f"{name}-dataset", end_of_text=end_of_text)
        random_run.make(
            place / name,
            dataset,
            "learned",
            **fields,
            eval__at_tokens=(),
            data__end_of_text=end_of_text,
        )
    directory.export(directory.Request(place / "run", place / "model"), report=lambda line: None)
    write_tasks(place / "tasks")
    return place


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face model needs accelerate")
    return pytest.importorskip("torch", reason="lm-eval's Hugging Face model needs torch")


def write_tasks(folder: pathlib.Path) -> None:
    """Made-up items under the published columns, of very different lengths."""
    chance = random.Random(0)

    def words(low: int, high: int) -> str:
        size = chance.randint(low, high)
        return " ".join("".join(chance.choices("etaoin", k=4)) for _ in range(size))

    def question(longest: int) -> dict[str, Any]:
        return {
            "ind": 1,
            "activity_label": words(1, 1),
            "ctx_a": words(2, longest),
            "ctx_b": words(0, 1),
            "ctx": "",
            "endings": [words(1, 5) for _ in range(4)],
            "label": chance.choice(["0", "1", "2", "3"]),
        }

    rows = [question(60) for _ in range(ITEMS)]
    write_rows(folder / "hellaswag" / "hellaswag_val.reconstructed.jsonl", rows)
    shots = [question(3) for _ in range(SHOTS)]
    write_rows(folder / "hellaswag" / "hellaswag_train_13.original.jsonl", shots)
    exact = {"exact_vs_lm_eval": [index % 2 == 0 for index in range(ITEMS)]}
    (folder / "hellaswag" / "hellaswag_val.origin.json").write_text(json.dumps(exact))
    passages = [{"text": words(5, 30)} for _ in range(PASSAGES)]
    write_rows(folder / "lambada" / "lambada_test.jsonl", passages)


def write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def score(place: pathlib.Path, out: pathlib.Path, **options: Any) -> tuple[dict, list[dict]]:
    """What `run` writes: the JSON file and the items."""
    values = {"tasks": ("hellaswag", "lambada"), "data_dir": place / "tasks", **options}
    if "model" not in values:
        values.setdefault("workdir", place / "run")
    returned = downstream.run(downstream.Request(out=out, **values), report=lambda line: None)
    written = files.read_object(out, "")
    assert json.loads(json.dumps(returned)) == written
    lines = out.with_suffix(".items.jsonl").read_text().splitlines()
    return written, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def ours(place) -> tuple[dict, list[dict]]:
    return score(place, place / "results" / "jax.json")


@pytest.fixture(scope="module")
def stock(torch, place) -> tuple[dict, list[dict]]:
    return score(place, place / "results" / "hf.json", model=place / "model")


def assert_agreement(first: list[dict], second: list[dict]) -> None:
    """Item by item: the same questions, log-likelihoods within 1e-3, the same answers."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for name in ("task", "index", "item_sha256", "gold", "acc", "acc_norm"):
            assert one.get(name) == other.get(name), name
        np.testing.assert_allclose(scores(one), scores(other), atol=1e-3, rtol=0)


def scores(item: dict) -> list[float]:
    return item.get("log_likelihoods") or [item["log_likelihood"]]


# --------------------------------------------------------------------------------------------
# Two backends.


def test_backends_agree_on_whole_and_on_truncated_prompts(ours, stock):
    assert_agreement(ours[1], stock[1])
    for task in ("hellaswag", "lambada"):
        for name in ("n", "truncated", "tokens_unshared", "data_sha256", "num_fewshot", "name"):
            assert ours[0]["tasks"][task][name] == stock[0]["tasks"][task][name], name
    assert 4 <= ours[0]["tasks"]["hellaswag"]["truncated"] <= 3 * ITEMS
    assert ours[0]["tasks"]["lambada"]["truncated"] == 0
    assert ours[0]["bos"] == stock[0]["bos"] and ours[0]["run"] == stock[0]["run"]


def test_the_stock_path_shares_nothing(ours, stock):
    result = stock[0]["tasks"]["hellaswag"]
    assert result["tokens_computed"] == result["tokens_unshared"]
    assert ours[0]["tasks"]["hellaswag"]["tokens_computed"] < result["tokens_computed"] / 1.4


def test_a_run_can_be_scored_by_the_stock_path_too(stock, place, tmp_path):
    """By way of an export that nobody sees."""
    found, items = score(
        place, tmp_path / "out.json", tasks=("lambada",), workdir=place / "run", backend="hf"
    )
    assert items == [item for item in stock[1] if item["task"] == "lambada"]
    assert found["backend"] == "hf" and found["run"] == stock[0]["run"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_prompts_begin_as_documents_began(torch, ours, place, tmp_path):
    assert ours[0]["bos"] == {
        "added": True,
        "token": "<|endoftext|>",
        "token_id": 0,
        "why": "documents in training came after the end-of-text token",
    }
    found = {
        backend: score(
            place, tmp_path / f"{backend}.json", workdir=place / "joined", backend=backend, limit=2
        )
        for backend in ("jax", "hf")
    }
    for record, _ in found.values():
        assert record["bos"]["added"] is False
        assert record["bos"]["why"] == "the training data has no end-of-text tokens"
    assert_agreement(found["jax"][1], found["hf"][1])


def test_a_foreign_directory_is_left_as_its_tokenizer_is(torch, place, tmp_path):
    model = shutil.copytree(place / "model", tmp_path / "model")
    (model / hf.RECORD_FILE).unlink()
    found, _ = score(place, tmp_path / "out.json", model=model, tasks=("lambada",), limit=2)
    assert found["bos"]["added"] is False and "no qkjax.json" in found["bos"]["why"]
    assert set(found["run"].values()) == {None}


@pytest.mark.process
def test_the_jax_path_needs_no_torch(place, tmp_path):
    """Not even where torch is installed: neither it nor transformers is imported."""
    code = (
        "import sys, pathlib\n"
        "from qkjax.cli import startup; startup.prepare_process()\n"
        "from qkjax.tasks import downstream\n"
        f"place, out = pathlib.Path({str(place)!r}), pathlib.Path({str(tmp_path / 'out.json')!r})\n"
        "request = downstream.Request(('hellaswag', 'lambada'), out, workdir=place / 'run',\n"
        "    data_dir=place / 'tasks', limit=1)\n"
        "downstream.run(request)\n"
        "assert 'lm_eval' in sys.modules\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# --------------------------------------------------------------------------------------------
# What is written.


def test_json_says_what_was_measured(ours, place):
    found = ours[0]
    run = found["run"]
    assert list(run) == [
        "arm",
        "seed",
        "step",
        "params_sha256",
        "dataset_fingerprint",
        "scale",
        "recipe",
    ]
    assert (run["arm"], run["seed"], run["step"]) == ("muon_qk", 42, random_run.STEP)
    meta = checkpoint.Checkpoints(place / "run" / "checkpoints", read_only=True).meta(20)
    assert run["params_sha256"] == meta["params_sha256"]
    assert (found["format_version"], found["backend"]) == (1, "jax")
    assert found["sample"] is False and found["limit"] is None and found["weights"] == "float32"
    assert found["versions"]["lm_eval"] and found["versions"]["jax"] and found["wall_seconds"] > 0
    hellaswag, lambada = found["tasks"]["hellaswag"], found["tasks"]["lambada"]
    assert hellaswag["name"] == "hellaswag (reconstructed, fixed 10 shots)"
    assert (hellaswag["num_fewshot"], lambada["num_fewshot"]) == (10, 0)
    assert (hellaswag["n"], lambada["n"], lambada["name"]) == (ITEMS, PASSAGES, "lambada_openai")
    total = hellaswag["tokens_computed"] + lambada["tokens_computed"]
    assert found["tokens_computed"] == total
    for task, result in found["tasks"].items():
        for name, digest in result["data_sha256"].items():
            content = (place / "tasks" / task / name).read_bytes()
            assert digest == hashlib.sha256(content).hexdigest()
        assert len(result["data_sha256"]) == len(list((place / "tasks" / task).iterdir()))


def test_metrics_are_those_of_lm_eval(place, tmp_path, monkeypatch):
    """The values that it aggregates itself; its formula of a mean's error."""
    from lm_eval import evaluator
    from lm_eval.api import metrics

    seen, original = [], evaluator.evaluate

    def look(*args, **options):
        seen.append(original(*args, **options))
        return seen[-1]

    monkeypatch.setattr(evaluator, "evaluate", look)
    found, items = score(place, tmp_path / "out.json")
    (theirs,) = [
        result["results"]["hellaswag"] for result in seen if "hellaswag" in result["results"]
    ]
    ours = found["tasks"]["hellaswag"]["metrics"]
    for name in ("acc", "acc_norm"):
        assert ours[name]["value"] == pytest.approx(theirs[f"{name},none"], rel=1e-12)
        values = [item[name] for item in items if item["task"] == "hellaswag"]
        assert ours[name]["stderr"] == pytest.approx(metrics.mean_stderr(values), rel=1e-12)
    (theirs,) = [
        result["results"]["lambada_openai"]
        for result in seen
        if "lambada_openai" in result["results"]
    ]
    ours = found["tasks"]["lambada"]["metrics"]
    assert ours["perplexity"]["value"] == pytest.approx(theirs["perplexity,none"], rel=1e-9)
    logs = [item["log_likelihood"] for item in items if item["task"] == "lambada"]
    error = np.exp(-np.mean(logs)) * np.std(logs, ddof=1) / np.sqrt(PASSAGES)
    assert ours["perplexity"]["stderr"] == pytest.approx(error, rel=1e-9)


def test_byte_exact_items_have_metrics_of_their_own(ours):
    subset = [item for item in ours[1] if item["task"] == "hellaswag" and item["index"] % 2 == 0]
    found = ours[0]["tasks"]["hellaswag"]["byte_exact"]
    assert found["n"] == len(subset) == 5
    for name in ("acc", "acc_norm"):
        values = [item[name] for item in subset]
        assert found["metrics"][name]["value"] == pytest.approx(np.mean(values))
    assert "byte_exact" not in ours[0]["tasks"]["lambada"]


def test_answers_follow_from_log_likelihoods(ours, place):
    """acc takes the likeliest ending, acc_norm the likeliest a character."""
    path = place / "tasks" / "hellaswag" / "hellaswag_val.reconstructed.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    items = [item for item in ours[1] if item["task"] == "hellaswag"]
    assert [item["index"] for item in items] == list(range(ITEMS))
    chosen = []
    for item, row in zip(items, rows, strict=True):
        likely = np.array(item["log_likelihoods"])
        best = likely.argmax(), (likely / [len(ending) for ending in row["endings"]]).argmax()
        assert item["gold"] == int(row["label"])
        assert (item["acc"], item["acc_norm"]) == tuple(int(i == item["gold"]) for i in best)
        chosen.append(best)
    assert len({first == second for first, second in chosen}) == 2  # the two do differ


def test_an_item_is_its_prompt_and_its_answers(ours, place, tmp_path):
    """Other shots, or another ending, are another item."""
    tasks = shutil.copytree(place / "tasks", tmp_path / "tasks")
    path = tasks / "hellaswag" / "hellaswag_val.reconstructed.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["endings"][2] += " more"
    write_rows(path, rows)
    _, items = score(place, tmp_path / "a.json", tasks=("hellaswag",), data_dir=tasks, limit=3)
    same = [a["item_sha256"] == b["item_sha256"] for a, b in zip(ours[1], items, strict=False)]
    assert same == [True, False, True]
    shots = tasks / "hellaswag" / "hellaswag_train_13.original.jsonl"
    write_rows(shots, [json.loads(line) for line in shots.read_text().splitlines()][::-1])
    _, items = score(place, tmp_path / "b.json", tasks=("hellaswag",), data_dir=tasks, limit=3)
    assert not {item["item_sha256"] for item in items} & {item["item_sha256"] for item in ours[1]}


def test_a_limit_is_a_sample_everywhere(ours, place, tmp_path):
    """In the file, in the line for people, in the study that reads it: it decides nothing."""
    lines: list[str] = []
    request = downstream.Request(
        ("hellaswag", "lambada"),
        tmp_path / "out.json",
        workdir=place / "run",
        data_dir=place / "tasks",
        limit=3,
    )
    found = downstream.run(request, report=lines.append)
    assert found["sample"] is True and found["limit"] == 3
    assert [result["n"] for result in found["tasks"].values()] == [3, 3]
    assert all(line.startswith("SAMPLE, the first items only: ") for line in lines[:2])
    study = tmp_path / "study"
    synthetic_study.write(study, synthetic_study.arms(), seeds=(42,))
    for arm in synthetic_study.ARMS:
        path = study / "downstream" / arm / "seed_42.json"
        path.parent.mkdir(parents=True)
        record = {**found, "run": {**found["run"], "params_sha256": f"{arm}-42"}}
        path.write_text(json.dumps(record))
        items = tmp_path / "out.items.jsonl"
        shutil.copy(items, path.with_suffix(".items.jsonl"))
    read = results.load_study(study)
    assert len(read.items["muon_qk", 42]) == 6
    judgement = judge.judge(read)
    warnings = [warning for warning in judgement.warnings if "sample" in warning]
    assert len(warnings) == 4
    reasons = [clause.reason for clause in judgement.verdicts[-1].clauses]
    assert all("has only a sample" in reason for reason in reasons), reasons


# --------------------------------------------------------------------------------------------
# The hub's data.


def test_tasks_of_the_hub_are_the_stock_ones(place, tmp_path, monkeypatch):
    """Its name and splits; ten shots that are drawn again for every item."""
    import datasets

    asked = []

    def from_hub(path, name=None, **options):
        asked.append((path, name, options))
        folder = place / "tasks" / ("hellaswag" if "hellaswag" in path else "lambada")

        def split(pattern):
            (file,) = folder.glob(pattern)
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            return datasets.Dataset.from_list(rows)

        if "hellaswag" in path:
            return {"train": split("*train*"), "validation": split("*_val.*jsonl")}
        return {"test": split("*test*")}

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    found, items = score(place, tmp_path / "out.json", data_dir=None)
    assert asked == [
        ("Rowan/hellaswag", None, {}),
        ("EleutherAI/lambada_openai", "default", {}),
    ]
    hellaswag = found["tasks"]["hellaswag"]
    assert (hellaswag["name"], hellaswag["num_fewshot"]) == ("hellaswag", 10)
    assert set(hellaswag["data_sha256"]) == {
        "hf:Rowan/hellaswag/train",
        "hf:Rowan/hellaswag/validation",
    }
    # Nothing but the beginning of a document is common to the prompts: an item is a whole row.
    assert hellaswag["tokens_computed"] > hellaswag["tokens_unshared"] / 4
    assert "byte_exact" not in hellaswag
    assert len(items) == ITEMS + PASSAGES


# --------------------------------------------------------------------------------------------
# Refusals.


def refused(place: pathlib.Path, tmp_path: pathlib.Path, text: str, **options: Any) -> None:
    values = {"tasks": ("lambada",), "data_dir": place / "tasks", **options}
    values.setdefault("out", tmp_path / "out.json")
    with pytest.raises(errors.UsageError, match=text) as caught:
        downstream.run(downstream.Request(**values), report=lambda line: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.json").exists() and not (tmp_path / "out.items.jsonl").exists()
    assert not list(tmp_path.glob(".downstream*"))


def test_wrong_requests_are_refused(place, tmp_path):
    run, model = {"workdir": place / "run"}, {"model": place / "model"}
    (tmp_path / "there.json").write_text("{}")
    for options, text in (
        ({}, "--model, --workdir: expected one of them"),
        ({**run, **model}, "--model, --workdir: expected one of them"),
        ({**model, "backend": "jax"}, "--backend: jax scores a run directory. Give --workdir"),
        ({**model, "step": 20}, "--step, --dataset_dir: --model is one checkpoint"),
        (
            {**run, "tasks": ("lambada", "arc")},
            "--tasks: 'arc' is unknown. Known are hellaswag, la",
        ),
        ({**run, "tasks": ()}, "--tasks: none given"),
        ({**run, "limit": 0}, "--limit: 0, expected 1 or more"),
        ({**run, "out": tmp_path / "there.json"}, r"--out: .*there\.json already exists"),
        ({**run, "out": tmp_path / "out"}, r"--out: .*out, expected a name that ends in \.json"),
        ({**run, "step": 3}, r"no checkpoint of step 3. Give one of \[20\]"),
        ({"workdir": tmp_path}, r"not a run directory, expected a config\.json"),
        ({"model": tmp_path}, r"not a model directory, expected config\.json"),
    ):
        refused(place, tmp_path, text, **options)


def test_unfinished_and_damaged_runs_are_refused(place, tmp_path):
    unfinished = shutil.copytree(place / "run", tmp_path / "run")
    (unfinished / "summary.json").unlink()
    refused(place, tmp_path, "the run is not finished", workdir=unfinished)
    other = small_run.make_dataset(tmp_path / "dataset", seed=1)
    refused(
        place,
        tmp_path,
        "another dataset than the run's.*as --dataset_dir=DIR",
        workdir=place / "run",
        dataset_dir=str(other),
    )
    text = "no dataset.json there.*give --dataset_dir=DIR"
    refused(place, tmp_path, text, workdir=place / "run", dataset_dir=str(tmp_path))
    values = json.loads((unfinished / "config.json").read_text())
    values["model"]["vocab_size"] = 320
    (unfinished / "config.json").write_text(json.dumps(values))
    shutil.copy(place / "run" / "summary.json", unfinished)
    text = "its tokenizer has 300 tokens, and the model .* has 320.*--dataset_dir=DIR"
    refused(place, tmp_path, text, workdir=unfinished)
    poisoned = random_run.random_params(
        small_run.make_config(place / "run-dataset").for_platform("cpu")
    )
    poisoned["final_norm"]["gamma"][3] = np.nan
    workdir = random_run.make(
        tmp_path / "nan",
        place / "run-dataset",
        params=poisoned,
        model__num_heads=2,
        model__num_kv_heads=1,
        model__head_dim=16,
    )
    text = "params/final_norm/gamma has values that are not finite"
    refused(place, tmp_path, text, workdir=workdir)


def test_damaged_models_are_refused(torch, place, tmp_path):
    model = shutil.copytree(place / "model", tmp_path / "model")
    tensors = {name: np.array(x) for name, x in hf.load_tensors(model / hf.WEIGHTS_FILE).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.inf
    hf.save_tensors(tensors, model / hf.WEIGHTS_FILE)
    refused(
        place, tmp_path, r"layers\.1\.mlp\.up_proj\.weight has values that are not", model=model
    )
    (model / hf.WEIGHTS_FILE).write_bytes(b"short")
    refused(place, tmp_path, "does not load", model=model)
    (model / hf.RECORD_FILE).write_text("{}")
    refused(place, tmp_path, r"qkjax\.json: damaged", model=model)
    fewer = shutil.copytree(place / "model", tmp_path / "fewer")
    small = tmp_path / "small.json"
    small_tokenizer(small)
    shutil.copy(small, fewer / "tokenizer.json")
    refused(place, tmp_path, "its tokenizer has 280 tokens, and its model 300", model=fewer)


def small_tokenizer(path: pathlib.Path) -> None:
    from qkjax.data import tokenizer as tokenizer_lib

    words = [f"{a}{b}{c}" for a in "etaoin" for b in "etaoin" for c in "etaoin"]
    path.write_bytes(tokenizer_lib.train([" ".join(words)] * 3, 280).content)


def test_scores_that_are_not_finite_are_no_result(place, tmp_path, monkeypatch):
    def wrong(lm, requests, **options):
        return [(float("nan") if i == 4 else -1.0, False) for i in range(len(requests))]

    monkeypatch.setattr(scorer.Scorer, "_loglikelihood_tokens", wrong)
    refused(place, tmp_path, "lambada: .* item 4 are not finite", workdir=place / "run")
    text = r"hellaswag: .* item 1 are not finite .*\[nan, "
    refused(place, tmp_path, text, workdir=place / "run", tasks=("hellaswag",))


def test_answers_longer_than_the_context_are_refused(torch, place, tmp_path):
    tasks = tmp_path / "tasks"
    write_rows(tasks / "lambada" / "lambada_test.jsonl", [{"text": "the end " + "x" * (T + 1)}])
    text = f"model.sequence_length: {T}, and an answer"
    for options in ({"workdir": place / "run"}, {"model": place / "model"}):
        refused(place, tmp_path, text, data_dir=tasks, **options)


ROW = {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c"] * 4, "label": 3}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({**ROW, "label": ""}, r"line 2: label is '', expected 0 to 3"),
        (
            {**ROW, "endings": ["c"] * 3},
            r"line 2: endings is \['c', 'c', 'c'\], expected a list of 4",
        ),
        ({**ROW, "endings": "cccc"}, r"line 2: endings is 'cccc', expected a list of 4"),
        ({k: v for k, v in ROW.items() if k != "ctx_b"}, "line 2: ctx_b is None, expected a text"),
        ({**ROW, "activity_label": 5}, "line 2: activity_label is 5, expected a text"),
        ([ROW], "line 2: not a JSON object"),
        ("[" * 100_000, "line 2: maximum recursion"),
    ],
)
def test_rows_of_another_shape_are_refused(place, tmp_path, row, text):
    tasks = shutil.copytree(place / "tasks", tmp_path / "tasks")
    path = tasks / "hellaswag" / "hellaswag_val.reconstructed.jsonl"
    line = row if isinstance(row, str) else json.dumps(row)
    path.write_text(f"{json.dumps(ROW)}\n{line}\n")
    # Before anything is loaded: the run does not exist.
    options = {"tasks": ("hellaswag",), "data_dir": tasks, "workdir": tmp_path / "none"}
    refused(place, tmp_path, f"hellaswag_val.reconstructed.jsonl: {text}", **options)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("the last word", True),
        ("lines\n of one\ttext", True),
        ("a word and ", False),
        (" a word", False),
        ("a word\n", False),
        ("one\nword", False),
    ],
)
def test_the_last_word_that_is_checked_is_the_one_that_is_scored(tmp_path, text, fits):
    (tmp_path / "lambada").mkdir()
    write_rows(tmp_path / "lambada" / "lambada_test.jsonl", [{"text": text}])
    lambada = benchmarks.BENCHMARKS["lambada"]
    if fits:
        assert benchmarks.read(lambada, tmp_path).rows == {"test": [{"text": text}]}
        assert text.split(" ")[-1].strip()  # the target in lm-eval's words
        return
    with pytest.raises(errors.UsageError, match=r"lambada_test\.jsonl: line 1: text is .* around"):
        benchmarks.read(lambada, tmp_path)


@pytest.mark.parametrize("ending", ["", " \n", "[header]", " [title] ", "[a] [b]"])
def test_an_ending_without_words_to_score_is_refused(tmp_path, ending):
    folder = tmp_path / "hellaswag"
    folder.mkdir()
    write_rows(folder / "hellaswag_val.jsonl", [ROW, {**ROW, "endings": ["c", "c", ending, "c"]}])
    write_rows(folder / "hellaswag_train.jsonl", [ROW] * 10)
    with pytest.raises(errors.UsageError, match=r"val\.jsonl: line 2: endings: .* has no words"):
        benchmarks.read(benchmarks.BENCHMARKS["hellaswag"], tmp_path)


def test_files_that_do_not_fit_are_refused(place, tmp_path):
    tasks = shutil.copytree(place / "tasks", tmp_path / "tasks")
    folder = tasks / "hellaswag"
    options = {"tasks": ("hellaswag",), "data_dir": tasks, "workdir": place / "run"}
    origin = folder / "hellaswag_val.origin.json"
    origin.write_text(json.dumps({"exact_vs_lm_eval": [True] * 3}))
    refused(place, tmp_path, f"is not a list of {ITEMS} truth values", **options)
    origin.write_text("{}")
    refused(place, tmp_path, r"origin\.json: damaged \(it lacks exact_vs_lm_eval\)", **options)
    shots = folder / "hellaswag_train_13.original.jsonl"
    write_rows(shots, [ROW] * 9)
    refused(place, tmp_path, "9 rows, expected at least 10. Download the whole file", **options)
    shutil.copy(shots, folder / "hellaswag_train.jsonl")
    text = r"hellaswag_train.jsonl, hellaswag_train_13.original.jsonl all match"
    refused(place, tmp_path, text, **options)
    (folder / "hellaswag_val.reconstructed.jsonl").write_bytes(b"\xff\n")
    refused(place, tmp_path, "not UTF-8", **options)
    (folder / "hellaswag_val.reconstructed.jsonl").unlink()
    text = r"no file matches hellaswag_val\.\*jsonl, expected one. Name the files of --data_dir"
    refused(place, tmp_path, text, **options)
    refused(place, tmp_path, "no file matches", **{**options, "data_dir": tmp_path / "absent"})
    passages = tasks / "lambada" / "lambada_test.jsonl"
    write_rows(passages, [{"text": "one"}])
    text = "line 1: text is 'one', expected several words"
    refused(place, tmp_path, text, **{**options, "tasks": ("lambada",)})


def test_packages_that_are_missing_are_named(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval", None)
        text = r"lm_eval: not installed.*Run pip install -e '\.\[eval\]'"
        refused(place, tmp_path, text, workdir=place / "run")
    monkeypatch.setitem(sys.modules, "torch", None)
    text = r"--backend=hf: torch is not installed. Run pip install -e '\.\[eval\]'"
    refused(place, tmp_path, text, model=place / "model")


# --------------------------------------------------------------------------------------------
# The command, without network, on real items.


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small random model of context 2,048 with the real tokenizer, and its export."""
    place = tmp_path_factory.mktemp("real")
    rows = [{"text": f"Text number {i} of the stand-in for a corpus. " * 40} for i in range(80)]
    write_rows(place / "text.jsonl", rows)
    request = prepare.Request(
        sources=(f"jsonl:{place / 'text.jsonl'}",),
        tokenizer=str(shared / "data" / "tokenizer_smollm2" / "tokenizer.json"),
        sequence_length=2048,
        train_tokens=4 * 2048,
        validation_tokens=2048,
    )
    prepare.prepare(request, place / "dataset", progress=lambda line: None)
    random_run.make(
        place / "run",
        place / "dataset",
        "learned",
        losses=False,
        model__vocab_size=49_152,
        model__sequence_length=2048,
        train__tokens_per_step=2048,
        train__tokens=20 * 2048,
        eval__at_tokens=(),
        data__max_epochs=1000,
    )
    directory.export(directory.Request(place / "run", place / "model"), report=lambda line: None)
    return place


GUARD = """
import socket

def refuse(*args, **kwargs):
    with open({log!r}, "a") as file:
        file.write(repr(args) + chr(10))
    raise OSError("no network here")

socket.socket.connect = socket.getaddrinfo = refuse
"""


def command(tmp_path: pathlib.Path, *flags: str, offline: bool = False):
    """Runs the tool where every attempt to reach a network is written down and fails."""
    guard, log = tmp_path / "guard", tmp_path / "attempts"
    guard.mkdir(exist_ok=True)
    (guard / "sitecustomize.py").write_text(GUARD.format(log=str(log)))
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= dict.fromkeys(names, "1") if offline else {}
    env["PYTHONPATH"] = os.pathsep.join([str(guard), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "tools/eval_downstream.py", *flags],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    return done, log.read_text() if log.exists() else ""


@pytest.mark.process
@pytest.mark.long
def test_twenty_real_items_agree_and_share_their_shots(torch, real, shared, tmp_path):
    """Both commands, hub variables unset, no network: 1e-3 an item, a third of the tokens."""
    found = {}
    for backend, source in (("jax", "--workdir=run"), ("hf", "--model=model")):
        out = tmp_path / f"{backend}.json"
        name, value = source.split("=")
        done, attempts = command(
            tmp_path,
            f"{name}={real / value}",
            "--tasks=hellaswag,lambada",
            "--limit=20",
            f"--data_dir={shared / 'data'}",
            f"--out={out}",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert not attempts
        assert done.stdout.count("SAMPLE") == 2
        lines = out.with_suffix(".items.jsonl").read_text().splitlines()
        found[backend] = json.loads(out.read_text()), [json.loads(line) for line in lines]
    assert_agreement(found["jax"][1], found["hf"][1])
    assert len(found["jax"][1]) == 40
    (ours, _), (stock, _) = found["jax"], found["hf"]
    computed = {name: x["tasks"]["hellaswag"]["tokens_computed"] for name, (x, _) in found.items()}
    assert computed["hf"] / computed["jax"] > 3
    assert stock["tasks"]["hellaswag"]["byte_exact"]["n"] == 20
    assert ours["tasks"]["lambada"]["metrics"]["acc"]["value"] == 0


@pytest.mark.process
@pytest.mark.long
def test_offline_variables_change_nothing(torch, place, tmp_path):
    """Set before the start; and without files of tasks the hub's refusal is one line."""
    done, attempts = command(
        tmp_path,
        f"--model={place / 'model'}",
        "--tasks=lambada",
        "--limit=2",
        f"--data_dir={place / 'tasks'}",
        f"--out={tmp_path / 'out.json'}",
        offline=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not attempts
    done, _ = command(
        tmp_path, f"--workdir={place / 'run'}", f"--out={tmp_path / 'b.json'}", offline=True
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "ERROR" in line]
    assert line.startswith("ERROR: --tasks: the hub does not give hellaswag (")
    assert line.endswith("Give its files as --data_dir=DIR, see docs/evaluation.md.")
    done, _ = command(tmp_path, f"--workdir={place / 'run'}")
    assert done.returncode == 2 and done.stderr.startswith("ERROR: --out: missing")


@pytest.mark.long
def test_random_weights_are_at_chance(real, shared, tmp_path):
    """100 questions of four endings: 25% within four standard errors; no last word."""
    found, _ = score(real, tmp_path / "out.json", data_dir=shared / "data", limit=100)
    metrics = found["tasks"]["hellaswag"]["metrics"]
    for name in ("acc", "acc_norm"):
        assert abs(metrics[name]["value"] - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 100)
    assert found["tasks"]["lambada"]["metrics"]["acc"]["value"] == 0
    assert found["tasks"]["lambada"]["metrics"]["perplexity"]["value"] > 49_152 / 10


def test_named_benchmarks():
    assert [one.name for one in benchmarks.named(["lambada", "hellaswag", "lambada"])] == [
        "lambada",
        "hellaswag",
    ]
