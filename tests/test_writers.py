"""What a run writes as it goes: metrics.jsonl, event files, npz; and what happens on failure."""

import inspect
import json
import os
import pathlib
import resource
import subprocess
import sys
import zipfile
import zlib

import jax.numpy as jnp
import limits
import numpy as np
import pytest

from qkjax import errors, files
from qkjax.runs import spectra_images, tensorboard, writers
from qkjax.runs.directory import RunDirectory

FULL = pathlib.Path("/dev/full")
STAGES = ("pre_rope_centred", "post_rope_raw")
needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this machine")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def jsonl_with(path, steps, **scalars):
    writer = writers.JsonlWriter(path)
    for step in steps:
        writer.write_scalars(step, {"tokens": 2048 * step, **scalars})
    writer.close()


def read_events(directory):
    """Every scalar of TensorBoard's own reader: {(tag, step): [values]}."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="TensorBoard's reader is not installed",
    )
    reader = event_accumulator.EventAccumulator(
        str(directory), size_guidance=dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
    )
    reader.Reload()
    found = {}
    for tag in reader.Tags()["scalars"]:
        for event in reader.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return reader, found


def expected_events(path):
    """What these are to be: each number of metrics.jsonl once, as float32."""
    return {
        (tag, row["step"]): [float(np.float32(value))]
        for row in rows_of(path)
        for tag, value in row.items()
        if tag != "step" and value is not None
    }


# ------------------------------------------------------------------------------ metrics.jsonl


def test_rows_have_step_first_null_for_non_finite_and_short_float32(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = writers.JsonlWriter(path)
    writer.write_scalars(0, {"tokens": 0, "val/loss": np.float32(0.1)})
    writer.write_scalars(
        np.int64(1), {"a": jnp.float32(1e-7), "b": float("nan"), "c": jnp.inf, "d": None, "e": 0.1}
    )
    # Readable at once by a process that follows the file.
    assert path.read_text() == (
        '{"step": 0, "tokens": 0, "val/loss": 0.1}\n'
        '{"step": 1, "a": 1e-07, "b": null, "c": null, "d": null, "e": 0.1}\n'
    )
    assert writer.last_row() == {"step": 1, "a": 1e-7, "b": None, "c": None, "d": None, "e": 0.1}
    writer.close()
    writer.close()
    assert RunDirectory(path.parent).read_metrics() == rows_of(path)


def test_a_step_is_written_once_and_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = writers.JsonlWriter(path)
    writer.write_scalars(3, {"a": 1})
    for step in (3, 2):
        with pytest.raises(ValueError, match=f"row of step {step} after one of step 3"):
            writer.write_scalars(step, {"a": 2})
    with pytest.raises(ValueError, match="named `step`"):
        writer.write_scalars(4, {"step": 4})
    with pytest.raises(TypeError, match="neither a number"):
        writer.write_scalars(4, {"a": np.zeros(3)})
    writer.write_scalars(4, {"a": 2})
    writer.close()
    assert rows_of(path) == [{"step": 3, "a": 1}, {"step": 4, "a": 2}]


@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "tok', b"\0\0\0\0"])
@pytest.mark.parametrize("resume_step", [-1, 0, 2, 4])
def test_resume_cuts_later_rows_and_keeps_the_bytes_of_the_others(tmp_path, resume_step, torn):
    unbroken, path = tmp_path / "unbroken.jsonl", tmp_path / "metrics.jsonl"
    jsonl_with(unbroken, range(8), loss=np.float32(0.3))
    jsonl_with(path, range(5), loss=np.float32(0.3))
    with open(path, "ab") as file:
        file.write(torn)
    writer = writers.JsonlWriter(path, resume_step)
    assert len(rows_of(path)) == resume_step + 1
    last = writer.last_row()
    assert (last["step"] if last else -1) == resume_step
    for step in range(resume_step + 1, 8):
        writer.write_scalars(step, {"tokens": 2048 * step, "loss": np.float32(0.3)})
    writer.close()
    assert path.read_bytes() == unbroken.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "unbroken.jsonl"]


def test_a_last_row_without_its_newline_is_kept_and_gets_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    writer = writers.JsonlWriter(path, 1)
    writer.write_scalars(2, {})
    writer.close()
    assert rows_of(path) == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_torn_and_missing_rows_are_warned_of(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    jsonl_with(path, range(3))
    writers.JsonlWriter(path, 2).close()
    assert not caplog.records
    writers.JsonlWriter(path, 6).close()
    assert "last row is of step 2, the checkpoint of step 6: rows are missing" in caplog.text
    with open(path, "a") as file:
        file.write('{"step')
    writers.JsonlWriter(path, 2).close()
    assert "metrics.jsonl:4: a torn last line" in caplog.text


def test_damaged_middle_line_is_refused_and_nothing_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 0}\n{"ste\n{"step": 2}\n'
    path.write_text(text)
    with pytest.raises(errors.UsageError, match=r"metrics\.jsonl:2: "):
        writers.JsonlWriter(path, 0)
    assert path.read_text() == text


def test_cutting_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    jsonl_with(path, range(5))
    before = path.read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        writers.JsonlWriter(path, 2)
    assert path.read_bytes() == before


def test_rewrite_last_replaces_one_row_atomically_and_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    jsonl_with(path, range(3))
    first_rows = path.read_bytes().splitlines(keepends=True)[:2]
    writer = writers.JsonlWriter(path, 2)
    with pytest.raises(ValueError, match="1 is not the step of the last row"):
        writer.rewrite_last({"step": 1})
    merged = {**writer.last_row(), "val/loss": np.float32(0.7)}
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(errors.StorageError):
            writer.rewrite_last(merged)
    assert rows_of(path)[-1] == {"step": 2, "tokens": 4096}
    writer.rewrite_last(merged)
    assert rows_of(path)[-1] == {"step": 2, "tokens": 4096, "val/loss": 0.7} == writer.last_row()
    assert path.read_bytes().splitlines(keepends=True)[:2] == first_rows
    writer.write_scalars(3, {})
    writer.close()
    assert [row["step"] for row in rows_of(path)] == [0, 1, 2, 3]


def test_flush_brings_rows_to_the_disk(tmp_path, monkeypatch):
    synced = []
    writer = writers.JsonlWriter(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    writer.write_scalars(0, {})
    assert not synced
    writer.flush()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_ino]
    writer.close()


def test_path_that_is_a_directory_is_a_storage_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(errors.StorageError, match=r"metrics\.jsonl"):
        writers.JsonlWriter(tmp_path / "metrics.jsonl")


# ------------------------------------------------------------------------------ the disk is full


@needs_dev_full
def test_full_disk_is_a_storage_error_after_the_others_wrote(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(FULL)
    writer = writers.create_run_writer(tmp_path)
    for step in (1, 2):  # never silenced
        with pytest.raises(errors.StorageError, match=r"metrics\.jsonl: .*No space left"):
            writer.write_row({"step": step, "train/loss": 2.5})
        with pytest.raises(errors.StorageError):
            writer.flush()
    assert isinstance(writer.errors()["JsonlWriter"], OSError)
    with pytest.raises(errors.StorageError):
        writer.close()
    assert set(read_events(tmp_path)[1]) == {("train/loss", 1), ("train/loss", 2)}


def test_row_cut_short_by_a_full_disk_is_skipped_by_readers_and_completed_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = writers.JsonlWriter(path)
    writer.write_scalars(0, {"tokens": 0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            writer.write_scalars(1, {"tokens": 2048})
        torn = path.read_bytes()
        seen = RunDirectory(path.parent).read_metrics()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torn == b'{"step": 0, "tokens": 0}\n{"step": 1'
    assert seen == [{"step": 0, "tokens": 0}]
    writer.write_scalars(2, {"tokens": 4096})  # there is room again
    writer.close()
    assert [row["step"] for row in rows_of(path)] == [0, 1, 2]


class Failing:
    """A writer whose every call fails."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __getattr__(self, name):
        def call(*_, **__):
            self.calls += 1
            raise self.error

        return call


