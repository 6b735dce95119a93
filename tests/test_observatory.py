"""Public models: every class against float64 hooks of this file's own; directories; refusals."""

import csv
import inspect
import json
import pathlib
import runpy
import subprocess
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest
import random_run
import small_run

from qkjax import errors, sharding
from qkjax import evaluation as evaluation_lib
from qkjax.data import holdout, pipeline
from qkjax.export import directory as export_directory
from qkjax.measures import ranks
from qkjax.observatory import directory, gallery, loading, text
from qkjax.observatory.capture import Capture
from qkjax.observatory.measure import measure_model
from qkjax.report import charts, figures, quantities, run_spectra
from qkjax.runs.directory import RunDirectory
from qkjax.trained import rank_curves

torch = pytest.importorskip("torch", reason="public models are torch's")
transformers = pytest.importorskip("transformers", reason="public models are transformers'")

ROOT = pathlib.Path(__file__).resolve().parents[1]
VOCABULARY, LENGTH, WINDOW, HEADS, KV_HEADS, HEAD_DIM = 97, 32, 8, 4, 2, 16
_LAYERS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
# Turns faster dimensions less, and makes keys longer.
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Class of the model and of its config, and its own fields.
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_LAYERS, "attn_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _LAYERS),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", _LAYERS),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"rope_parameters": _PARTIAL}),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"rope_parameters": {**_PARTIAL, "partial_rotary_factor": 0.25}},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "apertus": ("ApertusForCausalLM", "ApertusConfig", {}),
    "arcee": ("ArceeForCausalLM", "ArceeConfig", {}),
    "yarn": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": _YARN}),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {"logits_scaling": 4.0, "attention_multiplier": 0.5},
    ),
}
SHORT = ("gemma3", "gpt_neox")  # norm, window and shared kv heads; fused and partly rotated
NORMS = {"qwen3": HEAD_DIM, "gemma3": HEAD_DIM, "apertus": HEAD_DIM, "olmo2": 0, "olmo3": 0}
WINDOWS = {
    "mistral": (WINDOW, WINDOW),
    **dict.fromkeys(("gemma2", "gemma3", "olmo3"), (WINDOW, None)),
}
ROTARY = {"phi3": (12, 12), "gpt_neox": (4, 4), "gpt2": (0, 0), "smollm3": (HEAD_DIM, 0)}
BATCHES = np.random.default_rng(0).integers(3, VOCABULARY, (6, LENGTH + 1))
LOOSE = 1e-5  # float32 against float64, of the largest


