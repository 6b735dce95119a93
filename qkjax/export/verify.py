"""Does an exported directory compute what its run's model does? Measured, not assumed.

The directory is loaded as anybody would load it, by transformers' Auto classes on torch's CPU in
float32, and compared with the run's parameters under JAX in float32. Nothing here trusts the
exporter but two checks: the fields of config.json, because a wrong one may hide in small
differences of logits (an epsilon does), and the bytes of the tensors.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkjax import errors, files, model
from qkjax.config import ModelConfig
from qkjax.data import pipeline
from qkjax.data import tokenizer as tokenizer_lib
from qkjax.export import hf
from qkjax.runs.directory import RunDirectory
from qkjax.trained.trained_run import TrainedRun

LOGIT_LIMIT = 1e-4  # absolute, float32 tensors
LOSS_LIMIT = 1e-4  # nat per token, of a sequence
BFLOAT16_LOSS_LIMIT = 5e-3


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: a number under its limit, or a fact; `passed` None: could not be made."""

    name: str
    found: str
    limit: str = ""
    passed: bool | None = True

    def line(self) -> str:
        """`ok    name: found (limit)`."""
        word = {True: "ok    ", False: "FAILED", None: "-     "}[self.passed]
        return f"{word} {self.name}: {self.found}" + (f" (limit {self.limit})" * bool(self.limit))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """All checks of a directory, in the order they were made, and with what."""

    checks: tuple[Check, ...]
    versions: str

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed, with what they found."""
        return [f"{check.name}: {check.found}" for check in self.checks if check.passed is False]

    def table(self) -> list[str]:
        """The verdict as Markdown: a sentence and a table."""
        words = {True: "ok", False: "FAILED", None: "not compared"}
        head = (
            f"**FAILED**: {len(self.failed)} of {len(self.checks)} checks. Do not use this model."
            if self.failed
            else "Verified: this directory computes what the run's model computes."
        )
        rows = [
            f"| {check.name} | {check.found.replace('|', ' ')} | {check.limit} | "
            f"{words[check.passed]} |"
            for check in self.checks
        ]
        return [
            f"{head} Compared in float32 on a CPU ({self.versions}).",
            "",
            *("| check | found | limit | |", "|---|---|---|---|", *rows),
        ]


def require_torch() -> None:
    """Checks that torch and transformers are installed.

    Raises:
        UsageError: one is not; names the command that installs it.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise errors.UsageError(
            f"--verify: {error.name} is not installed. Run pip install -e '.[export]', "
            "or export without --verify."
        ) from None


def verify(
    directory: pathlib.Path,
    run: TrainedRun,
    sequences: int = 8,
    report: Callable[[str], None] = print,
) -> Verdict:
    """Compares an exported directory with the run that it came from; changes neither.

    Args:
        sequences: of the validation split, from its first on; all where it has fewer.
        report: gets the line of every check as it is made.
    Raises:
        UsageError: torch or the dataset's validation shards are missing; safetensors damaged.
    """
    require_torch()
    import torch
    import transformers

    checks: list[Check] = []

    def add(*made: Check) -> None:
        checks.extend(made)
        for check in made:
            report(check.line())

    dtype = _stored_dtype(directory)
    add(_check_config(directory, run, dtype), _check_tensors(directory, run, dtype))
    records_NT = _records(run, sequences)
    with quiet(transformers):
        add(_check_tokenizer(directory, run, records_NT))
        stock, loading = _load(directory, run.config.model)
    add(loading)
    if stock is not None:
        for check in _numbers(stock, run, records_NT, exact=dtype == "float32"):
            add(check)
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}"
    )
    return Verdict(tuple(checks), versions)


# --------------------------------------------------------------------------------------------
# What lies there.


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """An object of the export; {} where there is none, which the checks then find."""
    try:
        return files.read_object(path, "") or {}
    except errors.QkjaxError:
        return {}


def _stored_dtype(directory: pathlib.Path) -> str:
    dtype = _read_json(directory / hf.CONFIG_FILE).get("dtype")
    return dtype if dtype in hf.DTYPES else "float32"


def _check_config(directory: pathlib.Path, run: TrainedRun, dtype: str) -> Check:
    expected = hf.config_json(run.config.model, eos_id=run.tokenizer.eos_id, dtype=dtype)
    different = hf.differences(expected, _read_json(directory / hf.CONFIG_FILE))
    return Check("config.json", "; ".join(different) or "as the run's", passed=not different)


