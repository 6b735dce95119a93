"""checkpoint.py: round trips, digests, what is kept, and every kind of damage."""

import contextlib
import functools
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import textwrap
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qkjax import config as config_lib
from qkjax import errors, model, optimizer, train_step
from qkjax.runs import checkpoint

SMALL = {
    "model.num_layers": 2,
    "model.d_model": 16,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 4,
    "model.d_ff": 24,
    "model.vocab_size": 32,
    "model.sequence_length": 16,
    "train.tokens_per_step": 256,
}


@functools.cache
def state_shapes(optimizer_name="muon", qk_norm="learned", words="tiny", **fields):
    """Shapes of a run's parameters and optimiser state; `fields` with '__' for the dot."""
    given = config_lib.base(optimizer_name, qk_norm, words)
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    given.update_from_flattened_dict(SMALL | changes)
    c = config_lib.resolve(given).for_platform("cpu")
    transformation = optimizer.make_optimizer(c, model.parameter_shapes(c.model))
    return train_step.state_shapes(c, transformation)


def numbers_of(step, shapes):
    """Numbers that belong to the step, in these shapes."""
    numbers = np.random.default_rng(step).standard_normal
    return jax.tree.map(lambda leaf: (1000 * numbers(leaf.shape)).astype(leaf.dtype), shapes)


def state(step):
    return numbers_of(step, state_shapes())


def save(directory, *steps, **kwargs):
    """Saves these steps; the Checkpoints, still open."""
    checkpoints = checkpoint.Checkpoints(directory, **kwargs)
    for step in steps:
        s = state(step)
        checkpoints.save(step, s.params, s.opt_state, {"note": f"of step {step}"})
    checkpoints.wait()
    return checkpoints


def restore(directory, step):
    shapes = state_shapes()
    return checkpoint.Checkpoints(directory, read_only=True).restore(
        step, shapes.params, shapes.opt_state
    )


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (f.dtype, f.shape) == (e.dtype, e.shape) and f.tobytes() == e.tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 0 and 7, to be copied before anything is done to them."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, 0, 7).close()
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.mark.parametrize("arm", [("adamw", "learned"), ("muon", "learned", "tiny,frozen,merged")])
def test_round_trip_keeps_every_bit_and_type(arm, tmp_path):
    """The optimiser's state is a tree of NamedTuples, some of them empty."""
    shapes = state_shapes(*arm)
    params, opt_state = numbers_of(3, (shapes.params, shapes.opt_state))
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, params, opt_state, {"wall_seconds": 1.5, "nested": {"a": [1]}})
    checkpoints.wait()
    found = checkpoints.restore(3, shapes.params, shapes.opt_state)
    assert_same_bits(found.params, params)
    assert_same_bits(found.opt_state, opt_state)
    assert isinstance(jax.tree.leaves(found.params)[0], np.ndarray)
    assert_same_bits(checkpoints.restore_params(3, shapes.params), params)
    meta = checkpoints.meta(3)
    assert meta == found.meta
    assert (meta["wall_seconds"], meta["nested"], meta["step"]) == (1.5, {"a": [1]}, 3)
    assert meta["params_sha256"] == checkpoint.digests(params)[1]
    assert meta["opt_state_sha256"] == checkpoint.digests(opt_state)[1]
    assert meta["format_version"] == 2
    checkpoints.close()


class Moments(NamedTuple):
    """A state whose fields do not stand in the order of their names."""

    second: np.ndarray
    first: np.ndarray


def test_fields_of_a_state_are_not_mixed_up(tmp_path):
    opt_state = (*(np.float32(i) for i in range(12)), Moments(np.zeros(3), np.ones(3)))
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(0, {"x": np.zeros(1)}, opt_state, {})
        checkpoints.wait()
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            ({"x": np.zeros(1)}, opt_state),
        )
        assert_same_bits(checkpoints.restore(0, *shapes).opt_state, opt_state)


