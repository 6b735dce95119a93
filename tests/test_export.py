"""Exports: the four stock classes, there and back; verification that sees every mutation."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import random_run
import small_run

from qkjax import config as config_lib
from qkjax import errors, flops, model, train
from qkjax.data import prepare
from qkjax.export import card, directory, hf, verify
from qkjax.runs import checkpoint
from qkjax.runs.directory import RunDirectory
from qkjax.trained import trained_run

safetensors = pytest.importorskip(
    "safetensors", reason="exports are written with safetensors, which is not installed"
)
ROOT = pathlib.Path(__file__).resolve().parents[1]
KINDS = {
    "llama": ("none", "swiglu"),
    "qwen3": ("learned", "swiglu"),
    "arcee": ("none", "relu2"),
    "apertus": ("learned", "relu2"),
}
# What no class has by default, so that nothing is right by chance.
FIELDS = {
    "arcee": {"model__norm_eps": 1.19e-7, "model__rope_base": 5000.0},
    "apertus": {"model__norm_eps": 3e-6, "model__rope_base": 20000.0},
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "arcee": "ArceeForCausalLM",
    "apertus": "ApertusForCausalLM",
}
TINY, TEXT = "logits at tiny activations", "logits on validation text"
JAX_LOSS = "loss against JAX, float32"
RUN_LOSS = f"loss against validation/step_{random_run.STEP:08d}.npz"


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers", reason="verification needs transformers")
    return pytest.importorskip("torch", reason="verification needs torch")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A dataset, and runs/KIND and exports/KIND of every class."""
    place = tmp_path_factory.mktemp("export")
    dataset = small_run.make_dataset(place / "dataset")
    for kind, (qk_norm, mlp) in KINDS.items():
        random_run.make(place / "runs" / kind, dataset, qk_norm, mlp, **FIELDS.get(kind, {}))
        export(place, kind)
    return place


def export(place: pathlib.Path, kind: str, name: str = "", **options) -> pathlib.Path:
    out = place / "exports" / (name or kind)
    request = directory.Request(place / "runs" / kind, out, **options)
    directory.export(request, report=lambda line: None)
    return out


def opened(place: pathlib.Path, kind: str, **options) -> trained_run.TrainedRun:
    return trained_run.open_run(place / "runs" / kind, **options)


def failures(exported: pathlib.Path, run: trained_run.TrainedRun) -> set[str]:
    """Names of the checks that fail."""
    verdict = verify.verify(exported, run, report=lambda line: None)
    assert bool(verdict.failed) == ("**FAILED**" in verdict.table()[0])
    return {check.name for check in verdict.checks if check.passed is False}


def leaves(tree: model.Params) -> dict[str, np.ndarray]:
    import jax

    return dict(zip(checkpoint.leaf_names(tree), jax.tree.leaves(tree), strict=True))


# --------------------------------------------------------------------------------------------
# What is written.