def _check_tensors(directory: pathlib.Path, run: TrainedRun, dtype: str) -> Check:
    """Names, dtypes, shapes and bits of all tensors."""
    expected = hf.to_tensors(run.params, run.config.model, dtype=dtype)
    try:
        found = hf.load_tensors(directory / hf.WEIGHTS_FILE)
    except errors.UsageError as error:
        return Check("tensors", str(error), passed=False)
    wrong = [
        name
        for name in sorted(expected.keys() | found.keys())
        if name not in expected
        or name not in found
        or expected[name].dtype != found[name].dtype
        or expected[name].shape != found[name].shape
        or expected[name].tobytes() != found[name].tobytes()
    ]
    text = f"{len(wrong)} differ: {', '.join(wrong[:4])}" if wrong else "bit-identical"
    return Check("tensors", text, passed=not wrong)


def _check_tokenizer(directory: pathlib.Path, run: TrainedRun, records_NT: np.ndarray) -> Check:
    """The file of training; and AutoTokenizer reads text as training did, adding nothing."""
    import transformers

    path = directory / tokenizer_lib.FILE_NAME
    expected_file = tokenizer_lib.without_additions(run.tokenizer.content)
    if not path.is_file() or path.read_bytes() != expected_file:
        return Check("tokenizer", "tokenizer.json is not the dataset's", passed=False)
    try:
        stock = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # any error means that the directory does not load
        return Check("tokenizer", f"AutoTokenizer: {errors.one_line(error)}", passed=False)
    ours = run.tokenizer
    ids = (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id)
    if ids != (ours.eos_id,) * 3:
        text = f"bos, eos and pad are {ids}, expected {ours.eos_id}"
        return Check("tokenizer", text, passed=False)
    literals = tuple(stock.added_tokens_encoder)  # in a text, the stock one takes them as tokens
    texts = [text for text in _texts(run, records_NT) if not any(x in text for x in literals)]
    expected = [encoded.tolist() for encoded in ours.encode_batch(texts)]
    if [stock.encode(text) for text in texts] != expected:
        return Check("tokenizer", "AutoTokenizer gives other tokens", passed=False)
    return Check("tokenizer", f"{sum(map(len, expected)):,} tokens of text equal")


def _texts(run: TrainedRun, records_NT: np.ndarray) -> list[str]:
    """The documents, or parts of them, that the records hold."""
    texts = []
    for record in records_NT:
        ends = np.flatnonzero(record == run.tokenizer.eos_id)
        parts = np.split(record, ends)
        texts += [run.tokenizer.decode(part[part != run.tokenizer.eos_id]) for part in parts]
    return [text for text in texts if text]


def _load(directory: pathlib.Path, config: ModelConfig) -> tuple[Any, Check]:
    """The stock model in float32, or None, and whether it loaded with nothing left over."""
    import torch
    import transformers

    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        stock, info = loaded
    except Exception as error:  # any error means that the directory does not load
        return None, Check("loads", errors.one_line(error), passed=False)
    problems = [
        f"{kind.replace('_', ' ')} {sorted(map(str, info[kind]))[:4]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(kind)
    ]
    found = type(stock).__name__
    if found != hf.architecture(config):
        problems.append(f"as {found}, expected {hf.architecture(config)}")
    return stock.eval(), Check("loads", "; ".join(problems) or f"as {found}", passed=not problems)


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars and warnings: what they say is checked by the caller."""
    settings = transformers.utils.logging
    level = settings.get_verbosity()
    settings.set_verbosity(50)
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(level)
        settings.enable_progress_bar()


# --------------------------------------------------------------------------------------------
# What it computes.


class _Compared(NamedTuple):
    """One sequence under both."""

    error: float  # largest difference of a logit
    positions: int  # whose two best logits are further apart than twice the error
    other_argmax: int  # among these
    loss: float  # nat per token, JAX
    stock_loss: float


def _records(run: TrainedRun, sequences: int) -> np.ndarray:
    """int32 [N, T+1], the first of the validation split."""
    manifest = run.dataset.manifest
    batches = pipeline.read_validation(
        run.dataset.directory,
        manifest,
        num_tokens=sequences * manifest.sequence_length,
        sequences_per_batch=1,
    )
    return np.concatenate([batch.tokens for batch in batches])


def _numbers(
    stock: Any, run: TrainedRun, records_NT: np.ndarray, *, exact: bool
) -> Iterator[Check]:
    """Logits, argmax and losses; `exact`: the stored tensors are float32."""
    ours = _Ours(run)
    tiny = _compare(ours, stock, records_NT[0], _tiny_scale(run, records_NT[0, :-1]))
    limit, bound = (f"{LOGIT_LIMIT:g}", LOGIT_LIMIT) if exact else ("", math.inf)
    yield Check("logits at tiny activations", f"{tiny.error:.2e} apart", limit, tiny.error <= bound)
    seen = [_compare(ours, stock, record, 1.0) for record in records_NT]
    error = max(one.error for one in seen)
    num_tokens = records_NT[:, 1:].size
    what = f"{error:.2e} apart over {num_tokens:,} positions"
    yield Check("logits on validation text", what, limit, error <= bound)
    other, positions = sum(one.other_argmax for one in seen), sum(one.positions for one in seen)
    what = f"{other} of {positions:,} positions differ"
    yield Check("argmax, where two errors apart", what, "0", other == 0)

    losses = np.array([one.loss for one in seen])
    stock_losses = np.array([one.stock_loss for one in seen])
    yield _loss_check("loss against JAX, float32", losses, stock_losses, exact)
    name = f"loss against validation/step_{run.step:08d}.npz"
    recorded = _recorded_losses(run)
    if recorded is None:
        yield Check(name, "the run has no such file", passed=None)
        return
    both = min(len(recorded), len(stock_losses))
    yield _loss_check(
        name, recorded[:both], stock_losses[:both], exact and run.config.model.dtype == "float32"
    )


def _loss_check(name: str, expected: np.ndarray, found: np.ndarray, exact: bool) -> Check:
    limit = LOSS_LIMIT if exact else BFLOAT16_LOSS_LIMIT
    error = float(np.abs(expected - found).max())
    what = f"{error:.2e} nat per token apart over {len(found)} sequences"
    return Check(name, what, f"{limit:g}", error <= limit)  # NaN fails


def _recorded_losses(run: TrainedRun) -> np.ndarray | None:
    """Loss of every sequence, nat per token, as the run's evaluation of this step found it."""
    directory = RunDirectory(run.workdir)
    if not directory.validation(run.step).is_file():
        return None
    return directory.read_validation(run.step).per_token