def test_digest_is_as_documented():
    """sha256 over leaves sorted by path of path, dtype, shape as JSON, little-endian bytes."""
    tree = {
        "b": {"x": np.arange(6, dtype=np.int32).reshape(2, 3)},
        "a": jnp.asarray([1.5, -2.0], jnp.bfloat16),
        "b.x": np.float32(7),  # sorted by the whole path: "b.x" stands before "b/x"
        "empty": np.zeros((0, 4), np.float32),
    }
    swapped = {**tree, "b": {"x": np.asfortranarray(tree["b"]["x"].astype(">i4"))}}
    pieces = {
        "a": b"abfloat16[2]" + bytes.fromhex("c03f00c0"),
        "b.x": b"b.xfloat32[]" + bytes.fromhex("0000e040"),
        "b/x": b"b/xint32[2, 3]" + b"".join(bytes([n, 0, 0, 0]) for n in range(6)),
        "empty": b"emptyfloat32[0, 4]",
    }
    for same in (tree, swapped):
        records, total = checkpoint.digests(same)
        assert total == hashlib.sha256(b"".join(pieces.values())).hexdigest()
        assert list(records) == list(pieces)
        for name, piece in pieces.items():
            assert records[name]["sha256"] == hashlib.sha256(piece).hexdigest(), name
    assert records["b/x"]["shape"] == [2, 3] and records["b/x"]["dtype"] == "int32"


@pytest.mark.parametrize(("keep_all", "kept"), [(False, [0, 9, 12]), (True, [0, 5, 7, 9, 12])])
def test_step_0_and_the_latest_two_are_kept(keep_all, kept, tmp_path):
    checkpoints = save(tmp_path, 0, 5, 7, 9, 12, keep_all=keep_all)
    assert checkpoints.steps() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, kept))
    checkpoints.close()
    for step in kept:
        assert_same_bits(restore(tmp_path, step).params, state(step).params)


def test_reading_warns_of_nothing(saved, caplog):
    """Orbax says twice that a directory is opened for reading only."""
    assert checkpoint.Checkpoints(saved, read_only=True).steps()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_parameters_are_a_plain_tree_for_orbax(saved):
    found = ocp.StandardCheckpointer().restore(saved / "7" / "params")
    assert_same_bits(jax.tree.map(np.asarray, found), state(7).params)


def test_host_copies_survive_donation(tmp_path):
    device = jax.device_put(state(2))
    host = checkpoint.to_host(device)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(2, device.params, device.opt_state, {})
    jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(
        device._replace(finite=None)
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(device.params))
    checkpoints.wait()
    checkpoints.close()
    assert_same_bits(host, state(2))
    assert_same_bits(restore(tmp_path, 2).opt_state, state(2).opt_state)


def test_host_copies_do_not_follow_the_original():
    original = {"x": np.zeros(3)}
    copy = checkpoint.to_host(original)
    original["x"] += 1
    assert (copy["x"] == 0).all()


ARRAY_FILES = ("params/**/*", "opt_state/**/*")


def files(directory, patterns=ARRAY_FILES):
    found = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    return sorted(found)


def assert_refused_or_harmless(directory, step):
    """True where the damage was refused; else the checkpoint must be whole."""
    try:
        found = restore(directory, step)
    except errors.UsageError as error:
        assert str(error).startswith(f"{directory / str(step)}: ")
        assert "\n" not in str(error)
        return True
    assert_same_bits(found.params, state(step).params)
    assert_same_bits(found.opt_state, state(step).opt_state)
    return False


def test_flipped_bytes_are_refused_or_harmless(copied):
    """Several places in every file of the arrays, most of them in the largest."""
    numbers = np.random.default_rng(0)
    flips = refused = refused_data = data = 0
    for path in files(copied / "7"):
        whole = path.read_bytes()
        is_data = len(whole) > 5_000 and path.parent.name == "d"
        for place in numbers.integers(0, len(whole), 20 if is_data else 4):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << numbers.integers(8)
            path.write_bytes(damaged)
            was_refused = assert_refused_or_harmless(copied, 7)
            flips, refused = flips + 1, refused + was_refused
            data, refused_data = data + is_data, refused_data + (is_data and was_refused)
        path.write_bytes(whole)
    assert flips >= 80 and data >= 40
    assert refused_data > data / 2  # these files hold little beside the numbers
    assert not assert_refused_or_harmless(copied, 7)
    assert_same_bits(restore(copied, 0).params, state(0).params)  # the other step was left alone