@pytest.mark.parametrize("kind", KINDS)
def test_directory_holds_every_file_and_the_runs_architecture(place, kind):
    exported = place / "exports" / kind
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qkjax.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    c = opened(place, kind).config.model
    found = json.loads((exported / "config.json").read_text())
    assert found["architectures"] == [CLASSES[kind]]
    special = FIELDS.get(kind, {})
    theta = special.get("model__rope_base", 10000.0)
    expected = {
        "hidden_size": c.d_model,
        "head_dim": c.head_dim,
        "num_key_value_heads": c.num_kv_heads,
        "max_position_embeddings": small_run.LENGTH,
        "rope_scaling": None,
        "rope_theta": theta,
        "rms_norm_eps": special.get("model__norm_eps", 1e-6),
        "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu" if c.mlp == "swiglu" else "relu2",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "vocab_size": 300,
    }
    assert expected.items() <= found.items()
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tokenizer = json.loads((exported / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    ours = (place / "dataset" / "tokenizer.json").read_bytes()
    assert (exported / "tokenizer.json").read_bytes() == ours
    modes = {path.stat().st_mode for path in exported.iterdir()}
    assert len(modes) == 1


def test_tensors_are_renamed_transposed_and_scaled(place):
    run = opened(place, "qwen3")
    tensors = hf.load_tensors(place / "exports" / "qwen3" / "model.safetensors")
    root = np.float32(np.sqrt(32))
    blocks = run.params["blocks"]
    for name, expected in {
        "model.embed_tokens.weight": run.params["embedding"] * root,
        "model.norm.weight": run.params["final_norm"]["gamma"] / root,
        "model.layers.1.self_attn.k_proj.weight": blocks["attention"]["key"]["kernel"][1].T,
        "model.layers.0.self_attn.q_norm.weight": blocks["attention"]["query_norm"]["gamma"][0],
        "model.layers.1.mlp.gate_proj.weight": blocks["mlp"]["gate"]["kernel"][1].T,
        "model.layers.0.post_attention_layernorm.weight": blocks["mlp_norm"]["gamma"][0],
    }.items():
        np.testing.assert_array_equal(tensors[name], expected, name)
    assert sum(x.size for x in tensors.values()) == flops.num_parameters(run.config.model)
    with safetensors.safe_open(place / "exports/qwen3/model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}  # without it, transformers 4 refuses the file


@pytest.mark.parametrize("kind", KINDS)
def test_inverse_gives_the_parameters_back(place, kind):
    run = opened(place, kind)
    back_config, params = hf.read_directory(place / "exports" / kind)
    expected = {**run.config.model.__dict__, "dtype": "float32", "unroll": 1}
    assert back_config.__dict__ == expected
    back, original = leaves(params), leaves(run.params)
    assert back.keys() == original.keys()
    for name, value in original.items():
        apart = np.abs(back[name].view(np.int32) - value.view(np.int32)).max()  # in ulp
        folded = name in ("embedding", "final_norm/gamma")
        assert apart <= folded, name
        assert back[name].dtype == np.float32


def test_frozen_gammas_are_the_same_class(place):
    config_ = opened(place, "qwen3").config.model
    frozen = config_lib.ModelConfig(**{**config_.__dict__, "qk_norm": "frozen"})
    assert hf.config_json(frozen, eos_id=0) == hf.config_json(config_, eos_id=0)


def test_a_model_that_no_class_holds_is_refused(place):
    values = {**opened(place, "llama").config.model.__dict__, "num_heads": 5}
    with pytest.raises(errors.UsageError, match=r"not a multiple of model\.num_heads 5"):
        hf.config_json(config_lib.ModelConfig(**values), eos_id=0)


def test_card_says_what_the_run_was(place):
    text = (place / "exports" / "apertus" / "README.md").read_text()
    run = opened(place, "apertus")
    assert text.startswith("---\nlibrary_name: transformers\n")
    for fact in (
        "muon_qk",
        "4.25000",
        "20 of 20",
        run.dataset.manifest.fingerprint,
        run.params_sha256,
        "Not verified",
        "In training every document came after it",
    ):
        assert fact in text, fact
    assert str(place) not in text
    assert max(map(len, text.splitlines())) < 140


def test_card_has_the_metadata_of_the_hub(place):
    """Read by the hub's own library; the names of results are the user's, and quoted."""
    hub = pytest.importorskip("huggingface_hub")
    found = hub.ModelCard((place / "exports" / "apertus" / "README.md").read_text()).data
    run = opened(place, "apertus")
    assert (found.library_name, found.pipeline_tag) == ("transformers", "text-generation")
    assert found.license == "apache-2.0"
    assert {"qkjax", "muon", "qk-norm"} <= set(found.tags)
    losses = [result for result in found.eval_results if result.metric_type == "loss"]
    assert [result.metric_value for result in losses] == [4.25]
    assert losses[0].dataset_type == run.dataset.manifest.fingerprint
    assert losses[0].dataset_split == "validation" and losses[0].task_type == "text-generation"


def test_a_name_cannot_break_the_metadata(place):
    hub = pytest.importorskip("huggingface_hub")
    run = opened(place, "apertus")
    odd = dataclasses.replace(run.dataset.manifest, name='a: "b"\n---\n# c')
    run = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, manifest=odd))
    (loss,) = (
        result
        for result in hub.ModelCard(card.render(run, "float32")).data.eval_results
        if result.metric_type == "loss"
    )
    assert loss.dataset_name.startswith(odd.name)


def test_names_cannot_break_the_card():
    assert card._cell("a|b\n<script>") == r"a\|b \<script\>"
    assert card._cell(None) == "unknown"


# --------------------------------------------------------------------------------------------
# Bad input, disks and kills.


def copied(place: pathlib.Path, kind: str, to: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(place / "runs" / kind, to)


def test_what_is_no_finished_run_is_refused(place, tmp_path):
    for path in (tmp_path, tmp_path / "absent", place / "dataset.jsonl"):
        with pytest.raises(
            errors.UsageError, match=r"not a run directory, expected a config\.json"
        ):
            trained_run.open_run(path)
    workdir = copied(place, "llama", tmp_path / "run")
    (workdir / "summary.json").unlink()
    with pytest.raises(errors.UsageError, match=r"not finished.*Run its qkjax\.main command"):
        trained_run.open_run(workdir)
    assert trained_run.open_run(workdir, finished=False).summary is None
    with pytest.raises(errors.UsageError, match=r"no checkpoint of step 7. Give one of \[20\]"):
        trained_run.open_run(workdir, step=7, finished=False)
    (workdir / "environment.json").write_text("{}")
    with pytest.raises(errors.UsageError, match="names no dataset_fingerprint"):
        trained_run.open_run(workdir, finished=False)
    shutil.rmtree(workdir / "checkpoints")
    shutil.copy(place / "runs" / "llama" / "environment.json", workdir)
    with pytest.raises(errors.UsageError, match="no checkpoint there"):
        trained_run.open_run(workdir, finished=False)


def test_another_dataset_or_vocabulary_is_refused(place, tmp_path):
    other = small_run.make_dataset(tmp_path / "other", seed=1)
    with pytest.raises(errors.UsageError, match=r"another dataset than the run's.*--data_dir=DIR"):
        opened(place, "llama", data_dir=str(other))
    with pytest.raises(errors.UsageError, match=r"no dataset\.json there.*--data_dir=DIR"):
        opened(place, "llama", data_dir=str(tmp_path / "gone"))
    workdir = copied(place, "llama", tmp_path / "run")
    values = json.loads((workdir / "config.json").read_text())
    values["model"]["vocab_size"] = 301
    (workdir / "config.json").write_text(json.dumps(values))
    with pytest.raises(errors.UsageError, match=r"tokenizer has 300 tokens, and the model .* 301"):
        trained_run.open_run(workdir)
    moved = shutil.copytree(place / "dataset", tmp_path / "moved")
    assert opened(place, "llama", data_dir=str(moved)).dataset.directory == moved
    (moved / "tokenizer.json").unlink()
    with pytest.raises(errors.UsageError, match=r"tokenizer\.json: missing"):
        opened(place, "llama", data_dir=str(moved))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_refused(place, tmp_path, value):
    params = opened(place, "llama").params
    params["blocks"]["mlp"]["up"]["kernel"][1, 2, 3] = value
    random_run.make(tmp_path / "run", place / "dataset", params=params)
    request = directory.Request(tmp_path / "run", tmp_path / "out")
    with pytest.raises(errors.UsageError, match="params/blocks/mlp/up/kernel has values that are"):
        directory.export(request)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_never_overwritten(place, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "empty", "link"):
        request = directory.Request(place / "runs" / "llama", tmp_path / name)
        with pytest.raises(errors.UsageError, match="already exists"):
            directory.export(request)


def test_a_failed_disk_leaves_nothing(place, tmp_path, monkeypatch):
    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "save_tensors", fail)
    request = directory.Request(place / "runs" / "llama", tmp_path / "deep" / "out")
    with pytest.raises(errors.StorageError, match="No space left"):
        directory.export(request)
    assert not list((tmp_path / "deep").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageError):
        directory.export(directory.Request(place / "runs" / "llama", tmp_path / "file" / "out"))


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.process
def test_a_kill_leaves_nothing_under_the_name(place, tmp_path):
    request = f"directory.Request(pathlib.Path({str(place / 'runs' / 'llama')!r}), out)"
    done = python(f"""
import os, pathlib
from qkjax.export import directory, hf
save = hf.save_tensors
def save_and_die(tensors, path):
    save(tensors, path)
    os.kill(os.getpid(), 9)
hf.save_tensors = save_and_die
out = pathlib.Path({str(tmp_path / "out")!r})
directory.export({request})
""")
    assert done.returncode == -9, done.stderr
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.out\.tmp-\d+", left.name)
    directory.export(directory.Request(place / "runs" / "llama", tmp_path / "out"))


@pytest.mark.process
def test_no_torch_is_needed(place, tmp_path):
    """Neither imported nor missed; --verify without it is refused before anything is written."""
    done = python(f"""
import pathlib, sys
sys.modules["torch"] = sys.modules["transformers"] = None
from qkjax import errors
from qkjax.export import directory
run = pathlib.Path({str(place / "runs" / "apertus")!r})
out = pathlib.Path({str(tmp_path / "out")!r})
try:
    directory.export(directory.Request(run, out, verify_sequences=1))
except errors.UsageError as error:
    print(error)
assert not out.exists()
directory.export(directory.Request(run, out, dtype="bfloat16"))
""")
    assert done.returncode == 0, done.stderr
    assert "torch is not installed. Run pip install -e '.[export]'" in done.stdout
    assert "ApertusForCausalLM, bfloat16, step 20" in done.stdout


def test_no_safetensors_is_said(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(errors.UsageError, match="pip install safetensors"):
        directory.export(directory.Request(place / "runs" / "llama", tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing tensors \['model.norm.weight'\]"),
        (lambda t: t.update({"lm_head.weight": t["model.norm.weight"]}), "unexpected .*lm_head"),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:4]}),
            r"model.norm.weight has the shape \[4\], config.json says \[32\]",
        ),
    ],
)
def test_inverse_is_strict_about_tensors(place, change, text):
    run = opened(place, "llama")
    tensors = hf.to_tensors(run.params, run.config.model)
    change(tensors)
    with pytest.raises(errors.UsageError, match=text):
        hf.from_tensors(tensors, run.config.model)


