"""The decoder under the names of Hugging Face's stock classes, there and back, exactly.

Our RoPE is the rotate-half layout of those classes, so a kernel [in, out] becomes its transpose
and nothing else. Two tensors change value: the stock classes do not multiply the embedding by
sqrt(d), so it is stored multiplied, and the final norm's gamma is divided by sqrt(d), because the
tied head has grown by as much.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from qkjax import errors, files, model
from qkjax.config import ModelConfig
from qkjax.runs import checkpoint

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # of large models, in several files
RECORD_FILE = "qkjax.json"  # which run it was; transformers does not look at it
_EMBEDDING, _FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"
_HEAD = "lm_head.weight"


class _Stock(NamedTuple):
    """A class of transformers and what it calls the two norms of a block."""

    architecture: str
    model_type: str
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"


# By MLP and by whether queries and keys are normalised.
_STOCK = {
    ("swiglu", False): _Stock("LlamaForCausalLM", "llama"),
    ("swiglu", True): _Stock("Qwen3ForCausalLM", "qwen3"),
    ("relu2", False): _Stock("ArceeForCausalLM", "arcee"),
    ("relu2", True): _Stock(
        "ApertusForCausalLM", "apertus", "attention_layernorm", "feedforward_layernorm"
    ),
}
_HIDDEN_ACT = {"swiglu": "silu", "relu2": "relu2"}


def architecture(config: ModelConfig) -> str:
    """The class of transformers that computes this model, such as "LlamaForCausalLM"."""
    return _stock(config).architecture


def _stock(config: ModelConfig) -> _Stock:
    return _STOCK[config.mlp, config.qk_norm != "none"]


def config_json(config: ModelConfig, *, eos_id: int, dtype: str = "float32") -> dict[str, Any]:
    """The content of config.json: every field that the class would otherwise choose itself.

    Args:
        eos_id: the end-of-text token; it also starts documents and pads.
        dtype: of the stored tensors, one of DTYPES.
    Raises:
        UsageError: the class cannot hold the model.
    """
    stock = _stock(config)
    if config.d_model % config.num_heads:  # refused by some of the classes when they load
        raise errors.UsageError(
            f"model.d_model: {config.d_model} is not a multiple of model.num_heads "
            f"{config.num_heads}, as {stock.architecture} demands. Train a model of other widths."
        )
    values = {
        "architectures": [stock.architecture],
        "model_type": stock.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _HIDDEN_ACT[config.mlp],
        "max_position_embeddings": config.sequence_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,  # where transformers 4 looks, as for the next
        "rope_scaling": None,  # its Apertus would stretch the angles, as Llama 3 does
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "dtype": dtype,
    }
    if stock.model_type in ("llama", "arcee"):
        values["mlp_bias"] = False
    if stock.model_type == "qwen3":
        values["use_sliding_window"] = False
    return values


# What a config may leave out, by class: transformers' own defaults; head_dim and kv heads follow.
_DEFAULTS: dict[str, Mapping[str, Any]] = {
    "llama": {"hidden_act": "silu", "max_position_embeddings": 2048},
    "qwen3": {"hidden_act": "silu", "max_position_embeddings": 32768, "head_dim": 128},
    "arcee": {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "apertus": {"hidden_act": "xielu", "max_position_embeddings": 65536, "rms_norm_eps": 1e-5},
}
_OF_ALL = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
# Present or not, it must be this: our model has no other form.
_NEEDED: dict[str, Any] = {
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `config_json`, of public models too: absent fields are the class's defaults.

    "frozen" comes back as "learned": both compute the same. Fields that change no number, such as
    transformers_version, are ignored.

    Raises:
        UsageError: not one of the four classes, or one with what our model does not have: an
            untied head, biases, windows, scaled RoPE.
    """
    found = [
        key for key, stock in _STOCK.items() if values.get("architectures") == [stock.architecture]
    ]
    if not found:
        raise errors.UsageError(
            f"{CONFIG_FILE}: architectures is {values.get('architectures')!r}, expected one of "
            f"{[stock.architecture for stock in _STOCK.values()]}. Give such a directory."
        )
    ((mlp, normalised),) = found
    model_type = _STOCK[found[0]].model_type
    given = {name: value for name, value in values.items() if value is not None}
    full: dict[str, Any] = {**_OF_ALL, **_DEFAULTS[model_type], **given}
    needed = {**_NEEDED, "hidden_act": _HIDDEN_ACT[mlp]}
    wrong = [
        f"{name} is {full[name]!r}, expected {value!r}"
        for name, value in needed.items()
        if full.get(name, value) != value
    ]
    rope, rope_wrong = _rope(full)
    wrong += rope_wrong
    if wrong:
        raise errors.UsageError(
            f"{CONFIG_FILE}: not a model that this project's code computes: {'; '.join(wrong)}. "
            "Give another; qkjax measure takes any decoder."
        )
    try:
        d_model, heads = _whole(full["hidden_size"]), _whole(full["num_attention_heads"])
        return ModelConfig(
            qk_norm="learned" if normalised else "none",
            mlp=mlp,
            num_layers=_whole(full["num_hidden_layers"]),
            d_model=d_model,
            num_heads=heads,
            num_kv_heads=_whole(full.get("num_key_value_heads", heads)),
            head_dim=_whole(full.get("head_dim", d_model // heads)),
            d_ff=_whole(full["intermediate_size"]),
            vocab_size=_whole(full["vocab_size"]),
            sequence_length=_whole(full["max_position_embeddings"]),
            norm_eps=float(full["rms_norm_eps"]),
            rope_base=float(rope),
            dtype="float32",
            unroll=1,
            remat="none",
            attention="auto",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise errors.UsageError(
            f"{CONFIG_FILE}: lacks a field ({error!r}). Give the config that came with the model."
        ) from error


def _rope(values: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The base of RoPE, and what is not plain about it."""
    parameters = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    base = parameters.get("rope_theta", values.get("rope_theta", 10_000.0))
    wrong = []
    for name, fields in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        kind = fields.get("rope_type", fields.get("type", "default"))
        if kind != "default":
            wrong.append(f"{name} is of type {kind!r}, expected 'default'")
        share = fields.get("partial_rotary_factor", 1.0)
        if share != 1.0:
            wrong.append(f"{name} turns {share} of a head, expected all of it")
    return base, wrong


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a whole number above 0")
    return value


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The fields of two configs that differ, as text, in the order of the fields."""
    absent = "(absent)"
    return [
        f"{name} is {found.get(name, absent)!r}, expected {expected.get(name, absent)!r}"
        for name in dict.fromkeys((*expected, *found))
        if found.get(name, absent) != expected.get(name, absent)
    ]


# --------------------------------------------------------------------------------------------
# Tensors.


def to_tensors(
    params: model.Params, config: ModelConfig, *, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """The tensors of model.safetensors by name; the tied head is not stored.

    Args:
        params: the tree of `model.init`, float32.
        dtype: to round to in the end, one of DTYPES.
    """
    flat = _flat(params)
    scale = _embedding_scale(config)
    tensors = {_EMBEDDING: flat.pop("embedding") * scale}
    gamma = flat.pop("final_norm/gamma")
    names = _block_names(config)
    for layer in range(config.num_layers):
        for name, stacked in flat.items():
            value = stacked[layer]
            tensors[f"model.layers.{layer}.{names[name]}"] = value.T if value.ndim == 2 else value
    tensors[_FINAL_NORM] = gamma / scale
    return {name: np.ascontiguousarray(x, DTYPES[dtype]) for name, x in tensors.items()}


def from_tensors(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> model.Params:
    """The inverse of `to_tensors`: float32 parameters as numpy arrays.

    Bit-exact from float32 tensors but for the embedding and the final gamma, which were rounded
    once on the way there and are again here: within 1 ulp.

    Raises:
        UsageError: missing or unexpected tensors (all of them are listed), or another shape.
    """
    shapes = model.parameter_shapes(config)
    expected = tensor_shapes(config)
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise errors.UsageError(
            f"{WEIGHTS_FILE}: missing tensors {missing}, unexpected tensors {unexpected}. "
            "Give a directory of `qkjax export`."
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise errors.UsageError(
                f"{WEIGHTS_FILE}: {name} has the shape {list(tensors[name].shape)}, "
                f"{CONFIG_FILE} says {list(shape)}. Give a directory of `qkjax export`."
            )
    scale = _embedding_scale(config)
    flat = {
        "embedding": tensors[_EMBEDDING].astype(np.float32) / scale,
        "final_norm/gamma": tensors[_FINAL_NORM].astype(np.float32) * scale,
    }
    for ours, theirs in _block_names(config).items():
        layers = [tensors[f"model.layers.{i}.{theirs}"] for i in range(config.num_layers)]
        flat[ours] = np.stack([x.T if x.ndim == 2 else x for x in layers]).astype(np.float32)
    leaves = [flat[name] for name in checkpoint.leaf_names(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of model.safetensors."""
    flat = {name: leaf.shape for name, leaf in _flat(model.parameter_shapes(config)).items()}
    shapes = {_EMBEDDING: flat["embedding"], _FINAL_NORM: flat["final_norm/gamma"]}
    for ours, theirs in _block_names(config).items():
        for layer in range(config.num_layers):
            shapes[f"model.layers.{layer}.{theirs}"] = flat[ours][1:][::-1]
    return shapes


def _embedding_scale(config: ModelConfig) -> np.float32:
    return np.float32(math.sqrt(config.d_model))  # rounded as the model's own product rounds it


def _flat(tree: model.Params) -> dict[str, Any]:
    return dict(zip(checkpoint.leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _block_names(config: ModelConfig) -> dict[str, str]:
    """Our name of every stacked leaf -> the stock name within a layer."""
    stock = _stock(config)
    names = {
        "attention_norm/gamma": f"{stock.attention_norm}.weight",
        "mlp_norm/gamma": f"{stock.mlp_norm}.weight",
        "attention/query/kernel": "self_attn.q_proj.weight",
        "attention/key/kernel": "self_attn.k_proj.weight",
        "attention/value/kernel": "self_attn.v_proj.weight",
        "attention/output/kernel": "self_attn.o_proj.weight",
        "mlp/up/kernel": "mlp.up_proj.weight",
        "mlp/down/kernel": "mlp.down_proj.weight",
    }
    if config.qk_norm != "none":
        names["attention/query_norm/gamma"] = "self_attn.q_norm.weight"
        names["attention/key_norm/gamma"] = "self_attn.k_norm.weight"
    if config.mlp == "swiglu":
        names["mlp/gate/kernel"] = "mlp.gate_proj.weight"
    return {f"blocks/{ours}": theirs for ours, theirs in names.items()}


# --------------------------------------------------------------------------------------------
# Files.


def save_tensors(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    """Writes a safetensors file.

    Raises:
        UsageError: safetensors is not installed.
        OSError: the disk failed.
    """
    require_safetensors()
    import safetensors
    import safetensors.numpy

    try:
        # Without the format, transformers 4 refuses the file.
        safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def load_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, float32 or bfloat16.

    Raises:
        UsageError: safetensors is not installed, no such file, or a damaged one.
    """
    require_safetensors()
    import safetensors

    try:
        with safetensors.safe_open(path, framework="np") as file:
            return file.get_tensors()
    except (OSError, safetensors.SafetensorError, KeyError, TypeError) as error:
        raise errors.UsageError(
            f"{path}: not a readable safetensors file ({errors.one_line(error)}). "
            "Export the run, or download the model, again."
        ) from error


def require_safetensors() -> None:
    """Checks that safetensors is installed.

    Raises:
        UsageError: it is not; names the command that installs it.
    """
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise errors.UsageError(
            "safetensors: not installed, and exports are written with it. "
            "Run pip install -e '.[export]', or pip install safetensors (torch is not needed)."
        ) from None


def read_directory(directory: str | pathlib.Path) -> tuple[ModelConfig, model.Params]:
    """The model of a directory for `model.apply`: float32, numpy.

    An exported one, or a public model of the same classes, in one file of weights or several.

    Raises:
        UsageError: a missing or damaged file, a model that our code does not compute, or tensors
            that do not fit.
    """
    directory = pathlib.Path(directory)
    path = directory / CONFIG_FILE
    fix = "Give a directory of `qkjax export`, or of a public Llama or Qwen3."
    values = files.read_object(path, fix)
    if values is None:
        raise errors.UsageError(f"{path}: missing, expected a model's config. {fix}")
    config = model_config(values)
    return config, from_tensors(_own_tensors(_all_tensors(directory)), config)


# What the parameters of another model must agree in. A longer context than ours is fine.
_COMPARED = (
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_ff",
    "vocab_size",
    "mlp",
    "qk_norm",
    "norm_eps",
    "rope_base",
)


def read_origin(directory: str | pathlib.Path, config: ModelConfig) -> checkpoint.Origin:
    """The parameters of a directory, as what a run of `config` starts from.

    Raises:
        UsageError: as `read_directory`; or the model is another than the config's: names every
            field, with the flags that set them.
    """
    found, params = read_directory(directory)
    theirs = dataclasses.asdict(found)
    different = [name for name in _COMPARED if theirs[name] != getattr(config, name)]
    if different:
        fields = ", ".join(
            f"model.{name} is {getattr(config, name)}, expected {theirs[name]}"
            for name in different
        )
        flags = " ".join(f"--config.model.{name}={theirs[name]}" for name in different)
        raise errors.UsageError(f"--init_from={directory}: {fields}. Give {flags}.")
    if config.sequence_length > found.sequence_length:
        raise errors.UsageError(
            f"--init_from={directory}: its context is {found.sequence_length}, and "
            f"model.sequence_length is {config.sequence_length}. Use a dataset of shorter records."
        )
    name = pathlib.Path(directory).absolute().name  # where it lies says nothing of what it is
    return checkpoint.Origin(name, params, checkpoint.digests(params)[1])


def _all_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of model.safetensors, or of every file that its index names."""
    index = files.read_object(directory / INDEX_FILE, "Download it again.")
    if index is None:
        return load_tensors(directory / WEIGHTS_FILE)
    places = index.get("weight_map")
    files.need(directory / INDEX_FILE, "", index, {"weight_map": dict}, "Download it again.")
    assert isinstance(places, dict)
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(map(str, places.values()))):
        tensors |= load_tensors(directory / pathlib.Path(name).name)
    return tensors


def _own_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without what public files repeat: the tied head, and tables of RoPE.

    Raises:
        UsageError: the head is not the embedding, so it is not tied.
    """
    head, embedding = tensors.get(_HEAD), tensors.get(_EMBEDDING)
    if head is not None and embedding is not None and not np.array_equal(head, embedding):
        raise errors.UsageError(
            f"{WEIGHTS_FILE}: {_HEAD} is not {_EMBEDDING}, expected a tied head. "
            "Give another model; qkjax measure takes any decoder."
        )
    return {
        name: value
        for name, value in tensors.items()
        if name != _HEAD and not name.endswith(".rotary_emb.inv_freq")
    }
