"""Text from a trained model, token by token: a KV cache, temperature, top-p.

Arithmetic is float32 for every run, so a greedy continuation is that of the exported model.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qkjax import errors, model
from qkjax.config import ModelConfig
from qkjax.data.tokenizer import Tokenizer
from qkjax.trained import decoder, trained_run

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
        """Refuses values out of range.

        Raises:
            UsageError: a value is out of range; it names the flag.
        """
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
    prompt: str  # "" starts a document
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
    encoded = [int(token) for token in tokenizer.encode_batch([request.prompt])[0]]
    prompt = encoded
    if not prompt:
        if not opened.dataset.manifest.end_of_text:
            raise errors.UsageError(
                "--prompt: empty, and this model has not learned how documents start: its dataset "
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
    started = time.monotonic()
    write(request.prompt)
    for piece in stream(tokenizer, _recorded(tokens, generated), after=encoded):
        write(piece)
    write("\n")
    rate = len(generated) / (time.monotonic() - started)
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


def stream(tokenizer: Tokenizer, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
    """The text of tokens as they come, without the end-of-text token; only whole characters.

    Args:
        after: the tokens before them, whose text is not given; some tokenizers strip the space at
            the beginning of what they decode, so both are decoded together.
    """
    ids = list(after)
    text = tokenizer.decode(ids)
    shown = len(text)
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
    cache = decoder.empty_cache(config, length)
    key = jax.random.key(sampling.seed)
    tokens, start = np.asarray(prompt, np.int32), 0
    while start + len(tokens) < length:
        logits_V, cache = decoder.next_token_logits(params, config, cache, tokens, start)
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