def test_inverse_refuses_foreign_directories(place, tmp_path):
    exported = shutil.copytree(place / "exports" / "llama", tmp_path / "out")
    (exported / "model.safetensors").write_bytes(b"short")
    with pytest.raises(errors.UsageError, match="not a readable safetensors file"):
        hf.read_directory(exported)
    for change, text in (
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures is .*expected one of"),
        ({"attention_bias": True}, "attention_bias is True, expected False"),
        ({"head_dim": None}, "not a readable|lacks|not a model|config.json"),
    ):
        rewrite(place / "exports" / "llama", exported, "config.json", **change)
        with pytest.raises(errors.UsageError, match=text):
            hf.read_directory(exported)
    (exported / "config.json").unlink()
    with pytest.raises(errors.UsageError, match=r"config\.json: missing"):
        hf.read_directory(exported)


def rewrite(source: pathlib.Path, exported: pathlib.Path, name: str, **fields) -> None:
    values = json.loads((source / name).read_text())
    (exported / name).write_text(json.dumps({**values, **fields}))


# --------------------------------------------------------------------------------------------
# Verification.


@pytest.mark.parametrize("kind", KINDS)
def test_verified_directory_computes_the_same(torch, place, kind):
    run = opened(place, kind)
    lines: list[str] = []
    verdict = verify.verify(place / "exports" / kind, run, 3, report=lines.append)
    assert not verdict.failed
    assert [check.name for check in verdict.checks] == [
        "config.json",
        "tensors",
        "tokenizer",
        "loads",
        TINY,
        TEXT,
        "argmax, where two errors apart",
        JAX_LOSS,
        RUN_LOSS,
    ]
    assert all(line.startswith("ok     ") for line in lines)
    text = "\n".join(verdict.table())
    assert f"as {CLASSES[kind]}" in text and "over 96 positions" in text and "3 sequences" in text
    (measured,) = [check for check in verdict.checks if check.name == TEXT]
    assert float(measured.found.split()[0]) < 2e-5  # the limit is no excuse