def small_fields() -> dict[str, Any]:
    """What most configs of transformers take."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 64,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    }


def make_model(kind: str, seed: int = 0) -> Any:
    """Random, two layers, with gammas and biases that are not what a fresh model has."""
    name, config_name, own = CLASSES[kind]
    fields = small_fields()
    if kind in ("gpt_neox", "gpt2"):
        fields["num_key_value_heads"] = HEADS
    if kind == "apertus":
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config_name)(**{**fields, **own}))
    for parameter in model.parameters():
        size = 0.3 if parameter.ndim < 2 else 1.2 * parameter.shape[-1] ** -0.5
        parameter.data += size * torch.randn_like(parameter)
    return model


class Oracle:
    """What a model does in float64, seen by hooks and functions of this file's own."""

    def __init__(self, kind: str, model: Any) -> None:
        self.kind, self.model = kind, model.double().eval()
        self.calls: dict[str, list[Any]] = {}
        self.module = sys.modules[type(model).__module__]
        model.set_attn_implementation("eager")

    def run(self, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
        """Losses [B, T]; fills `calls`, a list over layers for each name."""
        if rotate := getattr(self.module, "apply_rotary_pos_emb", None):

            def rotated(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
                self.calls.setdefault("rotary", []).append((q, k))
                return rotate(q, k, *args, **kwargs)

            monkeypatch.setattr(self.module, "apply_rotary_pos_emb", rotated)
        eager = self.module.eager_attention_forward

        def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
            out, weights = eager(module, q, k, v, mask, **kwargs)
            given = inspect.signature(eager).bind(module, q, k, v, mask, **kwargs).arguments
            rest = {**given.get("kwargs", {}), **given}
            scaling, softcap = rest.get("scaling"), rest.get("softcap")
            logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scaling
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            self.calls.setdefault("attention", []).append((q, k, v, logits, weights))
            return out, weights

        monkeypatch.setattr(self.module, "eager_attention_forward", attend)
        for name, module in self.model.named_modules():
            if name.endswith(("q_norm", "k_norm")):
                module.register_forward_hook(self._normed(name[-6:]))
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor(ids[:, :-1]), use_cache=False).logits
        targets = torch.tensor(ids[:, 1:])[..., None]
        return -logits.log_softmax(-1).gather(-1, targets)[..., 0].numpy()

    def _normed(self, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.calls.setdefault(name, []).append((args[0], module))

        return hook

    def stages(self, layer: int) -> dict[str, np.ndarray]:
        """[B, heads, T, K] by stage."""
        q, k, v, _, _ = self.calls["attention"][layer]
        found = {"query_post_rope": q, "key_post_rope": k, "value": v}
        rotary = ROTARY.get(self.kind, (HEAD_DIM, HEAD_DIM))
        if any(rotary):
            rotations = self.calls["rotary"]
            before = rotations[sum(map(bool, rotary[:layer]))] if rotary[layer] else (q, k)
            found |= {"query_pre_rope": before[0], "key_pre_rope": before[1]}
        for side, name in (("query", "q_norm"), ("key", "k_norm")):
            if self.kind in NORMS:
                x, module = self.calls[name][layer]
                x = x if x.ndim == 4 else x.unflatten(-1, (-1, HEAD_DIM))
                heads_first = self.kind in ("gemma3", "apertus")
                x = x if heads_first else x.transpose(1, 2)
                over = (3,) if NORMS[self.kind] else (1, 3)
                eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
                found[f"{side}_pre_norm"] = x
                divided = x / (x.square().mean(over, keepdim=True) + eps).sqrt()
                found[f"{side}_post_norm"] = divided
        return {name: x.numpy() for name, x in found.items()}

    def seen(self, layer: int) -> np.ndarray:
        """bool [T, T]: which keys the queries of a layer see."""
        distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
        window = WINDOWS.get(self.kind, (None, None))[layer]
        return (distance >= 0) & (distance < (LENGTH if window is None else window))


def assert_near(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert found.shape == expected.shape, what
    assert np.abs(found - expected).max() <= LOOSE * np.abs(expected).max(), what


def assert_products(arrays: dict[str, np.ndarray], oracle: Oracle, layer: int) -> None:
    """Keys with the queries that share them: over all pairs of tokens, and of the kernels."""
    stages = oracle.stages(layer)
    query, key = (stages[f"{side}_pre_rope"] for side in ("query", "key"))
    sharing = query.shape[1] // key.shape[1]
    modules = [m for m in oracle.model.modules() if getattr(m, "layer_idx", None) == layer]
    attention = next((m for m in modules if hasattr(m, "q_proj")), None)
    for head in range(HEADS):
        q, k = (x.reshape(-1, HEAD_DIM) for x in (query[:, head], key[:, head // sharing]))
        for centring, logits in (
            ("raw", q @ k.T),
            ("centred", (q - q.mean(0)) @ (k - k.mean(0)).T),
        ):
            sigma = np.linalg.svd(logits, compute_uv=False)[:HEAD_DIM]
            assert_near(arrays[f"qk_pre_rope_{centring}"][layer, head], sigma, "q.k")
        if attention is None:
            continue
        kernels = []
        for name, at in (("q_proj", head), ("k_proj", head // sharing)):
            weight = getattr(attention, name).weight.detach().numpy()
            rows = weight[at * HEAD_DIM : (at + 1) * HEAD_DIM]
            if oracle.kind in NORMS:
                gamma = getattr(attention, name[0] + "_norm").weight.detach().numpy()
                gamma = gamma + (oracle.kind == "gemma3")
                own = gamma.reshape(-1, HEAD_DIM)[at if len(gamma) > HEAD_DIM else 0]
                rows = rows * own[:, None]
            kernels.append(rows)
        sigma = np.linalg.svd(kernels[0].T @ kernels[1], compute_uv=False)[:HEAD_DIM]
        assert_near(arrays["wqk_singular_values"][layer, head], sigma, "W_q^T W_k")


@pytest.mark.parametrize(
    "kind", [k if k in SHORT else pytest.param(k, marks=pytest.mark.long) for k in CLASSES]
)
def test_every_class_is_what_hooks_in_float64_say(kind, monkeypatch):
    model = make_model(kind)
    found = measure_model(model, [BATCHES[:4], BATCHES[4:]])
    arrays = found.spectra
    oracle = Oracle(kind, model)
    losses = oracle.run(BATCHES, monkeypatch)
    assert_near(found.validation["loss_sum"], losses.sum(axis=1), "loss")
    assert found.metrics["val/loss"] == pytest.approx(losses.mean(), rel=LOOSE)
    expected_stages = set(oracle.stages(0))
    assert {name.removesuffix("_mean") for name in arrays if name.endswith("_mean")} == (
        expected_stages | {"key_norm", "query_norm"}
    )
    for layer in range(2):
        for stage, vectors in oracle.stages(layer).items():
            for head in range(vectors.shape[1]):
                rows = vectors[:, head].reshape(-1, HEAD_DIM)
                mean = rows.mean(axis=0)
                where = f"{stage} of layer {layer}, head {head}"
                assert_near(arrays[f"{stage}_mean"][layer, head], mean, where)
                for centring, matrix in (("raw", rows), ("centred", rows - mean)):
                    sigma = np.linalg.svd(matrix, compute_uv=False)
                    assert_near(arrays[f"{stage}_{centring}"][layer, head], sigma, where)
        _, _, _, logits, weights = oracle.calls["attention"][layer]
        some, seen = slice(0, 4), oracle.seen(layer)
        logits = np.where(seen, logits[some].numpy(), -np.inf)
        assert_near(arrays["max_logit"][layer], logits.max(axis=(0, 2, 3)), "max_logit")
        p = weights[some].numpy()
        assert (p[..., ~seen] == 0).all() and (p[..., seen] > 0).all()
        entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1).mean(axis=(0, 2))
        assert_near(arrays["entropy"][layer], entropy, "entropy")
        assert_near(arrays["sink_mass"][layer], p[:, :, 1:, 0].mean(axis=(0, 2)), "sink")
        stages = oracle.stages(layer)
        lengths = stages.get("key_pre_rope", stages["key_post_rope"])
        lengths = np.linalg.norm(lengths, axis=-1)
        assert_near(arrays["key_norm_mean"][layer], lengths.mean(axis=(0, 2)), "lengths")
        assert_near(arrays["key_norm_max"][layer], lengths.max(axis=(0, 2)), "longest")
        if "key_pre_rope" in expected_stages:
            assert_products(arrays, oracle, layer)
    if kind in NORMS:
        gammas = arrays["gamma_k"]
        for layer in range(2):
            _, module = oracle.calls["k_norm"][layer]
            own = module.weight.detach().numpy() + (kind == "gemma3")
            assert_near(gammas[layer], own, "gamma")
        sizes = np.abs(gammas.astype(np.float64))
        spread = np.quantile(sizes, 0.9, axis=1) / np.quantile(sizes, 0.1, axis=1)
        pr = sizes.sum(axis=1) ** 2 / (sizes**2).sum(axis=1)
        assert found.metrics["gamma/key_spread"] == pytest.approx(np.median(spread), rel=1e-5)
        assert found.metrics["gamma/key_pr"] == pytest.approx(pr.mean(), rel=1e-5)
        assert found.metrics["gamma/key_negative"] == pytest.approx((gammas < 0).mean())
    else:
        assert not {name for name in arrays if "gamma" in name or "norm_raw" in name}
    pr = ranks.participation_ratio(arrays["key_post_rope_raw"].astype(np.float64)).mean()
    assert found.metrics["pr/key/post_rope/raw"] == pytest.approx(pr, rel=1e-6)


@pytest.mark.parametrize(
    "kind", [k if k in SHORT else pytest.param(k, marks=pytest.mark.long) for k in CLASSES]
)
def test_the_facts_of_every_layer(kind):
    model = make_model(kind)
    before = model.config._attn_implementation
    with Capture(model) as captured:
        captured.losses(BATCHES[:1])
        facts = [captured.facts[layer] for layer in range(2)]
    assert [each.window for each in facts] == list(WINDOWS.get(kind, (None, None)))
    assert tuple(each.rotary_dim for each in facts) == ROTARY.get(kind, (HEAD_DIM, HEAD_DIM))
    assert [each.softcap for each in facts] == [3.0 if kind == "gemma2" else None] * 2
    assert model.config._attn_implementation == before  # and the model is as it was
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.long
@pytest.mark.parametrize("qk_norm", ["none", "learned"])
def test_an_exported_run_measures_as_the_run_itself(qk_norm, tmp_path):
    """Every metric and array of our own evaluation, by the other code, in torch."""
    dataset = small_run.make_dataset(tmp_path / "dataset")
    run = random_run.make(tmp_path / "run", dataset, qk_norm)
    request = export_directory.Request(run, tmp_path / "export")
    export_directory.export(request, report=lambda line: None)
    config = RunDirectory(run).need_config()
    ids = random_run.records(dataset)
    mesh = sharding.make_mesh()
    evaluate = evaluation_lib.Evaluator(config, mesh)
    batch = pipeline.ValidationBatch(ids, np.ones(len(ids), bool))
    params = jax.device_put(random_run.random_params(config), sharding.replicated(mesh))
    expected = evaluate(params, [batch], lambda: False)
    source = loading.Source(str(tmp_path / "export"))
    found = measure_model(loading.load_model(source, "", "float32"), [ids[:3], ids[3:]])
    assert found.spectra.keys() == expected.spectra.keys()
    for name, array in expected.spectra.items():
        assert found.spectra[name].shape == array.shape, name
        finite = np.isfinite(array)
        assert (np.isfinite(found.spectra[name]) == finite).all(), name
        error = np.abs(found.spectra[name] - array)[finite].max(initial=0)
        assert error <= 1e-4 * max(np.abs(array[finite]).max(initial=0), 1e-3), name
    assert found.metrics.keys() == expected.metrics.keys() - {"perf/eval_probe_fraction"}
    for name, value in found.metrics.items():
        if not name.startswith("perf/"):
            assert value == pytest.approx(expected.metrics[name], rel=1e-4, abs=1e-5, nan_ok=True)


def test_memory_does_not_grow_with_tokens():
    """What a pass holds after many batches is what it holds after one."""
    from qkjax.observatory import streams

    chance = np.random.default_rng(0)
    stream, lengths = streams.VectorStream(), streams.LengthStream()
    sizes, kept = [], []
    for _ in range(500):
        vectors = 100 + chance.standard_normal((2, 40, 8)).astype(np.float32)
        stream.add(vectors)
        lengths.add(vectors)
        kept.append(vectors)
        held = (*vars(stream).values(), *vars(lengths).values())
        sizes.append(sum(x.nbytes for x in held if isinstance(x, np.ndarray)))
    assert len(set(sizes)) == 1
    rows = np.concatenate(kept, axis=1).astype(np.float64)
    number, mean, scatter = stream.moments()
    assert number == rows.shape[1]
    apart = rows - rows.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(mean, rows.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(scatter, apart.swapaxes(1, 2) @ apart, rtol=1e-9)
    norms = lengths.norms()
    of_rows = np.linalg.norm(rows, axis=-1)
    np.testing.assert_allclose(norms.mean, of_rows.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(norms.largest, of_rows.max(axis=1), rtol=1e-6)


# --------------------------------------------------------------------------------------------
# Directories.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Llama of three revisions with one tokenizer, and a text."""
    place = tmp_path_factory.mktemp("observatory")
    dataset = small_run.make_dataset(place / "dataset")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(dataset / "tokenizer.json"))
    fast.save_pretrained(place / "model")
    texts = [json.loads(line)["text"] for line in (place / "dataset.jsonl").open()]
    (place / "text.txt").write_text("\n".join(texts))
    for step in (0, 30, 200):
        torch.manual_seed(step)
        config = transformers.LlamaConfig(
            vocab_size=small_run.VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
        )
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(place / "model" / f"step{step}")
    return place


def request(place: pathlib.Path, out: pathlib.Path, **fields: Any) -> directory.Request:
    values = {
        "source": loading.Source(str(place / "model")),
        "revisions": ("step200", "step0", "step30"),  # in no order, nor in that of words
        "text": f"text:{place / 'text.txt'}",
        "tokens": 8 * 32,
        "sequence_length": 32,
        "tokens_per_step": 1_000,
    }
    return directory.Request(out=out, **{**values, **fields})


@pytest.fixture(scope="module")
def measured(place: pathlib.Path) -> pathlib.Path:
    out = place / "measured"
    directory.measure_directory(request(place, out), report=lambda line: None)
    return out


def test_three_revisions_are_a_trajectory(measured, place):
    run = run_spectra.load_run(measured)
    assert run.steps == (0, 30, 200) and run.is_model and run.arm == "LlamaForCausalLM"
    assert [e.tokens for e in run.evaluations] == [0, 30_000, 200_000]
    record = RunDirectory(measured).read_model()
    assert [each["revision"] for each in record["revisions"]] == ["step0", "step30", "step200"]
    assert len({each["params_sha256"] for each in record["revisions"]}) == 3
    drawn, _ = figures.figures_of_run(run, "pr")
    (axes, *_) = drawn["pr_key_trajectory"].axes
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [0, 30_000, 200_000]
    prs = [ranks.participation_ratio(e.arrays["key_post_rope_raw"]).mean() for e in run.evaluations]
    np.testing.assert_allclose(line.get_ydata(), prs, rtol=1e-5)
    lines: list[str] = []
    directory.measure_directory(request(place, measured), report=lines.append)
    assert sum("has step" in line for line in lines) == 3  # and nothing is measured twice
    assert sum("loading the model" in line for line in lines) == 3  # said before the wait


def test_another_text_is_refused_in_the_same_directory(measured, place):
    with pytest.raises(errors.UsageError, match="measured with another text"):
        directory.measure_directory(request(place, measured, tokens=64), lambda line: None)


def test_a_model_stands_beside_a_run(measured, place, tmp_path, monkeypatch):
    dataset = place / "dataset"
    run = random_run.make(tmp_path / "run", dataset, "learned")
    arrays = run_spectra.load_run(measured).evaluations[-1].arrays
    wide = {name: np.repeat(x, 2, axis=0) if x.ndim else x for name, x in arrays.items()}
    target = RunDirectory(run)
    target.summary.unlink()  # it holds the digest of other metrics
    target.write_evaluation(20, wide, {"loss_sum": [1.0], "count": [1.0]})
    target.write_metrics([{"step": 20, "tokens": 2560, "pr/key/post_rope/raw": 4.0}])
    runs = run_spectra.load_runs([measured, run])
    shown = quantities.quantity("pr")
    compared = run_spectra.compare(runs, shown)
    assert [len(each.values) for each in compared] == [2, 4]
    rows = list(csv.DictReader(run_spectra.comparison_csv(compared).splitlines()))
    assert {row["difference"] for row in rows} == {""}
    axes = figures.beside(compared, shown).axes[0]
    model, ours = axes.get_lines()
    expected = shown.values(arrays).mean(axis=1) / 8
    np.testing.assert_allclose(model.get_ydata(), expected, rtol=1e-6)
    np.testing.assert_allclose(ours.get_xdata(), [0, 1 / 3, 2 / 3, 1])

    lines: dict[str, list[Any]] = {}

    def chart(name: str, title: str, what: str, figure: Any, make: Any = charts.chart) -> Any:
        (panel,) = figure.axes
        lines[name] = [(line.get_xdata(), line.get_ydata()) for line in panel.get_lines()]
        return make(name, title, what, figure)

    monkeypatch.setattr(charts, "chart", chart)
    gallery.make_gallery([measured, run], tmp_path / "gallery", lambda line: None)
    (depth, shares), (of_run, _) = lines[f"depth_{shown.name}"]
    np.testing.assert_allclose(shares, expected, rtol=1e-6)  # of the last revision
    assert (list(depth), list(of_run)) == ([0, 1], pytest.approx([0, 1 / 3, 2 / 3, 1]))
    ((tokens, along),) = lines[f"training_{shown.name}"]  # the run has one evaluation
    stored = run_spectra.load_run(measured).evaluations
    means = [shown.values(e.arrays).mean() / 8 for e in stored]
    assert list(tokens) == [0, 30_000, 200_000]
    np.testing.assert_allclose(along, means, rtol=1e-6)
    page = (tmp_path / "gallery" / "index.html").read_text()
    assert "Over training" in page and "qkjax gallery" in page
    table = list(csv.DictReader((tmp_path / "gallery" / "gallery.csv").open()))
    assert [(row["name"], row["step"]) for row in table] == [
        *(("measured", step) for step in ("0", "30", "200")),
        ("run", "20"),
    ]
    for row, metrics in zip(table[:3], RunDirectory(measured).read_metrics(), strict=True):
        expected = pytest.approx(metrics["pr/key/post_rope/raw"] / 8, rel=1e-5)
        assert float(row["pr_post_rope_raw"]) == expected
        assert float(row["loss"]) == pytest.approx(metrics["val/loss"], rel=1e-5)
    assert [row["positions"] for row in table] == ["256", "256", "256", "256"]
    assert "Keys of each head" in page
    assert table[2]["pr_pre_norm_raw"] == table[2]["gamma_key_pr"] == ""  # absent, not zero
    assert int(table[2]["parameters"]) == RunDirectory(measured).read_model()["parameters"]
    assert table[3]["kind"] == "run" and float(table[3]["pr_post_rope_raw"]) == 0.5


def test_rank_curves_come_from_the_same_attention(place, tmp_path):
    fields = {"revisions": ("step200",), "rank_curves": True, "rank_tokens": 64}
    out = tmp_path / "out"
    (curve,) = directory.measure_directory(request(place, out, **fields), lambda line: None)
    rows = rank_curves.read_csv(curve.path)
    assert [(row.kind, row.rank) for row in rows] == [
        (kind, rank) for kind in ("top", "random") for rank in (1, 2, 4, 8)
    ]
    full = [row for row in rows if row.rank == 8]
    assert all(abs(row.delta) < 1e-5 for row in full)  # the identity
    assert all(abs(row.delta) > 1e-5 for row in rows if row.rank == 1)
    # By hand: keys projected by hooks on what the attention gets, in another implementation.
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model" / "step200").eval()
    source = loading.Source(str(place / "model"))
    tokenizer = loading.load_tokenizer(source, "step200")
    spec = f"text:{place / 'text.txt'}"
    ids = text.read(spec, tokenizer, tokens=64, length=32, bos=None).ids
    modeling = sys.modules[type(model).__module__]
    rotate, kept = modeling.apply_rotary_pos_emb, []

    def losses() -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(ids[:, :-1]), use_cache=False).logits
        targets = torch.tensor(ids[:, 1:])[..., None]
        return float(-logits.log_softmax(-1).gather(-1, targets).mean())

    def look(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(k)
        return rotate(q, k, *args, **kwargs)

    def project(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        v = torch.linalg.svd(kept[layer[0]].transpose(0, 1).flatten(1, 2))[2][:, :2]
        layer[0] += 1
        return rotate(q, k @ (v.mT @ v), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "apply_rotary_pos_emb", look)
        full_loss, layer = losses(), [0]
        patch.setattr(modeling, "apply_rotary_pos_emb", project)
        projected = losses()
    (ours,) = (row for row in rows if (row.kind, row.rank) == ("top", 2))
    assert ours.delta == pytest.approx(projected - full_loss, abs=1e-5)


def test_the_first_position_can_stay_out(monkeypatch):
    model = make_model("gemma3")
    found = measure_model(model, [BATCHES[:4], BATCHES[4:]], skip_first=True)
    assert found.spectra["num_tokens"] == 6 * (LENGTH - 1)
    assert found.validation["count"].tolist() == [LENGTH] * 6
    oracle = Oracle("gemma3", model)
    losses = oracle.run(BATCHES, monkeypatch)
    assert_near(found.validation["loss_sum"], losses.sum(axis=1), "loss")  # of all positions
    for layer in range(2):
        for stage, vectors in oracle.stages(layer).items():
            mean = vectors[:, :, 1:].mean(axis=(0, 2))
            assert_near(found.spectra[f"{stage}_mean"][layer], mean, stage)
        lengths = np.linalg.norm(oracle.stages(layer)["key_post_rope"][:, :, 1:], axis=-1)
        assert_near(found.spectra["key_norm_mean"][layer], lengths.mean(axis=(0, 2)), "lengths")


def test_text_is_documents_joined_by_a_newline_and_bos_takes_a_place(place):
    source = loading.Source(str(place / "model"))
    tokenizer = loading.load_tokenizer(source, "step0")
    lines = (place / "text.txt").read_text().split("\n")
    path = place / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    plain = text.read(f"text:{place / 'text.txt'}", tokenizer, tokens=96, length=32, bos=None)
    joined = text.read(f"jsonl:{path}", tokenizer, tokens=100, length=32, bos=None)
    np.testing.assert_array_equal(plain.ids, joined.ids)
    assert plain.fingerprint == joined.fingerprint and plain.ids.shape == (3, 33)
    assert (plain.ids[1:, 0] == plain.ids[:-1, -1]).all()  # records overlap by one
    started = text.read(f"jsonl:{path}", tokenizer, tokens=96, length=32, bos=7).ids
    assert (started[:, 0] == 7).all()
    stream = np.concatenate([plain.ids[0], plain.ids[1, 1:]])
    np.testing.assert_array_equal(started[:, 1:].ravel()[:64], stream[:64])
    with pytest.raises(errors.UsageError, match="tokens for this tokenizer, expected"):
        text.read(f"jsonl:{path}", tokenizer, tokens=10**6, length=32, bos=None)


def test_sequences_start_with_bos_where_the_tokenizer_does_so_or_as_asked(place, tmp_path):
    import tokenizers

    plain = loading.load_tokenizer(loading.Source(str(place / "model")), "step0")
    word = plain.convert_ids_to_tokens(5)
    starts = transformers.PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer)
    starts.bos_token = word
    starts.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{word} $A", special_tokens=[(word, 5)]
    )
    starts.save_pretrained(tmp_path / "starts")
    starting = loading.Source(str(place / "model"), str(tmp_path / "starts"))
    plainly = loading.Source(str(place / "model"), str(place / "model"))
    for source, asked, expected in (
        (starting, None, 5),
        (starting, False, None),
        (plainly, None, None),
    ):
        out = tmp_path / f"{expected}-{asked}-{source is starting}"
        fields = {"source": source, "revisions": ("step0",), "tokens": 64, "bos": asked}
        directory.measure_directory(request(place, out, **fields), lambda line: None)
        record = RunDirectory(out).read_model()
        assert (record["text"]["bos"], record["text"]["tokens"]) == (expected, 64)
    fields = {"source": plainly, "revisions": ("step0",), "bos": True}
    message = refusal(lambda: directory.measure_directory(request(place, out, **fields)))
    assert "has no such token" in message


def test_the_text_is_the_held_out_part_unless_one_is_named(place, monkeypatch):
    tokenizer = loading.load_tokenizer(loading.Source(str(place / "model")), "step0")
    documents = [f"Document {i} says that {i} is less than {i + 1}." for i in range(2_000)]
    path = place / "embedded.jsonl"
    path.write_text("".join(json.dumps({"text": text_}) + "\n" for text_ in documents))
    monkeypatch.setattr(text, "EMBEDDED", f"jsonl:{path}")
    pool = [d for d in documents if holdout.in_pool(holdout.hash64(holdout.normalise(d)))]
    assert 5 < len(pool) < 500
    found = text.read("", tokenizer, tokens=64, length=32, bos=None).ids
    expected = tokenizer("\n".join(pool))["input_ids"]
    np.testing.assert_array_equal(found[0], expected[:33])


# --------------------------------------------------------------------------------------------
# Refusals, one line each.


def refusal(work: Any) -> str:
    with pytest.raises(errors.UsageError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_encoders_are_refused(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(**small, intermediate_size=16, max_position_embeddings=64)
    )
    bert.save_pretrained(tmp_path / "bert")
    source = loading.Source(str(tmp_path / "bert"))
    assert "has an encoder" in refusal(lambda: loading.load_model(source, "", "float32"))
    # Loaded all the same, as a causal model with its random head:
    loose = transformers.BertLMHeadModel(bert.config)
    assert "later ones" in refusal(lambda: measure_model(loose, [BATCHES[:, :9] % 50]))
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    both = types.SimpleNamespace(config=config)
    assert "has an encoder" in refusal(lambda: measure_model(both, [BATCHES]))


def test_latent_attention_is_refused():
    config = transformers.DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    assert "latent attention" in refusal(lambda: measure_model(model, [BATCHES]))


# Class of the model and of its config, its own fields, and what is said of it.
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "linear attention": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 16,
        },
        "1 of its 2 layers are linear_attention, which has no keys",
    ),
    "recurrent layers": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {"lru_width": 64},
        "2 of its 2 layers are linear_attention, which has no keys",
    ),
    "convolutions": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"]},
        "1 of its 2 layers are conv, which has no keys",
    ),
    "recurrent layers that no config names": (
        "xLSTMForCausalLM",
        "xLSTMConfig",
        {},
        "0 of 2 layers have gone through transformers' attention interface",
    ),
    "sinks that are parameters": ("GptOssForCausalLM", "GptOssConfig", {}, "takes s_aux"),
    "a mask with numbers": ("DogeForCausalLM", "DogeConfig", {}, "its mask adds numbers"),
    "the difference of two attentions": (
        "DiffLlamaForCausalLM",
        "DiffLlamaConfig",
        {},
        "layer 0 has more than one attention",
    ),
    "a gamma for each head": (
        "CohereForCausalLM",
        "CohereConfig",
        {"use_qk_norm": True},
        "are not those of its projection, norm and rotate-half RoPE",
    ),
    "a norm for each head": (
        "StableLmForCausalLM",
        "StableLmConfig",
        {"qk_layernorm": True},
        "are not those of its projection, norm and rotate-half RoPE",
    ),
    "complex rotations": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"intermediate_size_mlp": 64},
        "are not those of its projection, norm and rotate-half RoPE",
    ),
    "values of another length": (
        "MiMoV2FlashForCausalLM",
        "MiMoV2FlashConfig",
        {},
        "Models whose heads differ",
    ),
    "an attention that cannot be exchanged": (
        "BloomForCausalLM",
        "BloomConfig",
        {},
        "has an attention of its own",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_measured_is_refused(kind):
    name, config_name, own, words = REFUSED[kind]
    fields = {
        **small_fields(),
        **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), 2),
        "moe_intermediate_size": 16,
    }
    config = getattr(transformers, config_name)(**{**fields, **own})
    model = getattr(transformers, name)(config)
    before = model.config._attn_implementation
    assert words in refusal(lambda: measure_model(model, [BATCHES]))
    assert model.config._attn_implementation == before


def test_an_attention_with_something_of_its_own_is_refused(monkeypatch):
    """As of a class that scales its logits where the attention interface does not show it."""
    model = make_model("llama")
    modeling = sys.modules[type(model).__module__]
    eager = modeling.eager_attention_forward

    def warmer(*args: Any, scaling: float, **kwargs: Any) -> Any:
        return eager(*args, scaling=1.01 * scaling, **kwargs)

    monkeypatch.setattr(modeling, "eager_attention_forward", warmer)
    assert "logits with plain attention are" in refusal(lambda: measure_model(model, [BATCHES]))


def test_an_unknown_way_from_projection_to_key_is_refused(monkeypatch):
    """As of a class that turns neighbouring pairs, or normalises after RoPE."""
    model = make_model("llama")
    modeling = sys.modules[type(model).__module__]
    rotate = modeling.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin: rotate(q, k, cos, -sin)
    )
    assert "are not those of its projection" in refusal(lambda: measure_model(model, [BATCHES]))
    assert model.config._attn_implementation != "qkjax"