def test_damaged_record_of_digests_is_refused_or_harmless(copied):
    numbers = np.random.default_rng(0)
    path = copied / "7" / "meta" / "metadata"
    whole = path.read_bytes()
    refused = 0
    for place in numbers.integers(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << numbers.integers(7)
        path.write_bytes(damaged)
        refused += assert_refused_or_harmless(copied, 7)
    assert refused > 20


def test_truncated_and_missing_files_are_refused_or_harmless(copied):
    refused = 0
    for path in files(copied / "7", (*ARRAY_FILES, "meta/**/*")):
        whole = path.read_bytes()
        for size in (0, len(whole) // 2):
            path.write_bytes(whole[:size])
            refused += assert_refused_or_harmless(copied, 7)
        path.unlink()
        refused += assert_refused_or_harmless(copied, 7)
        path.write_bytes(whole)
    assert refused > 10
    assert not assert_refused_or_harmless(copied, 7)


def test_refusal_names_leaf_and_the_steps_that_remain(copied):
    """The parameters of another step in the place of these: Orbax itself sees nothing wrong."""
    shutil.rmtree(copied / "7" / "params")
    shutil.copytree(copied / "0" / "params", copied / "7" / "params")
    with pytest.raises(errors.UsageError) as caught:
        restore(copied, 7)
    assert "params/blocks/attention/key/kernel does not match its sha256" in str(caught.value)
    assert "can be tried: [0], with --restore_step=0 of qkjax.main" in str(caught.value)
    assert "--step=0 of the tools" in str(caught.value)
    shutil.rmtree(copied / "0")
    with pytest.raises(errors.UsageError, match="There is no other step: start again in another"):
        restore(copied, 7)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda meta: meta.pop("format_version"),
        lambda meta: meta.pop("opt_state"),
        lambda meta: meta.update(params=[]),
        lambda meta: meta.update(params={}),
        lambda meta: meta.update(opt_state={}),
        lambda meta: meta["params"]["embedding"].pop("sha256"),
        lambda meta: meta["params"].update(embedding=None),
        lambda meta: meta.update(format_version="1"),
    ],
)
def test_record_that_lacks_something_is_refused(spoil, copied):
    path = copied / "7" / "meta" / "metadata"
    record = json.loads(path.read_text())
    spoil(record)
    path.write_text(json.dumps(record))
    with pytest.raises(errors.UsageError, match="damaged checkpoint, meta is not the record"):
        restore(copied, 7)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").symlink_to("nowhere")
    with pytest.raises(errors.StorageError, match=r"/checkpoints: cannot be read or written"):
        checkpoint.Checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("item", ["params", "opt_state", "meta"])
def test_checkpoint_without_an_item_does_not_count(item, copied, caplog):
    shutil.rmtree(copied / "7" / item)
    (copied / "9").mkdir()  # Orbax itself would call this the latest
    reader = checkpoint.Checkpoints(copied, read_only=True)
    assert reader.steps() == [0]
    assert (copied / "9").is_dir()  # a reader moves nothing
    with pytest.raises(errors.UsageError, match=r"/7: damaged checkpoint.*can be tried: \[0\]"):
        restore(copied, 7)
    writer = checkpoint.Checkpoints(copied)
    names = sorted(path.name.rpartition("-")[0] for path in copied.iterdir())
    assert names == ["", "incomplete-7", "incomplete-9"]
    assert "an incomplete checkpoint, moved to incomplete-9" in caplog.text
    s = state(7)
    writer.save(7, s.params, s.opt_state, {})  # the name is free again
    writer.wait()
    assert writer.steps() == [0, 7]
    writer.close()


@pytest.mark.parametrize(
    ("later", "keep_all", "stays"),
    [
        ((9,), False, True),  # the run would have kept 7 beside it
        ((9, 11), False, False),
        ((9, 11), True, True),  # every step is wanted, also what is left of this one
        ((7,), True, False),  # the same step again
    ],
)
def test_what_was_set_aside_as_incomplete_goes_when_nothing_is_lost(copied, later, keep_all, stays):
    shutil.rmtree(copied / "7" / "opt_state")
    s = state(7)
    with contextlib.closing(checkpoint.Checkpoints(copied, keep_all=keep_all)) as writer:
        assert (copied / "incomplete-7-1").is_dir()
        for step in later:
            writer.save(step, s.params, s.opt_state, {})
        writer.wait()
    assert (copied / "incomplete-7-1").is_dir() == stays


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__d_ff": 40},
            "params/blocks/mlp/down/kernel is float32[2, 24, 16] in the "
            "checkpoint and float32[2, 40, 16] in this config",
        ),
        (
            {"qk_norm": "none"},
            "params/blocks/attention/key_norm/gamma is float32[2, 4] in the "
            "checkpoint and absent in this config",
        ),
        (
            {"model__mlp": "relu2"},
            "params/blocks/mlp/gate/kernel is float32[2, 16, 24] in the "
            "checkpoint and absent in this config",
        ),
        (
            {"optimizer_name": "adamw"},
            "blocks/attention/key/kernel is absent in the checkpoint "
            "and float32[2, 16, 8] in this config",
        ),
        (
            {"words": "tiny,merged"},
            "/blocks/attention is absent in the checkpoint and float32[2, 16, 48] in this config",
        ),
    ],
)
def test_another_config_is_refused_by_leaf_with_both(changes, message, saved):
    shapes = state_shapes(**changes)
    reader = checkpoint.Checkpoints(saved, read_only=True)
    with pytest.raises(errors.UsageError) as caught:
        reader.restore(7, shapes.params, shapes.opt_state)
    assert message in str(caught.value)
    assert "Use the config that the checkpoint was made with" in str(caught.value)