def test_a_run_with_cudnn_is_verified_without_it(torch, place, tmp_path):
    """In float32, which cuDNN does not take, and on machines that do not have it."""
    workdir = shutil.copytree(place / "runs" / "qwen3", tmp_path / "run")
    random_run.save_again(workdir, model__attention="cudnn")
    assert not failures(place / "exports" / "qwen3", trained_run.open_run(workdir))


@pytest.mark.parametrize("kind", KINDS)
def test_stock_loading_needs_no_custom_code(torch, place, kind):
    import transformers

    exported = str(place / "exports" / kind)
    pipe = transformers.pipeline("text-generation", model=exported)
    assert type(pipe.model).__name__ == CLASSES[kind]
    assert type(pipe.tokenizer).__name__ in ("PreTrainedTokenizerFast", "TokenizersBackend")
    (out,) = pipe("The tone", max_new_tokens=4, do_sample=False)
    assert out["generated_text"].startswith("The tone")
    assert pipe.model.num_parameters() == flops.num_parameters(
        hf.model_config(json.loads((place / "exports" / kind / "config.json").read_text()))
    )


Mutate = Callable[[dict], None]


def set_config(**fields) -> Callable[[pathlib.Path], None]:
    def change(exported: pathlib.Path) -> None:
        rewrite(exported, exported, "config.json", **fields)

    return change