class Noting:
    """A writer that notes every call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments, **keywords: self.calls.append((name, arguments, keywords))


@pytest.mark.parametrize("error", [OSError("no space"), TypeError("a bug"), RuntimeError("torn")])
def test_one_failing_writer_loses_nothing_and_warns_once(tmp_path, caplog, error):
    failing, noting = Failing(error), Noting()
    jsonl = writers.JsonlWriter(tmp_path / "metrics.jsonl")
    writer = writers.CompositeWriter(jsonl, [failing, noting])
    assert writer.errors() == {}
    for step in range(3):
        writer.write_scalars(step, {"a": step})
    writer.write_images(3, {"t": 0})
    writer.close()
    assert len(rows_of(jsonl.path)) == 3
    assert [call[0] for call in noting.calls] == ["write_scalars"] * 3 + ["write_images", "close"]
    assert failing.calls == 5  # it may recover
    assert writer.errors() == {"Failing": error}
    assert len([r for r in caplog.records if "Failing failed" in r.getMessage()]) == 1
    assert repr(error) in caplog.text


def test_a_mistake_of_the_caller_is_not_called_a_disk_error(tmp_path):
    noting = Noting()
    jsonl = writers.JsonlWriter(tmp_path / "metrics.jsonl")
    writer = writers.CompositeWriter(jsonl, [noting])
    writer.write_scalars(1, {})
    with pytest.raises(ValueError, match="row of step 1 after"):
        writer.write_scalars(1, {})
    assert len(noting.calls) == 2
    writer.close()


def test_an_interrupt_is_no_writer_error(tmp_path):
    jsonl = writers.JsonlWriter(tmp_path / "metrics.jsonl")
    writer = writers.CompositeWriter(jsonl, [Failing(KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        writer.write_scalars(1, {})
    jsonl.close()


# --------------------------------------------------------------------------------- TensorBoard


def test_composite_passes_on_what_some_writer_writes_and_drops_the_rest(tmp_path):
    noting = Noting()
    writer = writers.CompositeWriter(writers.JsonlWriter(tmp_path / "metrics.jsonl"), [noting])
    dropped = [
        ("write_summaries", (1, {"s": 0}, None), {}),
        ("write_videos", (1, {"v": 0}), {}),
        ("write_audios", (1, {"u": 0}), {"sample_rate": 8}),
        ("write_texts", (1, {"t": ""}), {}),
        ("write_histograms", (1, {"h": 0}, {"h": 3}), {}),
    ]
    calls = [
        ("write_scalars", (1, {"a": 0}), {}),
        ("write_images", (1, {"i": 0}), {}),
        ("write_hparams", ({"p": 1},), {}),
        ("flush", (), {}),
        ("close", (), {}),
    ]
    for name, arguments, keywords in (*dropped, *calls):
        getattr(writer, name)(*arguments, **keywords)
    assert noting.calls == calls
    assert {name for name, *_ in (*dropped, *calls)} == tensorboard.MetricWriter.__abstractmethods__
    assert writer.errors() == {}


def test_tensorboard_writer_fulfils_the_interface_of_clu():
    # A virtual subclass: nothing else holds it to the interface.
    assert issubclass(tensorboard.SummaryWriter, tensorboard.MetricWriter)
    for name in tensorboard.MetricWriter.__abstractmethods__:
        ours = inspect.signature(getattr(tensorboard.SummaryWriter, name)).parameters
        clus = inspect.signature(getattr(tensorboard.MetricWriter, name)).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in clus.values()
        ]


@pytest.mark.process
def test_clus_own_writers_work_without_tensorflow(tmp_path):
    program = (
        "import sys\n"
        "from qkjax.runs import tensorboard\n"
        "from clu import metric_writers, periodic_actions\n"
        "writer = metric_writers.create_default_writer(sys.argv[1])\n"
        "writer.write_scalars(7, {'loss': 1.5})\n"
        "writer.flush(); writer.close()\n"
        "assert metric_writers.SummaryWriter is tensorboard.SummaryWriter\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert read_events(tmp_path)[1] == {("loss", 7): [1.5]}


def test_tensorboard_reads_every_scalar_of_metrics_jsonl(tmp_path):
    generator = np.random.default_rng(0)
    writer = writers.create_run_writer(tmp_path)
    writer.write_hparams({"seed": 42})
    for step in range(200):
        row = {"step": step, "tokens": step * 65_536, "train/loss": generator.normal()}
        if step % 50 == 0:
            row |= {"val/loss": jnp.float32(1 / 3), "pr/key/post_rope/raw": np.float32(21.7)}
            row |= {"perf/mfu": None}
        writer.write_row(row)
    writer.write_row({"step": 200, "train/loss": float("nan")})
    writer.close()
    found = read_events(tmp_path)[1]
    assert np.isnan(found.pop(("train/loss", 200))).all()
    expected = expected_events(tmp_path / "metrics.jsonl")
    assert len(expected) == 200 * 2 + 4 * 2
    assert found == expected
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"perf/mfu" not in events.read_bytes()  # a null is no event


def cut_tail(directory, num_bytes):
    newest = max(directory.glob("events.out.tfevents.*"))
    newest.write_bytes(newest.read_bytes()[:-num_bytes])


def test_resumes_leave_each_scalar_once_even_behind_torn_event_files(tmp_path):
    def run(resume_step, last_step, evaluate_resumed):
        writer = writers.create_run_writer(tmp_path, resume_step)
        if evaluate_resumed:
            writer.write_row({**writer.last_row(), "val/loss": 0.25})
        for step in range(resume_step + 1, last_step + 1):
            writer.write_row({"step": step, "train/loss": step + resume_step / 100})
        writer.close()

    run(-1, 12, False)
    cut_tail(tmp_path, 7)  # killed in the middle of a record
    run(10, 15, True)
    run(10, 11, False)  # the row of step 10 has its evaluation; both within one second
    cut_tail(tmp_path, 3)
    run(-1, 4, False)
    run(4, 9, True)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 5
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(10))
    assert rows[4] == {"step": 4, "train/loss": 3.99, "val/loss": 0.25}
    assert rows[9]["train/loss"] == 9.04
    assert read_events(tmp_path)[1] == expected_events(tmp_path / "metrics.jsonl")


@pytest.mark.process
def test_killed_at_any_moment_the_files_continue_as_if_unbroken(tmp_path):
    program = (
        "import pathlib, sys\n"
        "from qkjax.runs import writers\n"
        "writer = writers.create_run_writer(sys.argv[1])\n"
        "for step in range(10**9):\n"
        "    writer.write_row({'step': step, **{f'metric/{i}': step / 7 + i for i in range(20)}})\n"
        "    if step % 40 == 0:\n"
        "        writer.flush()\n"
        "        print(step, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    flushed = [int(process.stdout.readline()) for _ in range(6)]
    process.kill()
    process.wait()
    process.stdout.close()
    seen = RunDirectory(tmp_path).read_metrics()
    assert [row["step"] for row in seen] == list(range(len(seen)))
    assert len(seen) > flushed[-1] == 200
    writer = writers.create_run_writer(tmp_path, 200)
    for step in range(201, 240):
        writer.write_row({"step": step, **{f"metric/{i}": step / 7 + i for i in range(20)}})
    writer.close()
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert rows == [
        {"step": step, **{f"metric/{i}": step / 7 + i for i in range(20)}} for step in range(240)
    ]
    assert read_events(tmp_path)[1] == expected_events(tmp_path / "metrics.jsonl")


def test_a_resumed_row_may_be_written_again_only_as_the_first_row(tmp_path):
    jsonl_with(tmp_path / "metrics.jsonl", range(3))
    writer = writers.create_run_writer(tmp_path, 1)
    writer.write_row(writer.last_row())  # nothing new
    writer.write_row({**writer.last_row(), "val/loss": 0.5})
    assert writer.last_row() == {"step": 1, "tokens": 2048, "val/loss": 0.5}
    writer.write_row({"step": 2})
    for step in (1, 2):
        with pytest.raises(ValueError, match=f"row of step {step} after one of step 2"):
            writer.write_row({"step": step})
    writer.close()
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_new_names_of_a_resumed_row_reach_tensorboard_before_the_row_has_them(
    tmp_path, monkeypatch
):
    jsonl_with(tmp_path / "metrics.jsonl", range(2))
    writer = writers.create_run_writer(tmp_path, 1)

    def killed(row):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.jsonl, "rewrite_last", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.write_row({"step": 1, "tokens": 2048, "val/loss": 0.5})
    assert read_events(tmp_path)[1] == {("val/loss", 1): [0.5]}
    writer.jsonl.close()


def test_tensorboard_reads_hparams_and_images(tmp_path):
    writer = tensorboard.SummaryWriter(tmp_path)
    writer.write_hparams(
        {"lr": 0.5, "arm": "muon_qk", "frozen": True, "none": None, "steps": (0, 9)}
    )
    pixels = np.arange(2 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 5, 7, 3)
    writer.write_images(4, {"batch": pixels, "one": pixels[0, :, :, :1] / 255})
    writer.close()
    reader, _ = read_events(tmp_path)
    from tensorboard.plugins.hparams import metadata

    content = reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(content).hparams
    assert {name: value.WhichOneof("kind") for name, value in hparams.items()} == {
        "lr": "number_value",
        "arm": "string_value",
        "frozen": "bool_value",
        "steps": "string_value",
    }
    assert hparams["lr"].number_value == 0.5 and hparams["arm"].string_value == "muon_qk"
    assert sorted(reader.Tags()["images"]) == ["batch/0", "batch/1", "one"]
    (image,) = reader.Images("batch/1")
    assert (image.step, image.height, image.width) == (4, 5, 7)
    assert decode_png(image.encoded_image_string).tolist() == pixels[1].tolist()
    (grey,) = reader.Images("one")
    assert decode_png(grey.encoded_image_string).tolist() == pixels[0, :, :, :1].tolist()


def decode_png(data):
    """Pixels of a PNG without filters, checking every chunk."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    position, chunks = 8, {}
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        body = data[position + 8 : position + 8 + length]
        crc = int.from_bytes(data[position + 8 + length : position + 12 + length], "big")
        assert crc == zlib.crc32(name + body)
        chunks[name] = body
        position += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height = (int.from_bytes(chunks[b"IHDR"][i : i + 4], "big") for i in (0, 4))
    depth, colour_type, *rest = chunks[b"IHDR"][8:]
    assert depth == 8 and rest == [0, 0, 0]
    channels = {0: 1, 2: 3, 6: 4}[colour_type]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, channels)