def test_what_is_missing_is_named(place, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    make_model("llama").save_pretrained(bare)
    source = loading.Source(str(bare))
    assert "no tokenizer" in refusal(lambda: loading.load_tokenizer(source, ""))
    nowhere = loading.Source(str(tmp_path / "nowhere"))
    assert "is no directory" in refusal(lambda: loading.load_model(nowhere, "", "float32"))
    gguf = loading.Source(str(tmp_path / "model.gguf"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install -e '.[gguf]'" in refusal(lambda: loading.require_packages(gguf))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install -e '.[export]'" in refusal(lambda: loading.load_model(source, "", "own"))
    fields = {"revisions": ("step0", "main")}
    message = refusal(lambda: directory.measure_directory(request(place, tmp_path / "o", **fields)))
    assert "names no step" in message
    fields = {"tokens_per_step": None}
    message = refusal(lambda: directory.measure_directory(request(place, tmp_path / "o", **fields)))
    assert "names no tokens" in message


def test_revisions_are_folders_of_a_directory_and_a_file_has_none(place, tmp_path):
    source = loading.Source(str(place / "model"))
    message = refusal(lambda: loading.load_model(source, "step7", "float32"))
    assert message.startswith(f"{place / 'model' / 'step7'}: no config.json in it")
    assert "--revision names folders inside it" in message
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    gguf = loading.Source(str(file))
    message = refusal(lambda: gguf.arguments("step7"))
    assert message == "--revision: step7, and model.gguf is one model. Leave it out."


def test_a_gguf_that_transformers_does_not_load_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the extra [gguf] reads and writes such files")
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "nobodys-architecture")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    source = loading.Source(str(file))
    words = "does not load as a causal language model"
    assert words in refusal(lambda: loading.load_model(source, "", "float32"))
    file.write_bytes(b"no such file")
    assert words in refusal(lambda: loading.load_model(source, "", "float32"))


def test_the_notebook_runs(tmp_path, capsys):
    """Its cells in order, in one namespace: no kernel is needed."""
    notebook = json.loads((ROOT / "examples" / "measure_a_model.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # nothing of one machine is committed
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    names = runpy.run_path(str(script))
    printed = capsys.readouterr().out
    assert "raw=11.658" in printed and "(3, 2, 16) layers" in printed
    expected = names["found"].metrics["pr/key/post_rope/raw"]
    assert f"post_rope  {expected:5.2f} raw" in printed


def test_steps_and_tokens_are_read_from_names():
    assert loading.step_of("stage1-step1000-tokens5B") == 1000
    assert loading.tokens_of("stage1-step1000-tokens5B") == 5 * 10**9
    assert (loading.step_of("main"), loading.tokens_of("step143000")) == (None, None)


@pytest.mark.process
@pytest.mark.long
def test_the_commands_measure_and_draw(place, tmp_path):
    out = tmp_path / "out"
    measure = [
        "tools/measure_model.py",
        f"--model={place / 'model'}",
        "--revision=step0,step200",
        f"--text=text:{place / 'text.txt'}",
        "--tokens=64",
        "--sequence_length=32",
        "--tokens_per_step=1000",
        f"--out={out}",
    ]
    for command in (
        measure,
        ["tools/make_gallery.py", str(out), f"--out={tmp_path / 'gallery'}"],
        ["tools/plot_spectra.py", f"--workdir={out}", "--format=svg"],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "gallery" / "index.html").is_file()
    assert (out / "figures" / "pr_key_trajectory.svg").is_file()
