"""What compiled programs for GPUs and TPUs must show, where their compilers are installed.

bash tools/set_up_aot.sh gpu installs the one that CI has.
"""

import collections
import math
import pathlib
import typing
from collections.abc import Callable

import jax
import pytest

from qkjax import config as config_lib
from qkjax import model
from qkjax.measures import probes
from qkjax.targets import hlo, launch, target

pytestmark = pytest.mark.long
LAYERS, LENGTH, VOCABULARY, WIDTH, CHUNK = 2, 256, 640, 96, 512
PASSES = 2  # of two devices


class Program(typing.NamedTuple):
    said: dict  # of `programs.describe`
    hlo: hlo.Program


def make_config(**fields) -> config_lib.Config:
    """Sizes that are all different, so that an array's axes can be told by them."""
    values = config_lib.base("muon", "learned", "tiny")
    values.model.update(
        num_layers=LAYERS,
        d_model=WIDTH,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        d_ff=160,
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
    )
    values.train.update(tokens_per_step=8 * LENGTH, tokens=80 * LENGTH, loss_chunk_tokens=CHUNK)
    for name, value in fields.items():
        values.update_from_flattened_dict({name.replace("__", "."): value})
    return config_lib.resolve(values)


def shapes_of_parameters() -> model.Params:
    return model.parameter_shapes(make_config().for_platform("gpu").model)


def compiled(
    name: str, folder: pathlib.Path, programs: tuple[str, ...], **fields
) -> dict[str, Program]:
    aim = target.parse(name)
    if launch.interpreter(aim.chip.platform) is None:
        pytest.skip(f"no compiler for {name}: bash tools/set_up_aot.sh {aim.chip.platform}")
    said = launch.ask(make_config(**fields), aim, programs, folder / "program")
    return {
        answer["name"]: Program(
            answer, hlo.Program((folder / f"program.{answer['name']}.hlo").read_text())
        )
        for answer in said
    }


@pytest.fixture(scope="module")
def h100(tmp_path_factory):
    return compiled("h100", tmp_path_factory.mktemp("h100"), ("train", "evaluate", "decompose"))


@pytest.fixture(scope="module")
def two_h100(tmp_path_factory):
    folder = tmp_path_factory.mktemp("h100x2")
    return compiled("h100:2", folder, ("train",), train__microbatch_sequences=8 // 2 // PASSES)


@pytest.fixture(scope="module")
def two_h100_zero1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("h100x2-zero1")
    fields = {"train__microbatch_sequences": 8 // 2 // PASSES, "mesh": "zero1"}
    return compiled("h100:2", folder, ("train",), **fields)


@pytest.fixture(scope="module")
def two_h100_fsdp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("h100x2-fsdp")
    fields = {"train__microbatch_sequences": 8 // 2 // PASSES, "mesh": "fsdp"}
    return compiled("h100:2", folder, ("train",), **fields, model__remat="block")


@pytest.fixture(scope="module")
def v5e(tmp_path_factory):
    return compiled("v5e:2x2", tmp_path_factory.mktemp("v5e"), ("train", "evaluate"))


def products(program: Program) -> list[hlo.Product]:
    return [product for kernel in program.hlo.kernels for product in kernel.products]


def largest_of_vocabulary(program: Program) -> float:
    """The most positions, or other rows, that stand beside the vocabulary in one buffer."""
    return max(
        array.size / VOCABULARY for _, array in program.hlo.buffers() if VOCABULARY in array.dims
    )


def check_step(program: Program, devices: int, is_rounded: Callable[[hlo.Product], bool]) -> None:
    """What holds of every train step on every target."""
    taken_over, leaves = program.said["donated"]
    assert taken_over == leaves > 30
    assert largest_of_vocabulary(program) <= CHUNK  # no [B, T, V]
    assert products(program) and all(is_rounded(product) for product in products(program))
    assert program.hlo.unknown_loops == 0
    flop = sum(program.said["product_flop"].values()) * devices
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of_parameters()))
    # Every product of the forward and backward pass once; attention, where it is products, and
    # Newton-Schulz on every device come on top.
    assert flop >= 0.99 * 6 * (8 * LENGTH) * parameters


@pytest.mark.parametrize("which", ["h100", "two_h100"])
def test_a_train_step_on_gpus(which, request):
    program: Program = request.getfixturevalue(which)["train"]
    devices = 2 if which == "two_h100" else 1
    check_step(program, devices, lambda product: product.dtypes == ("bf16", "bf16"))
    squares = [a for _, a in program.hlo.buffers() if a.dims.count(LENGTH) > 1]
    assert not squares  # no [T, T]
    calls = [kernel for kernel in program.hlo.kernels if kernel.attention]
    assert collections.Counter(kernel.attention for kernel in calls) == {
        "forward": LAYERS,
        "backward": LAYERS,
    }
    # model.unroll: no loop over the layers, only the one over passes.
    assert all(kernel.times == (PASSES if which == "two_h100" else 1) for kernel in calls)


@pytest.mark.parametrize("which", ["h100", "two_h100"])
def test_sums_on_gpus_have_one_order(which, request):
    """Scatters of floating point without unique indices are atomic sums."""
    scatters = list(request.getfixturevalue(which)["train"].hlo.scatters())
    assert any(i.arrays[0].dims[-1] == WIDTH for i, _ in scatters)  # the embedding's gradient
    assert all(unique for i, unique in scatters if i.arrays[0].dtype[0] in "bf")


def test_gradients_cross_devices_once(h100, two_h100):
    assert not h100["train"].said["collectives"]
    shapes = shapes_of_parameters()
    found = two_h100["train"].said["collectives"]
    # In float32, after the last pass: the table's two gradients are one by then.
    assert found.keys() == {"all-reduce f32"}
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert 0 <= found["all-reduce f32"]["bytes"] - 4 * parameters < 64  # the loss
    assert sum(entry["times"] for entry in found.values()) <= 4


def product_flop(program: Program) -> float:
    return sum(program.said["product_flop"].values())


def newton_schulz_flop() -> float:
    """Of all matrices: five times X X^T, its square, and the product of both with X."""
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_of_parameters()):
        if "kernel" in jax.tree_util.keystr(path):
            short, long = sorted(leaf.shape[-2:])
            total += leaf.shape[0] * 5 * (4 * short * short * long + 2 * short**3)
    return total