def test_images_of_spectra_show_each_head_by_the_logarithm():
    sigma = np.zeros((2, 3, 4), np.float32)  # layers, heads, directions
    sigma[0, 0] = 50, 5, 0.5, 0.005  # 0, 1, 2 and 4 decades below the first
    sigma[0, 1] = 2
    sigma[1, 2] = np.nan
    arrays = {f"{side}_{name}": sigma for side in ("key", "query") for name in STAGES}
    images = spectra_images.of_evaluation(arrays)
    assert sorted(images) == [
        f"spectra/{side}/{name}"
        for side in ("key", "query")
        for name in ("post_rope/raw", "pre_rope/centred")
    ]
    image = images["spectra/query/post_rope/raw"]
    assert image.shape == (2 * 3 * 8 + 2, 4 * 4, 1) and image.dtype == np.uint8
    cells = np.concatenate([image[:24], image[26:]])[4::8, 2::4, 0]
    assert cells[0].tolist() == [255, 170, 85, 0] and cells[1].tolist() == [255] * 4
    assert (cells[2:] == 0).all() and (image[24:26] == 255).all()


def test_what_is_no_image_is_refused(tmp_path):
    writer = tensorboard.SummaryWriter(tmp_path)
    with pytest.raises(ValueError, match="shape"):
        writer.write_images(0, {"a": np.zeros((4, 4))})
    writer.close()


