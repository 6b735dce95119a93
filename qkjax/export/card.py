"""README.md of an exported directory: what the model is, and whether it was verified."""

import json
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import jax

from qkjax.export import hf
from qkjax.runs.directory import RunDirectory
from qkjax.trained.trained_run import TrainedRun

NOT_VERIFIED = ("Not verified. Export again with --verify to compare it with its run.",)
_METRICS = {  # of a run's row -> type and name of the hub
    "val/loss": ("loss", "validation loss, nat per token"),
    "val/perplexity": ("perplexity", "validation perplexity"),
    "pr/key/post_rope/raw": ("participation_ratio", "PR of keys after RoPE, raw"),
    "pr/key/pre_rope/centred": ("participation_ratio", "PR of keys before RoPE, centred"),
}
_USE = """\
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained("DIR")
    tokenizer = transformers.AutoTokenizer.from_pretrained("DIR")
"""


def render(run: TrainedRun, dtype: str, verification: Sequence[str] = NOT_VERIFIED) -> str:
    """The model card, Markdown with the front matter of the hub; no paths, no times.

    Args:
        dtype: of the stored tensors.
        verification: a paragraph, or the lines of a table, of what --verify found.
    """
    config, manifest = run.config, run.dataset.manifest
    name = f"{config.arm}, {config.recipe}, {config.scale}, seed {config.seed}, step {run.step}"
    rows = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in _facts(run, dtype))
    end_of_text = f"{_cell(run.tokenizer.eos_token)} (id {run.tokenizer.eos_id})"
    starts = (
        "In training every document came after it:\n"
        "  put it before a prompt that starts a document."
        if manifest.end_of_text
        else "In training documents followed each\n  other without it: the model has never seen it."
    )
    return f"""---
{_front_matter(run, name)}
---

# qkjax: {name}

A small research model of the study of QK-Norm under AdamW and Muon. It is not an assistant, and
its answers are not reliable. It loads with stock classes:

{_USE}
| | |
|---|---|
{rows}

## Notes

- The embedding is stored times sqrt({config.model.d_model}) and the final norm's weight divided by
  it: the stock class does not scale the embedding. The head is tied to the embedding.
- The end-of-text token {end_of_text} also serves as the token for beginning and padding.
  The tokenizer does not add it. {starts}
- transformers reads a special token written out in a text as that token; in training the same
  characters were ordinary text.
- The licence above is that of qkjax. Change it if the training text requires another one.

## Verification

{chr(10).join(verification)}
"""


def _front_matter(run: TrainedRun, name: str) -> str:
    """The hub's metadata as YAML: library, task, licence, tags, results. JSON is YAML."""
    model = run.config.model
    norm = "no-qk-norm" if model.qk_norm == "none" else "qk-norm"
    tags = ["qkjax", "jax", run.config.optimizer.name, norm, "participation-ratio"]
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": tags,
    }
    results = _results(run)
    if results:
        values["model-index"] = [{"name": f"qkjax: {name}", "results": results}]
    return "\n".join(f"{key}: {_yaml(value)}" for key, value in values.items())


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    return textwrap.indent(json.dumps(value, indent=1), "  ").strip()


def _results(run: TrainedRun) -> list[dict[str, Any]]:
    """What the run measured on its validation split at this step, as the hub's model-index."""
    row = _evaluation(run)
    metrics = [
        {"type": kind, "name": title, "value": float(row[key])}
        for key, (kind, title) in _METRICS.items()
        if row.get(key) is not None
    ]
    if not metrics:
        return []
    manifest = run.dataset.manifest
    dataset = {
        "name": f"{manifest.name}, fingerprint {manifest.fingerprint[:12]}",
        "type": manifest.fingerprint,
        "split": "validation",
    }
    task = {"type": "text-generation", "name": "Text Generation"}
    return [{"task": task, "dataset": dataset, "metrics": metrics}]


def _facts(run: TrainedRun, dtype: str) -> list[tuple[str, Any]]:
    config, environment, summary = run.config, run.environment, run.summary or {}
    manifest, optimizer = run.dataset.manifest, run.config.optimizer
    versions, git = environment.get("versions") or {}, environment.get("git") or {}
    rate = f"{optimizer.learning_rate:g}"
    if optimizer.adam_learning_rate is not None:
        rate += f", {optimizer.adam_learning_rate:g} for embedding and gammas"
    diverged = summary.get("diverged_step")
    return [
        ("class", hf.architecture(config.model)),
        ("tensors", dtype),
        ("parameters", f"{sum(math.prod(x.shape) for x in jax.tree.leaves(run.params)):,}"),
        ("arm", config.arm),
        ("QK-Norm", config.model.qk_norm),
        ("MLP", config.model.mlp),
        ("recipe, scale, seed", f"{config.recipe}, {config.scale}, {config.seed}"),
        ("optimiser, learning rate", f"{optimizer.name}, {rate}"),
        ("step", f"{run.step:,} of {config.schedule.num_steps:,}"),
        ("training tokens", f"{run.step * config.train.tokens_per_step:,}"),
        ("context", f"{config.model.sequence_length:,} tokens"),
        ("validation loss (nat per token)", _validation_loss(run)),
        ("trained in", f"{config.model.dtype} on {_device(environment)}"),
        ("diverged", "no" if diverged is None else f"at step {diverged}"),
        ("dataset", manifest.name),
        ("dataset fingerprint", manifest.fingerprint),
        ("tokenizer sha256", run.tokenizer.sha256),
        ("params_sha256 of the checkpoint", run.params_sha256),
        ("qkjax, jax", f"{versions.get('qkjax')}, {versions.get('jax')}"),
        ("git commit", git.get("sha")),
    ]


def _evaluation(run: TrainedRun) -> dict[str, Any]:
    """The row of the exported step; empty where the run has none."""
    directory = RunDirectory(run.workdir)
    rows = directory.read_metrics() if directory.metrics.exists() else []
    return next((row for row in rows if row["step"] == run.step), {})


def _validation_loss(run: TrainedRun) -> str:
    found = _evaluation(run).get("val/loss")
    return "not measured at this step" if found is None else f"{found:.5f}"


def _device(environment: dict[str, Any]) -> str:
    devices = environment.get("devices") or {}
    return f"{devices.get('count')} x {devices.get('kind')}"


def _cell(value: Any) -> str:
    """Text that stays in its cell, for any name that a user gives."""
    text = "unknown" if value is None else " ".join(str(value).split())
    for character in "\\|<>`[]*":
        text = text.replace(character, f"\\{character}")
    return text
