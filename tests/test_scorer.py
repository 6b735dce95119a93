"""The scorer: log-likelihoods against whole passes, what is shared, shapes, and its tokens."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
import random_run
import reference_model
import small_run

from qkjax.trained import trained_run

pytest.importorskip("lm_eval", reason="the scorer is a model of lm-eval")
from qkjax.tasks import scorer

T, EOS, VOCABULARY = 96, 0, small_run.VOCABULARY


@pytest.fixture(scope="module", params=["none_swiglu", "learned_relu2"])
def run(request, tmp_path_factory: pytest.TempPathFactory) -> trained_run.TrainedRun:
    """A run with a context of 96 tokens."""
    place = tmp_path_factory.mktemp("scorer")
    dataset = small_run.make_dataset(place / "dataset")
    qk_norm, mlp = request.param.split("_")
    fields = {"model__sequence_length": T, "train__tokens_per_step": T, "train__tokens": 20 * T}
    workdir = random_run.make(place / "run", dataset, qk_norm, mlp, **fields, eval__at_tokens=())
    return trained_run.open_run(workdir)


def make_scorer(run: trained_run.TrainedRun, *, add_bos: bool = True, **options) -> scorer.Scorer:
    return scorer.Scorer(run.params, run.config.model, run.tokenizer, add_bos=add_bos, **options)


def requests_of(*pairs: tuple[list[int], list[int]]) -> list[scorer.Request]:
    return [(("", ""), context, continuation) for context, continuation in pairs]


def whole_pass(run: trained_run.TrainedRun, context: list[int], continuation: list[int]):
    """(log-likelihood, greedy) by numpy over the last T tokens, as lm-eval defines them."""
    kept = (context + continuation)[-(T + 1) :]
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), run.params)
    logits, _ = reference_model.logits(wide, np.array(kept[:-1]), run.config.model)
    logits = logits[-len(continuation) :]
    log_sum = np.log(np.exp(logits).sum(-1))
    rows = np.arange(len(continuation))
    greedy = bool((logits.argmax(-1) == continuation).all())
    return float((logits[rows, continuation] - log_sum).sum()), greedy


class Texts(NamedTuple):
    """Random tokens."""

    chance: np.random.Generator

    def some(self, low: int, high: int) -> list[int]:
        size = self.chance.integers(low, high)
        return self.chance.integers(1, VOCABULARY, size).tolist()

    def item(self, start: list[int], context: int, endings: int) -> list:
        whole = start + self.some(1, context)
        return [(whole, self.some(1, 9)) for _ in range(endings)]


# --------------------------------------------------------------------------------------------
# Log-likelihoods.


def test_scores_are_those_of_whole_passes(run):
    """A common start, items of one and of four endings, long ones whose start is cut off."""
    texts = Texts(np.random.default_rng(0))
    start = texts.some(40, 41)
    pairs = [pair for _ in range(6) for pair in texts.item(start, 20, 4)]
    pairs += [pair for _ in range(3) for pair in texts.item(start, 2, 1)]
    pairs += texts.item(texts.some(T + 1, T + 2), 12, 4)
    pairs += texts.item(texts.some(2 * T, 3 * T), 2, 2)
    pairs += [(texts.some(T, T + 1), texts.some(T, T + 1))]  # one token of the context is left
    order = texts.chance.permutation(len(pairs))
    requests = requests_of(*(pairs[i] for i in order))
    cut = [scorer.is_truncated(request, T) for request in requests]
    assert sum(cut) == 7
    assert [len(prefix) for prefix, _ in scorer.plan(requests, T)] == [40, 0]
    lm = make_scorer(run)
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, continuation), (value, greedy) in zip(requests, found, strict=True):
        expected, expected_greedy = whole_pass(run, context, continuation)
        assert abs(value - expected) < 1e-4
        assert greedy == expected_greedy


def test_greedy_continuations_are_found(run):
    """Of two tokens that are the most probable ones; and not once the second is another."""
    context = [5, 9, 200, 17]
    best = []
    for _ in range(2):
        every = [whole_pass(run, context + best, [token])[0] for token in range(VOCABULARY)]
        best.append(int(np.argmax(every)))
    other = [best[0], best[1] ^ 1]
    found = make_scorer(run)._loglikelihood_tokens(
        requests_of((context, best), (context, other), (context, best[:1])), disable_tqdm=True
    )
    assert [greedy for _, greedy in found] == [True, False, True]


def test_a_bfloat16_run_is_scored_in_float32(run):
    requests = requests_of(([3, 4, 5], [6, 7]))
    (exact,) = make_scorer(run)._loglikelihood_tokens(requests, disable_tqdm=True)
    config = type(run.config.model)(**{**run.config.model.__dict__, "dtype": "bfloat16"})
    lm = scorer.Scorer(run.params, config, run.tokenizer, add_bos=True)
    assert lm._loglikelihood_tokens(requests, disable_tqdm=True) == [exact]


def test_batches_of_any_size_give_the_same(run):
    texts = Texts(np.random.default_rng(1))
    requests = requests_of(*(pair for _ in range(7) for pair in texts.item([1], 30, 3)))
    found = [
        make_scorer(run, tokens_per_batch=size)._loglikelihood_tokens(requests, disable_tqdm=True)
        for size in (1, 200, 100_000)
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=5e-5, rtol=0)


# --------------------------------------------------------------------------------------------
# What is shared, and shapes.


def computed(groups: list) -> int:
    return sum(
        len(prefix)
        + sum(batch.arrays.token_BC.size for batch in scorer.batches(items, tokens_per_batch=512))
        for prefix, items in groups
    )


@pytest.mark.parametrize(("same_shots", "least"), [(False, 3.0), (True, 10.0)])
def test_sharing_saves_tokens(same_shots, least):
    """Four endings behind ten shots at T 2048: own shots of every item, or the same for all."""
    texts = Texts(np.random.default_rng(2))
    common = texts.some(850, 851)
    pairs = []
    for _ in range(40):
        shots = common if same_shots else texts.some(750, 1000)
        context = shots + texts.some(30, 120)
        pairs += [(context, texts.some(8, 45)) for _ in range(4)]
    stock = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
    groups = scorer.plan(requests_of(*pairs), 2048)
    assert [len(prefix) for prefix, _ in groups] == ([850] if same_shots else [0])
    assert sum(len(items) for _, items in groups) == 40
    assert stock / computed(groups) > least


def test_tokens_are_counted(run):
    texts = Texts(np.random.default_rng(3))
    start = texts.some(40, 41)
    pairs = [pair for _ in range(5) for pair in texts.item(start, 20, 4)]
    lm = make_scorer(run)
    lm._loglikelihood_tokens(requests_of(*pairs), disable_tqdm=True)
    first = lm.tokens_computed
    assert first == computed(scorer.plan(requests_of(*pairs), T))
    lm._loglikelihood_tokens(requests_of(*pairs), disable_tqdm=True)
    assert lm.tokens_computed == 2 * first


def test_every_request_is_in_one_row(run):
    texts = Texts(np.random.default_rng(4))
    pairs = [pair for i in range(50) for pair in texts.item(texts.some(1, 150), 9, i % 4 + 1)]
    seen = [
        index
        for _, items in scorer.plan(requests_of(*pairs), T)
        for batch in scorer.batches(items, 300)
        for item in batch.items
        for index, _ in item.continuations
    ]
    assert sorted(seen) == list(range(len(pairs)))


def test_a_common_start_leaves_a_token_to_every_item():
    """Where one context is the beginning of the others, its last token still predicts."""
    start = list(range(1, 60))
    ((prefix, items),) = scorer.plan(requests_of((start, [7]), ([*start, 4, 5], [8])), T)
    assert len(prefix) == 58
    assert [item.context for item in items] == [[59], [59, 4, 5]]


def test_shapes_are_few():
    """Thousands of items of all lengths: a few dozen programs."""
    texts = Texts(np.random.default_rng(5))
    items = [
        scorer.Item(texts.some(20, 1900), [(i, texts.some(1, 60)) for _ in range(4)])
        for i in range(3000)
    ]
    shapes = {
        tuple(array.shape for array in batch.arrays) for batch in scorer.batches(items, 16_384)
    }
    assert len(shapes) < 60
    for batch in scorer.batches(items[:100], 512):
        longest = max(item.length for item in batch.items)
        assert longest <= batch.arrays.token_BC.shape[1] <= max(1.13 * longest, longest + 15)


# --------------------------------------------------------------------------------------------
# Tokens of texts.


def test_texts_begin_with_end_of_text_where_documents_did(run):
    plain = run.tokenizer.encode_batch(["The tone"])[0].tolist()
    assert make_scorer(run).tok_encode("The tone") == [EOS, *plain]
    assert make_scorer(run, add_bos=False).tok_encode("The tone") == plain
    assert make_scorer(run).tok_encode("The tone", add_special_tokens=False) == plain
    literal = make_scorer(run).tok_encode("<|endoftext|>")
    assert literal.count(EOS) == 1  # written out in a text it is characters


@pytest.mark.parametrize("add_bos", [True, False])
def test_an_empty_context_is_the_beginning_of_a_document(run, add_bos):
    from lm_eval.api.instance import Instance

    asked = Instance("loglikelihood", {}, ("", "The tone"), 0)
    (found,) = make_scorer(run, add_bos=add_bos).loglikelihood([asked], disable_tqdm=True)
    tokens = run.tokenizer.encode_batch(["The tone"])[0].tolist()
    assert abs(found[0] - whole_pass(run, [EOS], tokens)[0]) < 1e-4


def test_it_generates_nothing(run):
    lm = make_scorer(run)
    for method in (lm.generate_until, lm.loglikelihood_rolling):
        with pytest.raises(NotImplementedError, match="only continuations are scored"):
            method([])


def test_texts_are_encoded_together_and_once(run, monkeypatch):
    """Four endings of two contexts: ten texts; the scores are those of lm-eval's own encoding."""
    from lm_eval.api.instance import Instance

    arguments = [
        (context, f" {ending}")
        for context in ("The tone is", "An inn is here ")
        for ending in ("set", "not", "in a tin", "tea")
    ]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in arguments]
    lm = make_scorer(run)
    expected = super(scorer.Scorer, lm).loglikelihood(requests, disable_tqdm=True)
    texts, original = [], run.tokenizer.encode_batch

    def look(some):
        texts.extend(some)
        return original(some)

    monkeypatch.setattr(run.tokenizer, "encode_batch", look)
    monkeypatch.setattr(scorer, "_TEXTS_AT_ONCE", 3)
    assert lm.loglikelihood(requests, disable_tqdm=True) == expected
    assert not lm._encoded  # nothing is kept
    joined = {context + ending for context, ending in arguments}
    assert sorted(texts[:10]) == sorted({"The tone is", "An inn is here "} | joined)
    assert set(texts[10:]) == {"An inn is here"}  # lm-eval moves its last space to the endings