def test_event_files_are_read_in_the_order_of_starts_whatever_the_clock_says(tmp_path, monkeypatch):
    import time

    for i, seconds in enumerate((2_000_000_000.0, 1_900_000_000.0, 2_000_000_000.5)):
        monkeypatch.setattr(time, "time", lambda now=seconds: now)
        writer = tensorboard.SummaryWriter(tmp_path, resume_step=-1)
        writer.write_scalars(1, {"start": i})
        writer.close()
    assert read_events(tmp_path)[1] == {("start", 1): [2.0]}


def test_tensorboard_is_flushed_now_and_then_without_being_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "_FLUSH_SECONDS", 0.0)
    writer = tensorboard.SummaryWriter(tmp_path)
    writer.write_scalars(1, {"a": 2})
    assert read_events(tmp_path)[1] == {("a", 1): [2.0]}
    writer.close()


def test_without_tensorboardx_metrics_are_written_with_one_note(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # what an import of it then raises
    writer = writers.create_run_writer(tmp_path)
    writer.write_row({"step": 0, "a": 1})
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 0, "a": 1}]
    assert len(caplog.records) == 1
    assert "pip install tensorboardX" in caplog.text


@needs_dev_full
def test_metrics_are_written_where_the_event_file_cannot_be(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tensorboard, "_next_event_file", lambda _: FULL)
    writer = writers.create_run_writer(tmp_path)
    writer.write_row({"step": 0, "a": 1})
    writer.close()
    assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 0, "a": 1}]
    assert "no TensorBoard files" in caplog.text and "No space left" in caplog.text


