"""The decoder under the names of Hugging Face's stock classes, there and back, exactly.

Our RoPE is the rotate-half layout of those classes, so a kernel [in, out] becomes its transpose
and nothing else. Two tensors change value: the stock classes do not multiply the embedding by
sqrt(d), so it is stored multiplied, and the final norm's gamma is divided by sqrt(d), because the
tied head has grown by as much.
"""

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
RECORD_FILE = "qkjax.json"  # which run it was; transformers does not look at it
_EMBEDDING, _FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"


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


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `config_json`. "frozen" comes back as "learned": both compute the same.

    Raises:
        UsageError: not a config of the four classes as this project writes them.
    """
    found = [
        key for key, stock in _STOCK.items() if values.get("architectures") == [stock.architecture]
    ]
    if not found:
        raise errors.UsageError(
            f"{CONFIG_FILE}: architectures is {values.get('architectures')!r}, expected one of "
            f"{[stock.architecture for stock in _STOCK.values()]}. Give an exported directory."
        )
    ((mlp, normalised),) = found
    try:
        config = ModelConfig(
            qk_norm="learned" if normalised else "none",
            mlp=mlp,
            num_layers=values["num_hidden_layers"],
            d_model=values["hidden_size"],
            num_heads=values["num_attention_heads"],
            num_kv_heads=values["num_key_value_heads"],
            head_dim=values["head_dim"],
            d_ff=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            sequence_length=values["max_position_embeddings"],
            norm_eps=values["rms_norm_eps"],
            rope_base=values["rope_parameters"]["rope_theta"],
            dtype="float32",
            unroll=1,
            attention="auto",
        )
        expected = config_json(config, eos_id=values["eos_token_id"], dtype=values["dtype"])
    except (KeyError, TypeError) as error:
        raise errors.UsageError(
            f"{CONFIG_FILE}: lacks a field ({error!r}). Give a directory of `qkjax export`."
        ) from error
    if different := differences(expected, values):
        raise errors.UsageError(
            f"{CONFIG_FILE}: not a model of this project: {'; '.join(different)}. "
            "Give a directory of `qkjax export`."
        )
    return config


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
            "Export the run again."
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
    """The model of an exported directory, for `model.apply`: float32, numpy.

    Raises:
        UsageError: a missing or damaged file, a foreign model, or tensors that do not fit.
    """
    directory = pathlib.Path(directory)
    path = directory / CONFIG_FILE
    fix = "Give a directory of `qkjax export`."
    values = files.read_object(path, fix)
    if values is None:
        raise errors.UsageError(f"{path}: missing, expected a model's config. {fix}")
    config = model_config(values)
    return config, from_tensors(load_tensors(directory / WEIGHTS_FILE), config)