def set_tensors(change: Mutate, **fields) -> Callable[[pathlib.Path], None]:
    def both(exported: pathlib.Path) -> None:
        tensors = {
            name: np.array(x) for name, x in hf.load_tensors(exported / "model.safetensors").items()
        }
        change(tensors)
        hf.save_tensors(tensors, exported / "model.safetensors")
        rewrite(exported, exported, "config.json", **fields)

    return both


def interleave(tensors: dict) -> None:
    """The rows of each head of W_q and W_k in the order of the other RoPE layout."""
    for name, x in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            heads = x.reshape(-1, 2, 4, x.shape[-1]).swapaxes(1, 2)
            tensors[name] = np.ascontiguousarray(heads).reshape(x.shape)


def scale(name: str, factor: float) -> Mutate:
    def change(tensors: dict) -> None:
        tensors[name] = tensors[name] * np.float32(factor)

    return change


def untie(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] / np.float32(np.sqrt(32))


def nudge(tensors: dict) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1e-2


def text_file(name: str, old: str, new: str) -> Callable[[pathlib.Path], None]:
    def change(exported: pathlib.Path) -> None:
        text = (exported / name).read_text()
        assert old in text
        (exported / name).write_text(text.replace(old, new, 1))

    return change


OTHER_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
MUTATIONS = {
    "eps": ("llama", set_config(rms_norm_eps=1e-5), {"config.json", TINY}),
    "eps of QK-Norm's class": ("qwen3", set_config(rms_norm_eps=1.19e-7), {"config.json", TINY}),
    "head_dim alone": ("qwen3", set_config(head_dim=16), {"config.json", "loads"}),
    "head_dim that fits": (
        "llama",
        set_config(head_dim=16, num_attention_heads=2, num_key_value_heads=1),
        {"config.json", TINY, TEXT, JAX_LOSS, RUN_LOSS},
    ),
    "RoPE base": ("apertus", set_config(**OTHER_ROPE), {"config.json", TEXT, JAX_LOSS, RUN_LOSS}),
    "RoPE layout": ("arcee", set_tensors(interleave), {"tensors", TEXT, JAX_LOSS, RUN_LOSS}),
    "untied": ("llama", set_config(tie_word_embeddings=False), {"config.json", "loads", TEXT}),
    "untied, own head": (
        "qwen3",
        set_tensors(untie, tie_word_embeddings=False),
        {"config.json", "tensors", TEXT, JAX_LOSS},
    ),
    "unscaled embedding": (
        "apertus",
        set_tensors(scale("model.embed_tokens.weight", 32**-0.5)),
        {"tensors", TEXT, JAX_LOSS},
    ),
    "unscaled final norm": (
        "arcee",
        set_tensors(scale("model.norm.weight", 32**0.5)),
        {"tensors", TINY, TEXT, JAX_LOSS},
    ),
    "one weight by 1e-2": ("llama", set_tensors(nudge), {"tensors", TEXT}),
    "activation": ("arcee", set_config(hidden_act="silu"), {"config.json", TEXT, JAX_LOSS}),
    "another class": (
        "qwen3",
        set_config(architectures=["LlamaForCausalLM"], model_type="llama"),
        {"config.json", "loads", TEXT},
    ),
    "eos": ("llama", set_config(eos_token_id=1), {"config.json"}),
    "tokenizer": ("llama", text_file("tokenizer.json", "true", "false"), {"tokenizer"}),
    "tokenizer's eos": (
        "llama",
        text_file("tokenizer_config.json", '"eos_token": "<|endoftext|>"', '"eos_token": "a"'),
        {"tokenizer"},
    ),
    "truncated weights": (
        "llama",
        lambda exported: (exported / "model.safetensors").write_bytes(b"short"),
        {"tensors", "loads"},
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_fails(torch, place, tmp_path, name):
    kind, mutate, expected = MUTATIONS[name]
    exported = shutil.copytree(place / "exports" / kind, tmp_path / "out")
    mutate(exported)
    failed = failures(exported, opened(place, kind))
    assert expected <= failed, failed


def test_a_small_eps_hides_in_text_and_shows_at_tiny_activations(torch, place, tmp_path):
    """Why there is a pass at tiny scale: 1e-6 against 2e-6 is below the limit elsewhere."""
    exported = shutil.copytree(place / "exports" / "llama", tmp_path / "out")
    rewrite(exported, exported, "config.json", rms_norm_eps=2e-6)
    failed = failures(exported, opened(place, "llama"))
    assert TINY in failed and TEXT not in failed


def test_losses_of_the_run_are_compared(torch, place, tmp_path):
    """1e-4 nat per token for a float32 run, 5e-3 for a bfloat16 one; nothing where no file is."""
    for dtype, small, large in (("float32", 5e-5, 2e-4), ("bfloat16", 3e-3, 7e-3)):
        path = tmp_path / dtype
        workdir = random_run.make(path, place / "dataset", model__dtype=dtype)
        run = trained_run.open_run(workdir)
        true = random_run.reference_losses(run.params, run.config)
        exported = place / "exports" / "llama"
        for error, expected in ((small, set()), (large, {RUN_LOSS})):
            wrong = true.copy()
            wrong[4] += error * small_run.LENGTH
            random_run.write_losses(workdir, wrong)
            assert failures(exported, run) == expected
        random_run.write_losses(workdir, true[:2])
        assert not failures(exported, run)
        (workdir / "validation" / f"step_{random_run.STEP:08d}.npz").unlink()
        verdict = verify.verify(exported, run, 1, report=lambda line: None)
        assert not verdict.failed and verdict.checks[-1].passed is None
        assert "not compared" in verdict.table()[-1]


def test_bfloat16_is_measured_without_a_limit_on_logits(torch, place):
    exported = export(place, "qwen3", "bfloat16", dtype="bfloat16", verify_sequences=2)
    tensors = hf.load_tensors(exported / "model.safetensors")
    assert {x.dtype.name for x in tensors.values()} == {"bfloat16"}
    text = (exported / "README.md").read_text()
    assert "| tensors | bfloat16 |" in text and "Verified:" in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {TEXT}"))
    error = float(row.split("|")[2].split()[0])
    assert 1e-4 < error < 1 and row.split("|")[3].strip() == ""
    _, params = hf.read_directory(exported)
    assert leaves(params)["embedding"].dtype == np.float32


@pytest.mark.parametrize("prefix_space", [False, True])
def test_tokenizers_of_other_makes_are_read_alike(torch, tmp_path, prefix_space):
    """With a space before a text (transformers 4 takes that setting from its own file, without
    regard to tokenizer.json); or with a token behind it, which training leaves out, and a hole in
    the ids."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = tokenizers.decoders.ByteLevel()
    texts = [f"a line of words, number {i}" for i in range(400)]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(texts, trainer)
    if not prefix_space:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
        )
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 0 if prefix_space else 9
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with (tmp_path / "lines.jsonl").open("w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    request = prepare.Request(
        sources=(f"jsonl:{tmp_path / 'lines.jsonl'}",),
        tokenizer=str(tmp_path / "tokenizer.json"),
        sequence_length=small_run.LENGTH,
        train_tokens=20 * small_run.LENGTH,
        validation_tokens=7 * small_run.LENGTH,
    )
    prepare.prepare(request, tmp_path / "dataset", progress=lambda line: None)
    random_run.make(
        tmp_path / "run",
        tmp_path / "dataset",
        model__vocab_size=max(vocabulary.values()) + 1,
        data__max_epochs=1000,
    )
    directory.export(
        directory.Request(tmp_path / "run", tmp_path / "out", verify_sequences=7),
        report=lambda line: None,
    )
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["add_prefix_space"] is prefix_space
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    from qkjax.tasks import stock_model

    assert stock_model.StockModel(tmp_path / "out").adds_bos


def test_a_tokenizer_that_reads_text_otherwise_fails(torch, place, monkeypatch):
    run = opened(place, "llama")
    original = run.tokenizer.encode_batch
    monkeypatch.setattr(
        run.tokenizer, "encode_batch", lambda texts: [ids[:-1] for ids in original(texts)]
    )
    assert failures(place / "exports" / "llama", run) == {"tokenizer"}


def test_tiny_scale_is_where_epsilon_matters(place):
    run = opened(place, "llama")
    tokens = random_run.records(place / "dataset")[0, :-1]
    factor = verify._tiny_scale(run, tokens)
    assert np.log2(factor) % 1 == 0
    inputs = run.params["embedding"][tokens] * np.sqrt(32) * factor
    assert 0.25 < np.square(inputs).mean() / run.config.model.norm_eps < 4


def test_failed_verification_is_in_the_card_and_an_error(torch, place, tmp_path, monkeypatch):
    write = directory.write

    def write_wrongly(run, out, dtype):
        write(run, out, dtype)
        rewrite(out, out, "config.json", rms_norm_eps=1e-5)

    monkeypatch.setattr(directory, "write", write_wrongly)
    request = directory.Request(place / "runs" / "llama", tmp_path / "out", verify_sequences=1)
    with pytest.raises(errors.UsageError, match=f"verification failed: config.json.*{TINY}"):
        directory.export(request, report=lambda line: None)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "**FAILED**" in text and "rms_norm_eps is 1e-05, expected 1e-06" in text


# --------------------------------------------------------------------------------------------
# The command, on a run that was really trained.


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/export_hf.py", *flags], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.process
@pytest.mark.long
def test_command_exports_and_verifies_a_trained_run(torch, place, tmp_path):
    """One whose queries were clipped: nothing but its kernels differs."""
    run_config = small_run.make_config(
        place / "dataset", "muon", "none", "tiny,clip", optimizer__qk_clip=0.1
    )
    train.train_and_evaluate(run_config, tmp_path / "run")
    assert small_run.rows(tmp_path / "run")[-1]["train/clipped_heads"] > 0
    flags = (f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}")
    done = command(*flags, "--verify", "--verify_sequences=2")
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM, float32, step 20" in done.stdout
    assert done.stdout.endswith("verified\n")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Verified: this directory" in text and "muon_noqk_clip" in text
    summary = RunDirectory(tmp_path / "run").read_summary()
    assert f"{summary['val/loss']:.5f}" in text and summary["params_sha256"] in text
    again = command(*flags)
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert again.stderr.startswith(f"ERROR: --out: {tmp_path / 'out'} already exists")
    earlier = command(flags[0], f"--out={tmp_path / 'first'}", "--step=0")
    assert earlier.returncode == 0 and "step 0" in earlier.stdout


@pytest.mark.process
def test_flags_are_refused_in_one_line(place, tmp_path):
    workdir = f"--workdir={place / 'runs' / 'llama'}"
    for flags, text in (
        ((), "--workdir: missing"),
        ((workdir,), "--out: missing"),
        ((f"--workdir={tmp_path}", f"--out={tmp_path / 'x'}"), f"{tmp_path}: not a run directory"),
        ((workdir, f"--out={tmp_path / 'x'}", "--dtype=float16"), ""),
        ((workdir, f"--out={tmp_path / 'x'}", "--verify_sequences=0"), ""),
    ):
        done = command(*flags)
        assert done.returncode == 2, (flags, done.stderr)
        assert done.stderr.startswith(f"ERROR: {text}") and done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------
# Public models of the same classes.


def public(place: pathlib.Path, name: str, shards: str = "5GB", **fields) -> pathlib.Path:
    """A random tied model as transformers saves it, another head_dim than the width's share."""
    import torch
    import transformers

    values = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
        **({"head_dim": 16} if name == "Qwen3" else {}),
        **fields,
    }
    torch.manual_seed(0)
    model_ = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**values)
    )
    for parameter in model_.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model_.save_pretrained(place, max_shard_size=shards)
    return place