def test_another_dtype_is_refused_and_never_cast(saved):
    shapes = state_shapes()
    rough = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16), shapes.params)
    with pytest.raises(errors.UsageError) as caught:
        checkpoint.Checkpoints(saved, read_only=True).restore_params(7, rough)
    assert "float32[2, 16, 8] in the checkpoint and bfloat16[2, 16, 8]" in str(caught.value)


def test_newer_format_is_refused(copied):
    path = copied / "7" / "meta" / "metadata"
    record = json.loads(path.read_text())
    assert record["format_version"] == 2
    path.write_text(json.dumps({**record, "format_version": 3}))
    with pytest.raises(errors.UsageError, match=r"newer qkjax \(checkpoint format 3, .* up to 2"):
        restore(copied, 7)


@pytest.mark.parametrize(
    "change", [{"step": 6}, {"params_sha256": "0" * 64}, {"note": "another"}, {"meta_sha256": ""}]
)
def test_a_record_that_was_edited_is_refused(change, copied):
    path = copied / "7" / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(errors.UsageError, match="/7: damaged checkpoint, meta does not match"):
        restore(copied, 7)


def test_format_1_is_read_with_one_warning_and_its_digests_still_hold(copied, caplog):
    path = copied / "7" / "meta" / "metadata"
    record = {**json.loads(path.read_text()), "format_version": 1}
    del record["meta_sha256"]
    path.write_text(json.dumps(record))
    restore(copied, 7)
    assert "of checkpoint format 1" in caplog.text
    for change, message in (
        ({"step": 6}, "meta is of step 6"),
        ({"params_sha256": "0" * 64}, "params does not match params_sha256 of meta"),
    ):
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(errors.UsageError, match=f"/7: damaged checkpoint, {message}"):
            restore(copied, 7)


