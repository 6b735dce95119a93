"""A run's parameters as a model of lm-eval, under JAX in float32, without torch.

The stock path computes the few-shot prompt of a question once for every ending. Here an item is
one row: the tokens of its context, and after them its endings as branches that see the context
and themselves but not each other. What the contexts of all items start with, such as a fixed
few-shot prompt, is computed once and kept in a cache. Logits are computed where an ending's token
is predicted and nowhere else. The log-likelihoods are those of the stock path.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lm_eval.api.model
import numpy as np
import tqdm

from qkjax import model
from qkjax.config import ModelConfig
from qkjax.data.tokenizer import Tokenizer
from qkjax.trained import decoder

Request = tuple[Any, list[int], list[int]]  # lm-eval's: texts, tokens of context, of continuation
Score = tuple[float, bool]  # log-likelihood in nat; whether every token is the most probable one
_SHORTEST_PREFIX = 32  # tokens; a shared beginning below it is not worth a pass of its own
_CPU_TOKENS, _ACCELERATOR_TOKENS = 512, 16_384  # of the rows of a batch; one row may be longer
_TEXTS_AT_ONCE = 1024  # encoded together; the tokenizer's own records of them are large
_PAD = -1  # the branch of padding


class Scorer(lm_eval.api.model.TemplateLM):
    """Scores continuations of texts; generates nothing.

    Attributes:
        tokens_computed: positions that the decoder computed so far, with those that fill rows up.
    """

    def __init__(
        self,
        params: model.Params,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        add_bos: bool,
        tokens_per_batch: int | None = None,
    ) -> None:
        """Puts the parameters on the first device.

        Args:
            add_bos: put the end-of-text token, with which documents start, before every text.
            tokens_per_batch: of the rows computed together; None: what suits the device.
        """
        super().__init__()
        self._params = jax.device_put(params)
        self._config = config
        self._tokenizer = tokenizer
        self._add_bos = add_bos
        usual = _CPU_TOKENS if jax.default_backend() == "cpu" else _ACCELERATOR_TOKENS
        self._tokens_per_batch = usual if tokens_per_batch is None else tokens_per_batch
        self._encoded: dict[str, np.ndarray] = {}  # of the present requests
        self.tokens_computed = 0

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which also starts documents."""
        return self._tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """The model's context; of longer texts the last tokens count."""
        return self._config.sequence_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text; starts with end-of-text as `add_bos` says, or the argument."""
        has_bos = self._add_bos if add_special_tokens is None else add_special_tokens
        known = self._encoded.get(string)
        ids = self._tokenizer.encode_batch([string])[0] if known is None else known
        return [self.eot_token_id] * has_bos + ids.tolist()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Score]:
        """One score for every request; lm-eval would encode their texts one by one, on one core."""
        pairs = [request.args for request in requests]
        both = (
            text for context, continuation in pairs for text in (context, context + continuation)
        )
        texts = list(dict.fromkeys(both))
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[start : start + _TEXTS_AT_ONCE]
            self._encoded |= zip(some, self._tokenizer.encode_batch(some), strict=True)
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Score]:
        """One score for every request, in their order."""
        scores: list[Score] = [(0.0, False)] * len(requests)
        with tqdm.tqdm(total=len(requests), desc="scored", disable=disable_tqdm) as progress:
            for prefix, items in plan(requests, self.max_length):
                for index, score in self._score(prefix, items):
                    scores[index] = score
                    progress.update()
        return scores

    def _score(self, prefix: list[int], items: Sequence["Item"]) -> Iterator[tuple[int, Score]]:
        """(index, score) of every request of items that start with `prefix`."""
        cache = decoder.empty_cache(self._config, len(prefix))
        if prefix:
            cache = self._on_device(_take_in, cache, np.array(prefix, np.int32))
            self.tokens_computed += len(prefix)
        waiting: tuple[Batch, Any] | None = None
        for batch in batches(items, self._tokens_per_batch):
            computed = self._on_device(_score_rows, cache, batch.arrays)
            self.tokens_computed += batch.arrays.token_BC.size
            if waiting:  # the device works on this batch while the last one is read
                yield from _read(*waiting)
            waiting = batch, computed
        if waiting:
            yield from _read(*waiting)

    def _on_device(self, function: Callable[..., Any], *arrays: Any) -> Any:
        with jax.default_matmul_precision("highest"):  # GPUs would take TF32
            return function(self._params, *arrays, self._config)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """No task of this project asks for it."""
        raise NotImplementedError("only continuations are scored")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """No task of this project asks for it; text comes from `qkjax generate`."""
        raise NotImplementedError("only continuations are scored")


# --------------------------------------------------------------------------------------------
# The plan: which tokens are computed together. Plain Python and numpy.


class Item(NamedTuple):
    """A context, without what a cache has of it, and its continuations."""

    context: list[int]  # at least the token that predicts the first ones of the continuations
    continuations: list[tuple[int, list[int]]]  # index of the request, tokens

    @property
    def length(self) -> int:
        """Tokens of its row: nothing is predicted from a continuation's last one."""
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.continuations)

    @property
    def num_targets(self) -> int:
        """Tokens that are scored."""
        return sum(len(tokens) for _, tokens in self.continuations)


def is_truncated(request: Request, max_length: int) -> bool:
    """Whether context and continuation are more than the model takes in at once."""
    return len(request[1]) + len(request[2]) > max_length + 1


