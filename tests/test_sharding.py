"""sharding.py: what each mesh cuts, and that all of them train the same model."""

import functools
import json
import textwrap

import jax
import numpy as np
import pytest
from small_model import Trainer, batch, by_name, initial_params, small

from qkjax import model, optimizer, sharding, train_step
from qkjax.runs import checkpoint

MESHES = ("data", "zero1", "fsdp")
ARMS = {  # 2 layers do not divide over 8 devices, 8 do
    "adamw": (("adamw", "learned"), {}),
    "muon": (("muon", "learned"), {"model__num_layers": 8}),
    "padded": (("muon", "none"), {}),
    "per_head": (("muon", "none", "tiny,fixed,per_head"), {}),
}
STEPS = 3


@functools.cache
def trainer(arm, mesh, passes=1):
    words, fields = ARMS[arm]
    return Trainer(small(*words, mesh=mesh, train__microbatch_sequences=2 // passes, **fields))


def on_8_devices(folder):
    """Of every arm under every mesh: what three steps leave, and the checkpoint of `zero1`."""
    for arm in ARMS:
        for mesh in MESHES:
            t = trainer(arm, mesh, passes=2 if arm == "adamw" else 1)
            state = t.state(initial_params(t.config))
            losses = []
            for i in range(STEPS):
                state, metrics = t.step(state, batch(t.config, i))
                assert metrics.finite
                losses += [float(metrics.loss), float(metrics.grad_norm)]
            found = by_name({"params": state.params, "opt_state": state.opt_state})
            np.savez(f"{folder}/{arm}-{mesh}.npz", losses=losses, **found)
            cut = {
                name: leaf.size / leaf.addressable_shards[0].data.size
                for name, leaf in found.items()
            }
            with open(f"{folder}/{arm}-{mesh}.json", "w") as file:
                json.dump({"devices": jax.device_count(), "cut": cut}, file)
            save(f"{folder}/checkpoints-{arm}-{mesh}", state)


def save(folder, state):
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(STEPS, state.params, state.opt_state, {})
    checkpoints.close()


def restored_digests(folder, arm, mesh):
    """Of a checkpoint that another number of devices, or another mesh, takes up."""
    t = trainer(arm, mesh)
    shapes = train_step.state_shapes(t.config, t.transformation)
    checkpoints = checkpoint.Checkpoints(folder, read_only=True)
    found = checkpoints.restore(STEPS, shapes.params, shapes.opt_state)
    placed = train_step.state_shardings(t.config, t.transformation, t.mesh)
    params = jax.device_put(found.params, placed.params)
    opt_state = jax.device_put(found.opt_state, placed.opt_state)
    return [checkpoint.digests(tree)[1] for tree in (params, opt_state)]


@pytest.fixture(scope="module")
def trained(on_devices, tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_sharding as t; t.on_8_devices({!r})"
    )
    on_devices(code.format(str(folder)), 8)
    return folder


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize("mesh", MESHES[1:])
@pytest.mark.parametrize("arm", ARMS)
def test_every_mesh_trains_the_same_model(trained, arm, mesh):
    """Only the order of sums differs. Weights here are near 1 at most: 1e-6 is a few roundings."""
    with np.load(trained / f"{arm}-data.npz") as one, np.load(trained / f"{arm}-{mesh}.npz") as two:
        assert one.files == two.files
        np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-6)
        for name in one.files[1:]:
            np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("arm", ARMS)
def test_a_mesh_cuts_what_it_says(trained, arm, mesh):
    said = json.loads((trained / f"{arm}-{mesh}.json").read_text())
    assert said["devices"] == 8
    for name, parts in said["cut"].items():
        is_matrix = name.endswith(("kernel", "embedding")) and (mesh != "data")
        assert parts == (8 if is_matrix else 1), name


@pytest.mark.long
@pytest.mark.process
def test_a_checkpoint_of_one_mesh_restores_under_another(trained, on_devices):
    kinds = {mesh: f"{trained}/checkpoints-muon-{mesh}" for mesh in MESHES}
    code = f"""
        import sys
        sys.path.insert(0, "tests")
        import test_sharding as t
        kinds = {kinds!r}
        print([t.restored_digests(kinds[a], "muon", b) for a in kinds for b in kinds if a != b])
    """
    expected = []
    for mesh in MESHES:
        meta = checkpoint.Checkpoints(kinds[mesh], read_only=True).meta(STEPS)
        expected += [[meta["params_sha256"], meta["opt_state_sha256"]]] * (len(MESHES) - 1)
    assert on_devices(textwrap.dedent(code), 4).splitlines()[-1] == str(expected)


@pytest.mark.long
def test_one_device_takes_every_mesh():
    expected = None
    for mesh in MESHES:
        t = trainer("padded", mesh)
        state, _ = t.run(initial_params(t.config), 1)
        found = checkpoint.digests(state.params)[1]
        assert expected in (None, found)
        expected = found


@pytest.mark.parametrize(
    ("kind", "layers", "cut"),
    [
        ("data", 24, {}),
        ("zero1", 24, {"kernel": 0, "embedding": 0}),
        ("zero1", 22, {"kernel": 1, "embedding": 0}),
        ("fsdp", 24, {"kernel": 1, "embedding": 0}),
    ],
)
def test_axes_that_are_cut(kind, layers, cut):
    c = small("muon", "learned", model__num_layers=layers)
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    transformation = optimizer.make_optimizer(c, model.parameter_shapes(c.model))
    state = train_step.state_shapes(c, transformation)
    for tree in (state.params, state.opt_state):
        axes = by_name(sharding.cut_axes(tree, mesh, kind))
        assert len(axes) > 5
        for name, axis in axes.items():
            assert axis == cut.get(name.rpartition("/")[2], sharding.WHOLE), name


def test_what_divides_over_no_axis_stays_whole():
    mesh = jax.sharding.AbstractMesh((7,), ("data",))
    c = small("muon", "none")
    axes = sharding.cut_axes(model.parameter_shapes(c.model), mesh, "zero1")
    assert set(jax.tree.leaves(axes)) == {sharding.WHOLE}