def _tiny_scale(run: TrainedRun, tokens_T: np.ndarray) -> float:
    """The power of 2 that scales the embedded tokens to about the norms' epsilon.

    There a norm's output depends on epsilon at once; at ordinary scale a wrong one hides.
    """
    c = run.config.model
    embedded = run.params["embedding"][tokens_T] * math.sqrt(c.d_model)
    mean_square = float(np.square(embedded, dtype=np.float64).mean())
    return 2.0 ** round(0.5 * math.log2(c.norm_eps / mean_square))


class _Ours:
    """The run's model in float32, which cuDNN does not take."""

    def __init__(self, run: TrainedRun) -> None:
        config = dataclasses.replace(
            run.config.model, dtype="float32", attention="auto", unroll=0
        ).on(jax.default_backend())
        self._params = jax.device_put(run.params)

        def logits(params: model.Params, tokens_T: jax.Array, scale: jax.Array) -> jax.Array:
            table_VD = params["embedding"]
            scaled = {**params, "embedding": table_VD * scale}
            hidden_BTD = model.apply(scaled, tokens_T[None], config)
            return jnp.einsum("td,vd->tv", hidden_BTD[0], table_VD)

        self._logits = jax.jit(logits)

    def logits(self, tokens_T: np.ndarray, scale: float) -> np.ndarray:
        """[T, V] float32, with the embedded tokens, and not the head, times `scale`."""
        with jax.default_matmul_precision("highest"):  # GPUs would take TF32
            return np.asarray(self._logits(self._params, tokens_T, np.float32(scale)))


def _stock_logits(stock: Any, tokens_T: np.ndarray, scale: float) -> np.ndarray:
    import torch

    ids = torch.from_numpy(tokens_T.astype(np.int64))[None]
    with torch.inference_mode():
        if scale == 1.0:
            return stock(input_ids=ids, use_cache=False).logits[0].numpy()
        embedded = stock.get_input_embeddings()(ids) * scale
        return stock(inputs_embeds=embedded, use_cache=False).logits[0].numpy()


def _compare(ours: _Ours, stock: Any, record_T: np.ndarray, scale: float) -> _Compared:
    inputs, targets = record_T[:-1], record_T[1:]
    expected, found = ours.logits(inputs, scale), _stock_logits(stock, inputs, scale)
    if expected.shape != found.shape:
        return _Compared(math.inf, 0, 0, math.inf, math.nan)
    error = float(np.abs(expected - found).max())
    top = np.partition(expected, -2, axis=-1)[:, -2:]
    clear = top[:, 1] - top[:, 0] > 2 * error
    other = clear & (expected.argmax(-1) != found.argmax(-1))
    return _Compared(
        error if math.isfinite(error) else math.inf,
        int(clear.sum()),
        int(other.sum()),
        _loss(expected, targets),
        _loss(found, targets),
    )


def _loss(logits_TV: np.ndarray, targets_T: np.ndarray) -> float:
    """Mean over positions of -log softmax(logits)[target], nat."""
    largest = logits_TV.max(axis=-1)
    log_sum = largest + np.log(np.exp(logits_TV - largest[:, None]).sum(axis=-1))
    chosen = logits_TV[np.arange(len(targets_T)), targets_T]
    return float((log_sum - chosen).mean(dtype=np.float64))
