"""Generation: the cache against the whole forward pass, sampling, its end, and HF's greedy."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_run
import small_run

from qkjax import config as config_lib
from qkjax import errors, model
from qkjax.data import manifest as manifest_lib
from qkjax.data import tokenizer as tokenizer_lib
from qkjax.export import directory
from qkjax.trained import decoder, generation, trained_run
from qkjax.trained.generation import Sampling

ROOT = pathlib.Path(__file__).resolve().parents[1]
KINDS = [("none", "swiglu"), ("learned", "swiglu"), ("none", "relu2"), ("frozen", "relu2")]
PROMPT = [4, 250, 17, 17, 96, 3]
NEVER = -1  # no token has this id


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A dataset and a run of each kind."""
    place = tmp_path_factory.mktemp("generation")
    dataset = small_run.make_dataset(place / "dataset")
    for kind in KINDS:
        random_run.make(place / "_".join(kind), dataset, *kind)
    return place


@pytest.fixture(params=KINDS, ids="_".join)
def run(request, place) -> trained_run.TrainedRun:
    return trained_run.open_run(place / "_".join(request.param))


@pytest.fixture
def one(place) -> trained_run.TrainedRun:
    return trained_run.open_run(place / "learned_swiglu")


def whole_pass(run: trained_run.TrainedRun, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] by `model.py`."""
    ids = jnp.array([tokens], jnp.int32)
    return np.asarray(model.logits(run.params, ids, run.config.model.on("cpu"))[0])


def generate(run: trained_run.TrainedRun, prompt=PROMPT, **options) -> list[int]:
    options = {"max_tokens": 12, "eos_id": NEVER, **options}
    return list(generation.generate(run.params, run.config.model, prompt, **options))


# --------------------------------------------------------------------------------------------
# Tokens.


def test_cache_gives_the_logits_of_the_whole_pass(run):
    """For any pieces; and room that is left over in the cache changes nothing."""
    tokens = np.random.default_rng(3).integers(0, small_run.VOCABULARY, 20)
    expected = whole_pass(run, tokens.tolist())
    for room, pieces in ((20, (5, 1, 1, 3, 1, 9)), (32, (20,)), (32, (1,) * 20)):
        cache = decoder.empty_cache(run.config.model, room)
        start = 0
        for size in pieces:
            piece = tokens[start : start + size].astype(np.int32)
            logits, cache = decoder.next_token_logits(
                run.params, run.config.model, cache, piece, start
            )
            start += size
            np.testing.assert_allclose(logits, expected[start - 1], atol=2e-5, rtol=0)


def test_greedy_takes_the_most_probable_token_every_time(run):
    tokens = generate(run)
    best = whole_pass(run, [*PROMPT, *tokens]).argmax(axis=-1)
    assert tokens == best[len(PROMPT) - 1 : -1].tolist()
    assert len(tokens) == 12


def test_greedy_equals_hugging_face(run, tmp_path):
    """And ends where it ends: the third token that would come stands for end-of-text."""
    pytest.importorskip("safetensors", reason="exports are written with safetensors")
    torch = pytest.importorskip("torch", reason="the comparison needs torch")
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    directory.write(run, tmp_path / "out")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    greedy = generate(run)
    for eos_id in (run.tokenizer.eos_id, greedy[2]):
        found = stock.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=eos_id,
        )
        assert generate(run, eos_id=eos_id) == found[0, len(PROMPT) :].tolist()


def test_it_ends_at_end_of_text_at_max_tokens_and_where_the_context_is_full(one):
    greedy = generate(one)
    assert len(greedy) == 12
    stop = greedy[4]
    assert generate(one, eos_id=stop) == greedy[: greedy.index(stop) + 1]
    assert generate(one, max_tokens=1) == greedy[:1]
    assert len(generate(one, max_tokens=500)) == small_run.LENGTH - len(PROMPT)
    assert len(generate(one, [7] * (small_run.LENGTH - 1))) == 1
    for prompt in ([], [7] * small_run.LENGTH):
        with pytest.raises(errors.UsageError, match=f"{len(prompt)} tokens, expected 1 to 31"):
            generation.generate(
                one.params, one.config.model, prompt, max_tokens=1, eos_id=0
            )  # at the call, not at the first token


def test_seeds_repeat_and_differ(one):
    def drawn(seed):
        return generate(one, sampling=Sampling(1.0, 1.0, seed))

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(4)}) == 4
    flat = generate(one, sampling=Sampling(1e6, 1.0, 0))
    by_rank = np.argsort(-whole_pass(one, [*PROMPT, *flat])[len(PROMPT) - 1 : -1], axis=-1)
    ranks = [list(row).index(token) for row, token in zip(by_rank, flat, strict=True)]
    assert len(set(ranks)) > 8  # every position draws again
    short = generate(one, max_tokens=5, sampling=Sampling(1.0, 1.0, 1))
    assert short == drawn(1)[:5]  # the length asked for does not change the draws


@pytest.mark.parametrize("sampling", [Sampling(1e-30), Sampling(0.7, 1e-9), Sampling(0.0, 0.5)])
def test_no_temperature_or_no_nucleus_is_greedy(one, sampling):
    assert generate(one, sampling=sampling) == generate(one)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7), (1, 0.3)])
def test_draws_follow_the_nucleus(temperature, top_p):
    """Frequencies of 20,000 draws against probabilities computed in numpy."""
    logits = np.random.default_rng(0).standard_normal(12).astype(np.float32) * 1.5
    probability = np.exp(logits.astype(np.float64) / temperature)
    probability /= probability.sum()
    kept, total = [], 0.0
    for token in np.argsort(-probability):
        if total >= top_p:
            break
        kept.append(token)
        total += probability[token]
    expected = np.zeros(12)
    expected[kept] = probability[kept] / total
    keys = jax.random.split(jax.random.key(5), 20_000)
    draw = jax.vmap(lambda key: generation.sample(key, logits, temperature, top_p))
    found = np.bincount(np.asarray(draw(keys)), minlength=12) / len(keys)
    assert (found[expected == 0] == 0).all()
    spread = np.sqrt(expected * (1 - expected) / len(keys))
    assert (np.abs(found - expected) <= 5 * spread).all()


# --------------------------------------------------------------------------------------------
# Text.


def test_text_comes_in_whole_characters_and_without_end_of_text(place):
    ours = tokenizer_lib.of_dataset(manifest_lib.load(place / "dataset"), place / "dataset")
    text = "naïve 中文 \U0001f469 end"
    ids = ours.encode_batch([text])[0].tolist()
    pieces = list(generation.stream(ours, [*ids, ours.eos_id]))
    assert "".join(pieces) == text
    assert len(pieces) > 8 and not any("\ufffd" in piece for piece in pieces)
    cut = next(i for i, t in enumerate(ids) if ours.decode(ids[: i + 1]).endswith("\ufffd"))
    assert "".join(generation.stream(ours, ids[: cut + 1])) == ours.decode(ids[: cut + 1])
    assert list(generation.stream(ours, [])) == []


def test_a_continuation_keeps_the_space_that_its_prompt_ends_before():
    """Tokenizers of SentencePiece's kind strip the first space of what they decode."""
    words = {"<unk>": 0, "</s>": 1, "\u2581One": 2, "\u2581two": 3, "s": 4}

    class Stripping:
        eos_id = 1

        def decode(self, ids):
            text = "".join(list(words)[i] for i in ids)
            return text.replace("\u2581", " ").removeprefix(" ")

    assert "".join(generation.stream(Stripping(), [3, 4, 1], after=[2])) == " twos"
    assert "".join(generation.stream(Stripping(), [3, 4, 1])) == "twos"


