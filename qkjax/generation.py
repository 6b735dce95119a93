"""Text from a trained model, token by token: a KV cache, temperature, top-p.

The forward pass is that of `model.py` for one sequence, with the keys and values of earlier
positions kept instead of computed again; tests hold the two equal. Arithmetic is float32, whatever
the run was trained in, so that a greedy continuation is that of the exported model.
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkjax import attention, errors, model
from qkjax.config import ModelConfig
from qkjax.data.tokenizer import Tokenizer
from qkjax.export import trained_run

_INCOMPLETE = "\ufffd"  # how a decoder shows bytes that are not a whole character yet


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 takes the most probable one. Else it is drawn from softmax(logits / temperature),
    cut to the fewest tokens that hold `top_p` of the probability (Holtzman et al. 2020).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuses values out of range; UsageError that names the flag."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise errors.UsageError(
                f"--temperature: {self.temperature:g}, expected 0 (greedy) or more. Give another."
            )
        if not 0 < self.top_p <= 1:
            raise errors.UsageError(
                f"--top_p: {self.top_p:g}, expected above 0 and at most 1 (all). Give another."
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue, and how; None stands for the default."""

    workdir: pathlib.Path
    prompt: str  # "" begins a document
    max_tokens: int
    sampling: Sampling
    step: int | None = None  # of the checkpoint; the latest
    data_dir: str | None = None  # where the dataset lies now; where the run found it


def run(request: Request, write: Callable[[str], None], report: Callable[[str], None]) -> None:
    """Continues a prompt with a run's model, which need not be finished.

    Args:
        write: gets the prompt and then its continuation, piece by piece.
        report: gets a line at the end: tokens, speed, and why it ended.
    Raises:
        UsageError: what `open_run` refuses, a wrong request, a prompt that is too long.
    """
    request.sampling.check()
    if request.max_tokens < 1:
        raise errors.UsageError(
            f"--max_tokens: {request.max_tokens}, expected 1 or more. Give another."
        )
    opened = trained_run.open_run(
        request.workdir, step=request.step, data_dir=request.data_dir, finished=False
    )
    tokenizer, config = opened.tokenizer, opened.config.model
    prompt = [int(token) for token in tokenizer.encode_batch([request.prompt])[0]]
    if not prompt:
        if not opened.dataset.manifest.end_of_text:
            raise errors.UsageError(
                "--prompt: empty, and this model has not learned how documents begin: its dataset "
                "has no end-of-text tokens. Give some text."
            )
        prompt = [tokenizer.eos_id]
    generated: list[int] = []
    tokens = generate(
        opened.params,
        config,
        prompt,
        max_tokens=request.max_tokens,
        eos_id=tokenizer.eos_id,
        sampling=request.sampling,
    )
    begun = time.monotonic()
    write(request.prompt)
    for piece in stream(tokenizer, _recorded(tokens, generated)):
        write(piece)
    write("\n")
    rate = len(generated) / (time.monotonic() - begun)
    if generated[-1] == tokenizer.eos_id:
        why = "the document ended"
    elif len(generated) == request.max_tokens:
        why = "--max_tokens reached"
    else:
        why = f"the context of {config.sequence_length} tokens is full"
    report(f"{len(generated)} tokens, {rate:.1f} a second, step {opened.step}: {why}")


def _recorded(tokens: Iterable[int], into: list[int]) -> Iterator[int]:
    for token in tokens:
        into.append(token)
        yield token


def stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, without the end-of-text token; only whole characters."""
    ids: list[int] = []
    shown = 0
    text = ""
    for token in tokens:
        if token == tokenizer.eos_id:
            continue
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(_INCOMPLETE):
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:  # it ended within a character
        yield text[shown:]


# --------------------------------------------------------------------------------------------
# Tokens.


def generate(
    params: model.Params,
    config: ModelConfig,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    eos_id: int,
    sampling: Sampling | None = None,
) -> Iterator[int]:
    """Yields the tokens that follow a prompt, at most `max_tokens`.

    It ends after eos_id, which is yielded, and where prompt and continuation fill the model's
    context. The same arguments give the same tokens.

    Args:
        prompt: at least 1 id; nothing is put before them.
        sampling: None takes the most probable token every time.
    Raises:
        UsageError: the prompt leaves no room in the context; before the first token.
    """
    context = config.sequence_length
    if not 1 <= len(prompt) < context:
        raise errors.UsageError(
            f"--prompt: {len(prompt)} tokens, expected 1 to {context - 1}: the model's context is "
            f"{context}. Give a shorter text."
        )
    sampling = Sampling() if sampling is None else sampling
    length = min(len(prompt) + max_tokens, context)
    return _generate(params, config, prompt, length, eos_id, sampling)


def _generate(
    params: model.Params,
    config: ModelConfig,
    prompt: Sequence[int],
    length: int,
    eos_id: int,
    sampling: Sampling,
) -> Iterator[int]:
    params = jax.device_put(params)
    cache = empty_cache(config, length)
    key = jax.random.key(sampling.seed)
    tokens, start = np.asarray(prompt, np.int32), 0
    while start + len(tokens) < length:
        logits_V, cache = forward(params, config, cache, tokens, start)
        start += len(tokens)
        if sampling.temperature == 0:
            token = int(jnp.argmax(logits_V))
        else:
            token = int(
                sample(
                    jax.random.fold_in(key, start), logits_V, sampling.temperature, sampling.top_p
                )
            )
        yield token
        if token == eos_id:
            return
        tokens = np.array([token], np.int32)


@jax.jit
def sample(
    key: jax.Array, logits_V: jax.Array, temperature: jax.Array | float, top_p: jax.Array | float
) -> jax.Array:
    """One token id, drawn from the nucleus of softmax(logits / temperature).

    Args:
        logits_V: [V] float32.
        temperature: above 0.
        top_p: in (0, 1]. The most probable tokens are kept until their sum reaches it; at least 1.
    Returns:
        [] int32.
    Source: Holtzman et al. 2020 (nucleus sampling).
    """
    scaled = (logits_V - logits_V.max()) / temperature  # a tiny temperature overflows to -inf only
    order = jnp.argsort(-scaled)
    sorted_logits = scaled[order]
    probability = jax.nn.softmax(sorted_logits)
    before = jnp.cumsum(probability) - probability
    is_kept = (before < top_p).at[0].set(True)
    chosen = jax.random.categorical(key, jnp.where(is_kept, sorted_logits, -jnp.inf))
    return order[chosen].astype(jnp.int32)


# --------------------------------------------------------------------------------------------
# The decoder with a cache.


class Cache(NamedTuple):
    """Keys (after RoPE) and values of the positions seen so far, zeros beyond; float32."""

    key_NLGK: jax.Array  # L: positions that the cache has room for
    value_NLGK: jax.Array


def empty_cache(config: ModelConfig, length: int) -> Cache:
    """A cache with room for `length` positions."""
    shape = (config.num_layers, length, config.num_kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape), jnp.zeros(shape))


def forward(
    params: model.Params, config: ModelConfig, cache: Cache, tokens_C: np.ndarray, start: int
) -> tuple[jax.Array, Cache]:
    """Takes tokens at positions start ... start + C - 1 in; earlier ones must be in the cache.

    Args:
        tokens_C: int32 [C], C at least 1.
    Returns:
        Logits [V] float32 of the token after the last, and the cache with these positions; the
        old cache is given up.
    """
    with jax.default_matmul_precision("highest"):  # GPUs would take TF32
        return _forward(params, cache, tokens_C, jnp.int32(start), config)


@functools.partial(jax.jit, static_argnums=4, donate_argnums=1)
def _forward(
    params: model.Params, cache: Cache, tokens_C: jax.Array, start: jax.Array, config: ModelConfig
) -> tuple[jax.Array, Cache]:
    room, taken = cache.key_NLGK.shape[1], tokens_C.shape[0]
    cos_LK, sin_LK = attention.rotary_tables(room, config.head_dim, config.rope_base)
    rotary = tuple(jax.lax.dynamic_slice_in_dim(x, start, taken) for x in (cos_LK, sin_LK))
    is_seen_CL = jnp.arange(room)[None, :] <= (start + jnp.arange(taken))[:, None]

    def block(x_CD: jax.Array, layer: tuple[Any, Cache]) -> tuple[jax.Array, Cache]:
        p, kept = layer
        normed = _rms_norm(x_CD, p["attention_norm"], config)
        attended, kept = _attend(p["attention"], normed, kept, rotary, is_seen_CL, start, config)
        x_CD = x_CD + attended
        normed = _rms_norm(x_CD, p["mlp_norm"], config)
        return x_CD + _mlp(p["mlp"], normed, config), kept

    x_CD = params["embedding"][tokens_C] * math.sqrt(config.d_model)
    x_CD, cache = jax.lax.scan(block, x_CD, (params["blocks"], cache))
    final_D = _rms_norm(x_CD[-1], params["final_norm"], config)
    return params["embedding"] @ final_D, cache


def _attend(
    p: Any,
    x_CD: jax.Array,
    kept: Cache,  # of this layer: [L, G, K]
    rotary: tuple[jax.Array, ...],
    is_seen_CL: jax.Array,
    start: jax.Array,
    config: ModelConfig,
) -> tuple[jax.Array, Cache]:
    C, G, K = len(x_CD), config.num_kv_heads, config.head_dim
    query_CHK = (x_CD @ p["query"]["kernel"]).reshape(C, -1, K)
    key_CGK = (x_CD @ p["key"]["kernel"]).reshape(C, G, K)
    value_CGK = (x_CD @ p["value"]["kernel"]).reshape(C, G, K)
    if config.qk_norm != "none":
        query_CHK = _rms_norm(query_CHK, p["query_norm"], config)
        key_CGK = _rms_norm(key_CGK, p["key_norm"], config)
    query_CHK = attention.apply_rotary(query_CHK, *rotary)
    key_CGK = attention.apply_rotary(key_CGK, *rotary)
    keys = jax.lax.dynamic_update_slice_in_dim(kept.key_NLGK, key_CGK, start, 0)
    values = jax.lax.dynamic_update_slice_in_dim(kept.value_NLGK, value_CGK, start, 0)
    query = query_CHK.reshape(C, G, -1, K)  # R: query heads that share a kv head
    scores = jnp.einsum("cgrk,lgk->grcl", query, keys) * K**-0.5
    weights = jax.nn.softmax(jnp.where(is_seen_CL, scores, -jnp.inf), axis=-1)
    out_CGRK = jnp.einsum("grcl,lgk->cgrk", weights, values)
    return out_CGRK.reshape(C, -1) @ p["output"]["kernel"], Cache(keys, values)


def _mlp(p: Any, x_CD: jax.Array, config: ModelConfig) -> jax.Array:
    up_CF = x_CD @ p["up"]["kernel"]
    if config.mlp == "swiglu":
        hidden_CF = jax.nn.silu(x_CD @ p["gate"]["kernel"]) * up_CF
    else:
        hidden_CF = jnp.square(jax.nn.relu(up_CF))
    return hidden_CF @ p["down"]["kernel"]


def _rms_norm(x: jax.Array, p: Any, config: ModelConfig) -> jax.Array:
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + config.norm_eps) * p["gamma"]