def plan(requests: Sequence[Request], max_length: int) -> list[tuple[list[int], list[Item]]]:
    """(tokens that contexts start with, the items that continue them), each request in one item.

    As lm-eval's Hugging Face model does, the last max_length + 1 tokens of a request count; the
    last of them is only predicted.
    """
    whole: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    cut: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for index, request in enumerate(requests):
        _, context, continuation = request
        assert 1 <= len(continuation) <= max_length
        kept = context[-(max_length + 1 - len(continuation)) :]
        items = cut if is_truncated(request, max_length) else whole
        items.setdefault(tuple(kept), []).append((index, continuation))
    shared = 0
    if len(whole) > 1:
        shared = min(_common_start(whole), min(map(len, whole)) - 1)
    if shared < _SHORTEST_PREFIX:
        shared = 0
    groups = []
    for start, contexts in ((shared, whole), (0, cut)):
        if contexts:
            prefix = list(next(iter(contexts))[:start])
            rows = [Item(list(context[start:]), found) for context, found in contexts.items()]
            groups.append((prefix, rows))
    return groups


def _common_start(texts: Iterable[tuple[int, ...]]) -> int:
    """Length of what all texts start with."""
    first, last = min(texts), max(texts)  # in the order of their tokens, the rest lies between
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


class Rows(NamedTuple):
    """Items as arrays, one row each; C tokens and M targets, the same for all rows."""

    token_BC: np.ndarray
    position_BC: np.ndarray  # after the cached prefix, as if a branch were alone
    branch_BC: np.ndarray  # 0: context; from 1 on: continuations; _PAD
    source_BM: np.ndarray  # where in its row a target is predicted
    target_BM: np.ndarray


class Batch(NamedTuple):
    """Rows that are computed together; the last ones may be empty."""

    items: Sequence[Item]
    arrays: Rows


def batches(items: Sequence[Item], tokens_per_batch: int) -> Iterator[Batch]:
    """The items as batches of few different shapes, so that few programs are compiled.

    Rows are as long as a multiple of an eighth of the power of two below them, and have a power
    of two of targets.
    """
    waiting = sorted(items, key=lambda item: item.length, reverse=True)
    while waiting:
        length = _round_up(waiting[0].length)
        rows = min(max(1, tokens_per_batch // length), len(items))
        taken, waiting = waiting[:rows], waiting[rows:]
        targets = max(16, *(item.num_targets for item in taken))
        yield Batch(taken, _lay_out(taken, rows, length, 1 << (targets - 1).bit_length()))


def _round_up(length: int) -> int:
    step = max(16, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def _lay_out(items: Sequence[Item], rows: int, length: int, targets: int) -> Rows:
    shapes = (length, length, length, targets, targets)
    arrays = Rows(*(np.zeros((rows, size), np.int32) for size in shapes))
    arrays.branch_BC[:] = _PAD
    for row, item in enumerate(items):
        end, last = len(item.context), len(item.context) - 1
        arrays.token_BC[row, :end] = item.context
        arrays.position_BC[row, :end] = np.arange(end)
        arrays.branch_BC[row, :end] = 0
        done = 0
        for branch, (_, tokens) in enumerate(item.continuations, start=1):
            inner = slice(end, end + len(tokens) - 1)
            arrays.token_BC[row, inner] = tokens[:-1]
            arrays.position_BC[row, inner] = last + np.arange(1, len(tokens))
            arrays.branch_BC[row, inner] = branch
            scored = slice(done, done + len(tokens))
            arrays.source_BM[row, scored] = [last, *range(inner.start, inner.stop)]
            arrays.target_BM[row, scored] = tokens
            end, done = inner.stop, scored.stop
    return arrays


def _read(batch: Batch, computed: Any) -> Iterator[tuple[int, Score]]:
    log_probability_BM, is_best_BM = (np.asarray(array) for array in computed)
    for row, item in enumerate(batch.items):
        start = 0
        for index, tokens in item.continuations:
            scored = slice(start, start + len(tokens))
            total = log_probability_BM[row, scored].sum(dtype=np.float64)
            yield index, (float(total), bool(is_best_BM[row, scored].all()))
            start = scored.stop


# --------------------------------------------------------------------------------------------
# What the device does.


@functools.partial(jax.jit, static_argnums=3)
def _take_in(
    params: model.Params, cache: decoder.Cache, tokens_C: jax.Array, config: ModelConfig
) -> decoder.Cache:
    """An empty cache filled with one text."""
    position_C = jnp.arange(cache.slots)
    is_seen_CS = position_C[None, :] <= position_C[:, None]
    return decoder.extend(params, config, cache, tokens_C, 0, position_C, is_seen_CS)[1]


@functools.partial(jax.jit, static_argnums=3)
def _score_rows(
    params: model.Params, prefix: decoder.Cache, rows: Rows, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every target, float32 [B, M], and whether none is more probable."""
    shared, length = prefix.slots, rows.token_BC.shape[1]
    cache = decoder.Cache(*(jnp.pad(x, ((0, 0), (0, 0), (0, length), (0, 0))) for x in prefix))
    is_earlier_CC = jnp.tril(jnp.ones((length, length), bool))

    def score(row: Any) -> tuple[jax.Array, jax.Array]:
        token_C, position_C, branch_C, source_M, target_M = row
        is_open_CC = (branch_C == 0)[None, :] | (branch_C[None, :] == branch_C[:, None])
        is_seen_CS = jnp.pad(
            is_earlier_CC & is_open_CC, ((0, 0), (shared, 0)), constant_values=True
        )
        hidden_CD, _ = decoder.extend(
            params, config, cache, token_C, shared, shared + position_C, is_seen_CS
        )
        logits_MV = hidden_CD[source_M] @ params["embedding"].T
        chosen_M = jnp.take_along_axis(logits_MV, target_M[:, None], axis=1)[:, 0]
        log_probability_M = chosen_M - jax.nn.logsumexp(logits_MV, axis=1)
        return log_probability_M, logits_MV.argmax(axis=1) == target_M

    return jax.vmap(score)(rows)