def run_text(workdir: pathlib.Path, **options) -> tuple[str, str]:
    """What is written, and what is reported."""
    written: list[str] = []
    reported: list[str] = []
    values = {"prompt": "The tone", "max_tokens": 8, "sampling": Sampling(), **options}
    generation.run(generation.Request(workdir, **values), written.append, reported.append)
    return "".join(written), "".join(reported)


def test_prompt_and_continuation_are_written(one):
    text, report = run_text(one.workdir)
    prompt = one.tokenizer.encode_batch(["The tone"])[0].tolist()
    expected = generate(one, prompt, max_tokens=8, eos_id=one.tokenizer.eos_id)
    shown = [token for token in expected if token != one.tokenizer.eos_id]
    assert text == "The tone" + one.tokenizer.decode(shown) + "\n"
    assert f"{len(expected)} tokens, " in report and "step 20: --max_tokens reached" in report
    assert "the context of 32 tokens is full" in run_text(one.workdir, max_tokens=99)[1]


def test_an_empty_prompt_begins_a_document(one, tmp_path):
    text, _ = run_text(one.workdir, prompt="")
    expected = generate(one, [one.tokenizer.eos_id], max_tokens=8, eos_id=one.tokenizer.eos_id)
    shown = [token for token in expected if token != one.tokenizer.eos_id]
    assert text == one.tokenizer.decode(shown) + "\n"
    dataset = small_run.make_dataset(tmp_path / "dataset", end_of_text=False)
    other = random_run.make(tmp_path / "run", dataset, data__end_of_text=False)
    with pytest.raises(errors.UsageError, match="--prompt: empty, and this model has not learned"):
        run_text(other, prompt="")