def forget(directory_: pathlib.Path, *names: str, **fields) -> None:
    """Takes fields out of config.json, as older and shorter ones lack them, and sets others."""
    path = directory_ / "config.json"
    values = json.loads(path.read_text())
    kept = {name: value for name, value in values.items() if name not in names}
    path.write_text(json.dumps({**kept, **fields}))


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_a_public_model_computes_the_same_in_our_code(torch, name, tmp_path):
    import jax
    import transformers

    place_ = public(tmp_path / "model", name, shards="20KB")
    assert (place_ / hf.INDEX_FILE).is_file()  # in several files
    tokens = np.random.default_rng(0).integers(0, 97, (2, 24))
    stock = transformers.AutoModelForCausalLM.from_pretrained(place_).eval()
    with torch.inference_mode():
        expected = stock(input_ids=torch.tensor(tokens)).logits.numpy()
    # As the models of transformers 4 say it, with nothing that they need not say.
    gone = ["rope_parameters", "transformers_version", "head_dim", "attention_bias", "hidden_act"]
    gone = [field for field in gone if (name, field) != ("Qwen3", "head_dim")]
    forget(place_, *gone, "mlp_bias", "dtype", rope_theta=50_000.0, transformers_version="4.40.0")
    config, params = hf.read_directory(place_)
    assert (config.head_dim, config.rope_base) == (16 if name == "Qwen3" else 12, 50_000.0)
    with jax.default_matmul_precision("highest"):
        found = np.asarray(model.logits(params, tokens, config))
    assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def test_what_our_model_does_not_have_is_refused(torch, tmp_path):
    place_ = public(tmp_path / "model", "Llama")
    whole = (place_ / "config.json").read_text()
    for fields, text in (
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, expected True"),
        ({"mlp_bias": True}, "mlp_bias is True, expected False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "type 'llama3', expected"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "turns 0.5 of a head"),
        ({"hidden_size": "48"}, "is not a whole number"),
    ):
        forget(place_, **fields)
        with pytest.raises(errors.UsageError, match=text):
            hf.read_directory(place_)
        (place_ / "config.json").write_text(whole)
    forget(place_, "tie_word_embeddings")  # the class's default is an untied head
    with pytest.raises(errors.UsageError, match="tie_word_embeddings is False"):
        hf.read_directory(place_)
    untied = public(tmp_path / "untied", "Llama", tie_word_embeddings=False)
    forget(untied, tie_word_embeddings=True)
    with pytest.raises(errors.UsageError, match="expected a tied head"):
        hf.read_directory(untied)


def test_another_model_than_the_config_is_refused_with_the_flags(place):
    config_ = opened(place, "qwen3").config.model
    origin = hf.read_origin(place / "exports" / "qwen3", config_)
    assert (origin.name, len(origin.params_sha256)) == ("qwen3", 64)
    wide = config_lib.ModelConfig(**{**config_.__dict__, "d_model": 64, "qk_norm": "none"})
    with pytest.raises(errors.UsageError) as caught:
        hf.read_origin(place / "exports" / "qwen3", wide)
    assert "--config.model.d_model=32 --config.model.qk_norm=learned" in str(caught.value)
    long = config_lib.ModelConfig(**{**config_.__dict__, "sequence_length": 4096})
    with pytest.raises(errors.UsageError, match="its context is 32"):
        hf.read_origin(place / "exports" / "qwen3", long)


@pytest.mark.long
def test_a_run_starts_from_a_directory(place, tmp_path):
    dataset = place / "dataset"
    config_ = small_run.make_config(
        dataset, "muon", "none", model__num_kv_heads=2, model__num_heads=4, model__head_dim=8
    )
    origin = hf.read_origin(place / "exports" / "llama", config_.model)
    workdir = tmp_path / "run"
    train.train_and_evaluate(config_, workdir, origin=origin)
    run = trained_run.open_run(workdir, step=0)
    assert run.params_sha256 == origin.params_sha256
    assert run.environment["init_from"] == {
        "name": "llama",
        "params_sha256": origin.params_sha256,
    }
    train.train_and_evaluate(config_, workdir)  # the same run, without the flag
    other = origin._replace(params_sha256="0" * 64)
    resumed = train.train_and_evaluate
    with pytest.raises(errors.UsageError, match="started from"):
        resumed(config_, workdir, origin=other, restore_step=0)