# ------------------------------------------------------------------------------------- arrays


def test_arrays_are_float32_or_integers_and_need_no_pickle(tmp_path):
    path = tmp_path / "spectra" / "step_00000100.npz"
    arrays = {
        "key": jnp.ones((2, 3), jnp.bfloat16) / 3,
        "wide": np.linspace(0, 1, 5),
        "count": np.array([1, 2], np.int32),
        "num_tokens": np.int64(7),
        "nan": np.array([np.nan], np.float32),
    }
    files.write_arrays(path, arrays)
    with np.load(path, allow_pickle=False) as stored:
        assert set(stored) == set(arrays)
        kinds = {name: stored[name].dtype.name for name in stored}
        np.testing.assert_array_equal(stored["wide"], np.linspace(0, 1, 5).astype(np.float32))
        np.testing.assert_array_equal(stored["key"], np.asarray(arrays["key"], np.float32))
        assert stored["num_tokens"] == 7 and np.isnan(stored["nan"]).all()
    assert kinds == {
        "key": "float32",
        "wide": "float32",
        "count": "int32",
        "num_tokens": "int64",
        "nan": "float32",
    }
    for wrong in (np.array([{}]), "text", np.array([1j])):
        with pytest.raises(TypeError, match="wrong has dtype"):
            files.write_arrays(path, {"wrong": wrong})


def test_equal_arrays_give_equal_bytes_at_any_time(tmp_path, monkeypatch):
    import time

    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    files.write_arrays(one, {"a": np.arange(3.0), "b": np.arange(4)})
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(2_000_000_000))
    files.write_arrays(two, {"b": np.arange(4), "a": np.arange(3.0)})
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as members:
        assert {member.date_time for member in members.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@needs_dev_full
def test_arrays_on_a_full_disk_leave_the_old_file(tmp_path):
    path = tmp_path / "final.npz"
    files.write_arrays(path, {"a": np.arange(3)})
    with (
        limits.file_size(4096),
        pytest.raises(errors.StorageError, match=r"final\.npz: .*File too large.* Make room"),
    ):
        files.write_arrays(path, {"a": np.zeros(100_000)})
    with np.load(path, allow_pickle=False) as stored:
        assert stored["a"].tolist() == [0, 1, 2]