def test_a_document_that_ends_says_so(one, monkeypatch):
    eos_id = one.tokenizer.eos_id
    tokens = lambda *args, **kwargs: iter([40, eos_id])  # noqa: E731
    monkeypatch.setattr(generation, "generate", tokens)
    text, report = run_text(one.workdir)
    assert text == f"The tone{one.tokenizer.decode([40])}\n"
    assert report.startswith("2 tokens") and report.endswith("the document ended")


def test_an_unfinished_run_in_bfloat16_can_speak(place, tmp_path):
    """In float32: the text is that of the same parameters in a float32 run."""
    workdir = random_run.make(
        tmp_path / "run", place / "dataset", "learned", model__dtype="bfloat16"
    )
    (workdir / "summary.json").unlink()
    assert run_text(workdir)[0] == run_text(place / "learned_swiglu")[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_tokens": 0}, "--max_tokens: 0, expected 1 or more"),
        ({"sampling": Sampling(-0.1)}, "--temperature: -0.1, expected 0"),
        ({"sampling": Sampling(float("nan"))}, "--temperature: nan"),
        ({"sampling": Sampling(1.0, 0.0)}, "--top_p: 0, expected above 0"),
        ({"sampling": Sampling(1.0, 1.1)}, "--top_p: 1.1"),
        ({"prompt": "word " * 40}, "--prompt: [0-9]+ tokens, expected 1 to 31"),
        ({"step": 3}, r"no checkpoint of step 3. Give one of \[20\]"),
    ],
)
def test_wrong_requests_are_refused(one, options, text):
    with pytest.raises(errors.UsageError, match=text):
        run_text(one.workdir, **options)


@pytest.mark.process
def test_command(one, tmp_path):
    def command(*flags):
        return subprocess.run(
            [sys.executable, "tools/generate.py", *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    workdir = f"--workdir={one.workdir}"
    done = command(workdir, "--prompt=The tone", "--temperature=0", "--max_tokens=8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == run_text(one.workdir)[0]
    assert "8 tokens, " in done.stderr
    for flags, text in (
        (("--prompt=a",), "--workdir: missing"),
        ((workdir,), "--prompt: missing"),
        ((f"--workdir={tmp_path}", "--prompt=a"), f"{tmp_path}: not a run directory"),
    ):
        done = command(*flags)
        assert done.returncode == 2
        assert done.stderr.startswith(f"ERROR: {text}") and done.stderr.count("\n") == 1


def test_the_runs_config_is_what_the_test_thinks(one):
    """Grouped queries, learned gammas that are not 1, and a root of d_model that is not exact."""
    c: config_lib.ModelConfig = one.config.model
    assert (c.num_heads, c.num_kv_heads, c.d_model) == (4, 2, 32)
    assert np.ptp(one.params["blocks"]["attention"]["key_norm"]["gamma"]) > 0.1
    assert json.loads((one.workdir / "config.json").read_text())["model"]["qk_norm"] == "learned"