def test_zero1_divides_newton_schulz_and_the_state(two_h100, two_h100_zero1):
    whole, divided = two_h100["train"], two_h100_zero1["train"]
    saved = product_flop(whole) - product_flop(divided)
    assert saved == pytest.approx(newton_schulz_flop() / 2, rel=1e-6)
    parameters = shapes_of_parameters()
    # Muon keeps one number a parameter, AdamW of the embedding two.
    kernels = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters["blocks"]))
    table = math.prod(parameters["embedding"].shape)
    held = 4 * (kernels + 2 * table) + 4 * (kernels + table)
    less = whole.said["argument_bytes"] - divided.said["argument_bytes"]
    assert less == pytest.approx(held / 2, rel=0.01)  # gammas stay whole
    found = divided.said["collectives"]
    cut = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)
        if "kernel" in jax.tree_util.keystr(path)
    )
    # Gradients once, after the last pass, in float32. Parameters once, before the first: kernels as
    # products take them, the table as the embedding does.
    assert found["reduce-scatter f32"]["bytes"] == 4 * (cut + table)
    assert found["all-gather bf16"]["bytes"] == 2 * cut
    assert found["all-gather f32"]["bytes"] == 4 * table
    taken_over, leaves = divided.said["donated"]
    assert taken_over == leaves > 30


def test_fsdp_gathers_a_layer_at_a_time(two_h100_zero1, two_h100_fsdp):
    program, zero1 = two_h100_fsdp["train"], two_h100_zero1["train"]
    assert program.said["argument_bytes"] == pytest.approx(zero1.said["argument_bytes"], rel=0.01)
    found = program.said["collectives"]
    kernels = 2 * sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_of_parameters())
        if "kernel" in jax.tree_util.keystr(path)
    )
    # In bfloat16, of each layer forward and backward in every pass.
    assert found["all-gather bf16"]["bytes"] == 2 * PASSES * kernels
    taken_over, leaves = program.said["donated"]
    assert taken_over == leaves > 30


def test_an_evaluation_on_gpus(h100):
    program = h100["evaluate"]
    taken_over, leaves = program.said["donated"]
    assert taken_over == leaves > 10
    assert largest_of_vocabulary(program) <= CHUNK
    # Moments are float64; the largest logits and entropies float32 of full precision.
    others = [product for product in products(program) if product.dtypes != ("bf16", "bf16")]
    assert {(product.dtypes, product.precise) for product in others} == {
        (("f64", "f64"), True),
        (("f32", "f32"), True),
    }
    assert all("blocks/attention" in product.op_name for product in others)
    assert program.said["attention_calls"] == {"forward": LAYERS}
    assert h100["decompose"].hlo.unknown_loops == 0
    # One batch of Jacobi's eigenvalues a stage, in the float64 of the moments; no serial SVD or QR.
    solvers = [k for k in h100["decompose"].hlo.kernels if k.decompositions]
    assert {k.decompositions for k in solvers} == {1} and len(solvers) < 10
    targets = collections.Counter(
        (i.target, i.arrays[0].dtype) for i in h100["decompose"].hlo.instructions() if i.target
    )
    assert targets == {("cusolver_syevd_ffi", "f64"): len(solvers)}


def test_products_are_of_bfloat16_where_float64_is_slow(h100, tmp_path):
    by_rate = {"h100": h100["evaluate"], **compiled("a6000", tmp_path, ("evaluate",))}
    wide = {
        name: sum(p.flop for p in products(program) if p.dtypes == ("f64", "f64"))
        for name, program in by_rate.items()
    }
    assert wide["evaluate"] < 0.01 * wide["h100"]


def test_a_train_step_on_tpus(v5e):
    # The matrix unit rounds a float32 operand on its way in, unless told otherwise.
    check_step(v5e["train"], 4, lambda product: "bf16" in product.dtypes and not product.precise)
    assert not v5e["train"].said["decompositions"]
    # No [T, T] of scores, in no memory; what a kernel of Pallas holds is its own.
    arrays = [array for i in v5e["train"].hlo.instructions() for array in i.arrays]
    assert not [array for array in arrays if array.dims.count(LENGTH) > 1]
    assert v5e["train"].said["attention_calls"] == {
        "forward": LAYERS,
        "backward of queries": LAYERS,
        "backward of keys": LAYERS,
    }


def test_an_evaluation_on_tpus(v5e):
    program = v5e["evaluate"]
    assert program.said["attention_calls"] == {"forward": LAYERS}
    # Norms are counted without a scatter, which would add one after another.
    scattered = [i.arrays[0].size for i, _ in program.hlo.scatters()]
    assert not [size for size in scattered if size % probes.NUM_BINS == 0]
