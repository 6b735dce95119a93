"""What lm-eval's samples say: items, and metrics that follow from them."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qkjax import errors
from qkjax.tasks.benchmarks import Benchmark


def item(benchmark: Benchmark, sample: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the items file, from a sample of lm-eval.

    The digest is of the texts that were scored, with the shots: equal ones answered the same.
    """
    contexts = [context for context, _ in sample["arguments"]]
    texts = [contexts[0], *(continuation for _, continuation in sample["arguments"])]
    scores = [score for score, _ in sample["filtered_resps"]]
    common = {
        "task": benchmark.name,
        "index": sample["doc_id"],
        "item_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }
    if benchmark.name == "hellaswag":
        choice = {"acc": int(sample["acc"]), "acc_norm": int(sample["acc_norm"])}
        return {**common, "log_likelihoods": scores, "gold": int(sample["target"]), **choice}
    return {**common, "log_likelihood": scores[0], "acc": int(sample["acc"])}


def check_finite(items: Sequence[Mapping[str, Any]]) -> None:
    """Refuses log-likelihoods that are not finite.

    Raises:
        UsageError: one is not finite; names the item.
    """
    for one in items:
        scores = one.get("log_likelihoods") or [one["log_likelihood"]]
        if not all(map(math.isfinite, scores)):
            raise errors.UsageError(
                f"{one['task']}: the log-likelihoods of item {one['index']} are not finite "
                f"({scores}). The model is damaged or has diverged: give an earlier --step."
            )


def metrics(task: str, items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Value and standard error of a task's metrics, as lm-eval defines the values.

    Errors are of the mean over items; that of the perplexity by the delta method, where lm-eval
    has a bootstrap.

    Returns:
        By name "value" and "stderr"; None for the error of a single item.
    """
    names = ("acc", "acc_norm") if task == "hellaswag" else ("acc",)
    found = {name: _mean([float(one[name]) for one in items]) for name in names}
    if task == "lambada":
        mean = _mean([one["log_likelihood"] for one in items])
        assert mean["value"] is not None
        perplexity = float(np.exp(-mean["value"]))
        error = None if mean["stderr"] is None else perplexity * mean["stderr"]
        found["perplexity"] = {"value": perplexity, "stderr": error}
    return found


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    error = None
    if len(values) > 1:
        error = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"value": float(np.mean(values)), "stderr": error}


def summary(result: Mapping[str, Any], *, is_sample: bool) -> str:
    """One line for people on a task of the JSON file; a sample is called one."""
    found = ", ".join(
        f"{name} {metric['value']:,.4f}"
        + ("" if metric["stderr"] is None else f" +- {metric['stderr']:,.4f}")
        for name, metric in result["metrics"].items()
    )
    of = "SAMPLE, the first items only: " if is_sample else ""
    cut = f", {result['truncated']:,} prompts truncated" if result["truncated"] else ""
    shots = f"{result['num_fewshot']}-shot"
    return f"{of}{result['name']}, {shots}: {found}, n {result['n']:,}{cut}"