@pytest.mark.parametrize("item", ["params", "opt_state"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_values_that_are_not_finite_are_refused(item, bad, tmp_path):
    trees = state(7)._asdict()
    leaves, structure = jax.tree.flatten(trees[item])
    place = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[place] = np.array(leaves[place])
    leaves[place].flat[3] = bad
    trees[item] = jax.tree.unflatten(structure, leaves)
    writer = checkpoint.Checkpoints(tmp_path)
    writer.save(7, trees["params"], trees["opt_state"], {})
    writer.wait()
    writer.close()
    with pytest.raises(errors.UsageError, match=f"/7: damaged checkpoint, {item}/.* not finite"):
        restore(tmp_path, 7)


def test_metadata_of_orbax_that_cannot_be_read_is_named(copied):
    (copied / "7" / "_CHECKPOINT_METADATA").write_text("[" * 20_000 + "]" * 20_000)
    for read_only in (True, False):
        with pytest.raises(errors.UsageError, match=r"/7/_CHECKPOINT_METADATA: damaged \(Recurs"):
            checkpoint.Checkpoints(copied, read_only=read_only)


def test_what_a_kill_leaves_of_a_deletion_is_deleted(tmp_path, caplog):
    writer = checkpoint.Checkpoints(tmp_path, keep_all=True)
    for step in (0, 3, 5, 7):
        writer.save(step, state(step).params, state(step).opt_state, {})
    writer.wait()
    writer.close()
    shutil.rmtree(tmp_path / "3" / "params")
    writer = checkpoint.Checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", "5", "7"]
    assert "interrupted deletion" in caplog.text
    writer.close()


def test_what_a_killed_save_left_is_deleted_by_the_holder_alone(copied):
    left = copied / "9.orbax-checkpoint-tmp-1"
    shutil.copytree(copied / "7", left)
    assert checkpoint.Checkpoints(copied, read_only=True).steps() == [0, 7]
    assert left.is_dir()
    checkpoint.Checkpoints(copied).close()
    assert not left.exists() and (copied / "7").is_dir()


@pytest.mark.long
@pytest.mark.process
def test_two_devices_restore_the_same_bits(saved, on_devices):
    code = f"""
        import sys
        sys.path.insert(0, "tests")
        import jax
        import test_checkpoint as t
        from qkjax import sharding
        from qkjax.runs import checkpoint

        checkpoints = checkpoint.Checkpoints({str(saved)!r}, read_only=True)
        shapes = t.state_shapes()
        restored = checkpoints.restore(7, shapes.params, shapes.opt_state)
        placed = jax.device_put(restored.params, sharding.replicated(sharding.make_mesh()))
        print(jax.device_count(), checkpoint.digests(placed)[1])
    """
    expected = checkpoint.digests(state(7).params)[1]
    for devices in (2, 4):
        assert on_devices(textwrap.dedent(code), devices).split()[-2:] == [str(devices), expected]


def test_reading_writes_nothing(copied):
    def listed():
        return {path: path.stat().st_mtime_ns for path in [copied, *copied.rglob("*")]}

    before = listed()
    assert_same_bits(restore(copied, 7).params, state(7).params)
    assert listed() == before


def test_a_leaf_that_cannot_be_saved_is_said_at_once_and_spares_earlier_steps(copied):
    checkpoints = checkpoint.Checkpoints(copied)
    with pytest.raises((TypeError, AttributeError, errors.QkjaxError)):
        checkpoints.save(9, {"name": np.array(["text"])}, state(9).opt_state, {})
        checkpoints.wait()
    assert checkpoints.steps() == [0, 7]


def test_step_that_is_there_is_not_written_again(copied):
    checkpoints = checkpoint.Checkpoints(copied)
    other = state(8)
    with pytest.raises(errors.StorageError, match=r"/7: already exists, .* Move it away"):
        checkpoints.save(7, other.params, other.opt_state, {})
    checkpoints.close()
    assert_same_bits(restore(copied, 7).params, state(7).params)


def test_later_steps_are_set_aside_and_lost_to_nobody(copied):
    checkpoints = checkpoint.Checkpoints(copied)
    checkpoints.set_aside_after(7)
    assert checkpoints.steps() == [0, 7]
    checkpoints.set_aside_after(0)
    assert checkpoints.steps() == [0]
    (aside,) = copied.glob("set-aside-7-*")
    other = state(6)
    for step in (3, 7):  # both below and at the step that was there
        checkpoints.save(step, other.params, other.opt_state, {})
    checkpoints.wait()
    assert checkpoints.steps() == [0, 3, 7]
    checkpoints.close()
    assert_same_bits(restore(copied, 7).params, other.params)
    shutil.rmtree(copied / "7")
    aside.rename(copied / "7")
    assert_same_bits(restore(copied, 7).params, state(7).params)


@pytest.mark.process
def test_full_disk_is_a_storage_error_and_spares_earlier_steps(saved, tmp_path):
    """No file may grow beyond 4 kB; in a process of its own, since the limit is a process's."""
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    code = f"""
        import os, resource, sys
        sys.path.insert(0, "tests")
        import test_checkpoint as t
        from qkjax import errors
        from qkjax.runs import checkpoint

        checkpoints = checkpoint.Checkpoints({str(directory)!r})
        s = t.state(9)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            checkpoints.save(9, s.params, s.opt_state, {{}})
            checkpoints.wait()
        except errors.StorageError as error:
            print(error)
        print(checkpoints.steps(), flush=True)
        os._exit(0)  # as qkjax.main does: threads of a failed save wait for five minutes
    """
    root = pathlib.Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr[-4000:]
    message, steps = done.stdout.splitlines()
    assert message.startswith(f"{directory}: a checkpoint could not be written (")
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves((state(9).params, state(9).opt_state)))
    assert f"it needs {needed / 1e9:.3g} GB, " in message
    assert "GB are free). Sound checkpoints: [0, 7]. Make room and run the same" in message
    assert steps == "[0, 7]"
    save(directory, 9).close()  # with room again, the same step is written
    for step in (0, 7, 9):
        assert_same_bits(restore(directory, step).params, state(step).params)


def test_writes_that_end_after_the_loop_was_closed_say_nothing(tmp_path, monkeypatch):
    # As on a full disk: tensorstore's threads still end their writes, where nobody waits for them.
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)):
        for words in ("Event loop is closed", "another"):
            sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(words)))
    assert [str(unraisable.exc_value) for unraisable in shown] == ["another"]
