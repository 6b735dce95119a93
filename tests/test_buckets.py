"""Buckets: datasets read from them, datasets and exports put there, and what is refused.

The logic runs on pyarrow's interface over a folder. The last tests, marked `long`, run the commands
against servers of both protocols, which `tools/set_up_buckets.sh` installs.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import fsspec
import pytest
import random_run
import small_run
from pyarrow import fs

from qkjax import buckets, errors
from qkjax.data import check, mirror, prepare
from qkjax.data import dataset as dataset_lib
from qkjax.data import manifest as manifest_lib
from qkjax.export import directory as export_lib
from qkjax.study import plan

ROOT = pathlib.Path(__file__).resolve().parents[1]
ADDRESS = "s3://bucket/sets/mine"


class Store(fs.FSSpecHandler):
    """One bucket in a folder, which notes what is read and written and can fail at one of them."""

    def __init__(self, root: pathlib.Path) -> None:
        local = fsspec.filesystem(
            "file", auto_mkdir=True
        )  # as in a bucket, no folder is made first
        super().__init__(fsspec.filesystem("dir", path=str(root), fs=local))
        self.folder = root / ADDRESS.removeprefix("s3://")
        (root / "bucket").mkdir(parents=True)
        self.read: list[str] = []
        self.written: list[str] = []
        self.fail: Callable[[str], bool] = lambda path: False

    def _note(self, path: str, names: list[str]) -> None:
        if self.fail(path):
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7")
        names.append(path.rpartition("/")[2])

    def open_input_stream(self, path):
        stream = super().open_input_stream(path)
        self._note(path, self.read)
        return stream

    def open_output_stream(self, path, metadata):
        self._note(path, self.written)
        return super().open_output_stream(path, metadata)

    def put(self, name: str, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)

    def objects(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.glob("*")}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Store:
    handler = Store(tmp_path / "store")
    monkeypatch.setattr(buckets, "_file_system", lambda *where: fs.PyFileSystem(handler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return handler


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_run.make_dataset(tmp_path_factory.mktemp("buckets") / "data")


def quiet(line: str) -> None:
    pass


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".fetch.lock"}


def listed(dataset: pathlib.Path) -> set[str]:
    return {*manifest_lib.load(dataset).digests, "dataset.json"}


@pytest.mark.parametrize(
    "address",
    [
        "s3://",
        "s3:///x",
        "s3://key:secret@b/x",
        "s3://b//x",
        "s3://b/../x",
        "s3://b/x?y=z",
        "gs://B/x",
    ],
)
def test_an_address_is_a_bucket_and_a_folder(store, address):
    with pytest.raises(
        errors.UsageError, match=r"^data.dir: .* is no folder of a bucket, expected"
    ):
        buckets.open_folder("data.dir", address)


@pytest.mark.parametrize("address", ["s3://bucket", "gs://bucket/", "s3://bucket/a b/c-1.2/"])
def test_a_slash_at_its_end_is_nothing(store, address):
    assert buckets.open_folder("data.dir", address).address == address.rstrip("/")


def test_an_absent_bucket_is_not_an_empty_one(store):
    with pytest.raises(errors.UsageError, match=r"^--out: s3://other/x: there is no bucket other."):
        buckets.open_folder("--out", "s3://other/x")
    assert buckets.open_folder("--out", ADDRESS).names() == []


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [  # each as the library says it
        (
            "AWS Error ACCESS_DENIED during HeadObject operation: No response body.",
            2,
            "AWS_PROFILE",
        ),
        ("AWS Error INVALID_ACCESS_KEY_ID during PutObject operation: x", 2, "access is denied"),
        ("Could not create a OAuth2 access token to authenticate the request", 2, "no access"),
        ("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: x", 2, "no such object"),
        ("curlCode: 7, Could not connect\n to server", 4, "cannot be reached .* run the same"),
    ],
)
def test_errors_of_the_libraries_are_one_line_that_says_what_to_do(store, text, kind, message):
    folder = buckets.open_folder("data.dir", ADDRESS)

    def fail(path: str) -> bool:
        raise OSError(text)

    store.fail = fail
    store.put("dataset.json", b"{}")
    with pytest.raises(errors.QkjaxError, match=rf"^{ADDRESS}/dataset.json: .*{message}") as caught:
        folder.read("dataset.json")
    assert caught.value.exit_code == kind and "\n" not in str(caught.value)


def test_a_dataset_is_fetched_once_and_trained_on_as_a_local_one(store, made):
    shutil.copytree(made, store.folder)
    config = small_run.make_config(ADDRESS)
    there = dataset_lib.open_dataset(config)
    assert names(there.directory) == listed(made)  # sources.jsonl is of the machine that made it
    assert there.manifest == dataset_lib.open_dataset(small_run.make_config(made)).manifest
    check.check(there.directory, progress=quiet)
    store.read.clear()
    assert dataset_lib.open_dataset(config).directory == there.directory
    assert store.read == ["dataset.json"]


def test_another_dataset_at_the_same_address_is_another_copy(store, made, tmp_path):
    shutil.copytree(made, store.folder)
    first = mirror.local_directory("data.dir", ADDRESS, quiet)
    other = small_run.make_dataset(tmp_path / "other", seed=1)
    shutil.copytree(other, store.folder, dirs_exist_ok=True)
    second = mirror.local_directory("data.dir", ADDRESS, quiet)
    assert first != second and (first / "dataset.json").is_file()
    assert manifest_lib.load(first).fingerprint != manifest_lib.load(second).fingerprint


def test_an_interrupted_fetch_leaves_no_dataset_and_no_half_files_and_resumes(
    store, made, monkeypatch
):
    monkeypatch.setattr(buckets, "_COPIES", 1)
    shutil.copytree(made, store.folder)
    store.fail = lambda path: path.endswith("documents-validation.npz")
    with pytest.raises(errors.StorageError, match=r"documents-validation.npz: cannot be reached"):
        mirror.local_directory("data.dir", ADDRESS, quiet)
    (left,) = (pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "qkjax" / "datasets").iterdir()
    kept = names(left)
    (left / f".train.{'a' * 16}.tmp").touch()  # as a killed process leaves one
    assert kept and "dataset.json" not in kept
    assert all((left / name).read_bytes() == (made / name).read_bytes() for name in kept)
    store.fail = lambda path: False
    store.read.clear()
    assert mirror.local_directory("data.dir", ADDRESS, quiet) == left
    assert {*store.read} == listed(made) - kept | {"dataset.json"} and names(left) == listed(made)


def test_other_bytes_in_the_bucket_never_get_their_name(store, made):
    shutil.copytree(made, store.folder)
    shard = next(name for name in listed(made) if name.startswith("train-"))
    data = bytearray((made / shard).read_bytes())
    data[-1] ^= 1
    store.put(f"{shard}", bytes(data))
    with pytest.raises(errors.UsageError, match=rf"^{ADDRESS}/{shard}: expected sha256 "):
        mirror.local_directory("data.dir", ADDRESS, quiet)
    (left,) = (pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "qkjax" / "datasets").iterdir()
    assert not names(left) & {shard, "dataset.json"}
    assert not list(left.glob(".*.tmp"))


def test_a_copy_that_was_damaged_is_named_and_one_that_lost_files_is_completed(store, made):
    shutil.copytree(made, store.folder)
    config = small_run.make_config(ADDRESS)
    folder = dataset_lib.open_dataset(config).directory
    (shard,) = folder.glob("train-*")
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[:-1])
    (folder / "tokenizer.json").unlink()
    dataset_lib.open_dataset(config)
    assert shard.read_bytes() == bytes(data)
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        errors.UsageError, match=rf"^{shard}: expected sha256 .*Remove {folder} and"
    ):
        dataset_lib.open_dataset(config)


def test_of_several_processes_one_fetches(store, made):
    shutil.copytree(made, store.folder)
    started = threading.Barrier(3)

    def ask() -> None:
        started.wait()
        mirror.local_directory("data.dir", ADDRESS, quiet)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(store.read)) == sorted(listed(made))
    assert len(store.read) == len(listed(made)) + 2  # each asked for dataset.json


@pytest.mark.parametrize("found", [None, b"{", b"[]", b"{}"])
def test_a_folder_without_a_sound_manifest_is_no_dataset(store, found):
    if found is not None:
        store.put("dataset.json", found)
    with pytest.raises(errors.UsageError, match=ADDRESS) as caught:
        dataset_lib.open_dataset(small_run.make_config(ADDRESS))
    assert "\n" not in str(caught.value)
    assert not (pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "qkjax").exists()


def request_of(made: pathlib.Path, **fields) -> prepare.Request:
    values = {
        "sources": (f"jsonl:{made.parent}/{made.name}.jsonl",),
        "tokenizer": f"train:{small_run.VOCABULARY}",
        "sequence_length": small_run.LENGTH,
        "train_tokens": 160 * small_run.LENGTH,
        "validation_tokens": 7 * small_run.LENGTH,
    }
    return prepare.Request(**{**values, **fields})


def test_prepare_puts_the_same_dataset_into_a_bucket_its_manifest_last(store, made, monkeypatch):
    monkeypatch.setattr(buckets, "_COPIES", 1)
    request, lines = request_of(made), []
    store.fail = lambda path: path.endswith("documents-validation.npz")
    with pytest.raises(errors.StorageError, match=rf"^{ADDRESS}/documents-validation.npz: cannot"):
        prepare.prepare(request, ADDRESS, progress=quiet)
    assert store.objects() and "dataset.json" not in store.objects()
    store.fail = lambda path: False
    manifest = prepare.prepare(request, ADDRESS, progress=lines.append)
    assert manifest.fingerprint == manifest_lib.load(made).fingerprint
    assert store.written[-1] == "dataset.json" and {*store.objects()} == listed(made)
    assert any("already complete" in line for line in lines)  # what was made was kept
    again = dataset_lib.open_dataset(small_run.make_config(ADDRESS))
    assert again.manifest == manifest and manifest.name == "mine"

    store.written.clear()
    for _ in range(2):  # from what the cache still holds, and on another machine
        prepare.prepare(request, ADDRESS, progress=lines.append)
        assert lines[-1] == f"{ADDRESS}: already complete, nothing to do" and not store.written
        shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    with pytest.raises(errors.UsageError, match=rf"^{ADDRESS}: holds another dataset"):
        prepare.prepare(request_of(made, end_of_text=False), ADDRESS, progress=quiet)


def test_prepare_refuses_a_folder_that_holds_other_objects_before_it_works(store, made, tmp_path):
    store.put("notes.txt", b"mine")
    with pytest.raises(errors.UsageError, match=rf"^{ADDRESS}: holds other objects \(notes.txt\)"):
        prepare.prepare(request_of(made), ADDRESS, progress=quiet)
    assert not (tmp_path / "cache").exists() and not store.written


def test_prepare_does_not_complete_the_remains_of_another_dataset(store, made):
    store.put("train-00000-of-00007.array_record", b"x")
    with pytest.raises(errors.UsageError, match=r"holds other objects .train-00000-of-00007"):
        prepare.prepare(request_of(made), ADDRESS, progress=quiet)
    assert not store.written


@pytest.fixture(scope="module")
def run(made: pathlib.Path) -> pathlib.Path:
    workdir = made.parent / "run"
    random_run.make(workdir, made)
    return workdir


def test_an_export_is_copied_whole_and_never_over_another(store, run, monkeypatch, tmp_path):
    monkeypatch.setattr(buckets, "_COPIES", 1)
    request = export_lib.Request(run, pathlib.Path("unused"))
    local = tmp_path / "local"
    export_lib.export(export_lib.Request(run, local), quiet)
    store.fail = lambda path: path.endswith("model.safetensors")
    with pytest.raises(errors.StorageError, match=rf"^{ADDRESS}/model.safetensors: cannot be"):
        export_lib.export_to_bucket(request, ADDRESS, quiet)
    assert "config.json" not in store.objects()
    store.fail = lambda path: False
    lines: list[str] = []
    export_lib.export_to_bucket(request, ADDRESS, lines.append)
    assert store.written[-1] == "config.json" and all(line.startswith(ADDRESS) for line in lines)
    assert store.objects() == {path.name: path.read_bytes() for path in local.iterdir()}
    store.written.clear()
    for address in (ADDRESS, "s3://bucket/sets"):
        with pytest.raises(
            errors.UsageError, match=rf"^--out: {address} already holds .*config.json"
        ):
            export_lib.export_to_bucket(request, address, quiet)
    assert not store.written


def test_an_export_that_fails_its_verification_is_not_copied(store, run, monkeypatch):
    class Verdict:
        failed = ("logits",)

        def table(self) -> list[str]:
            return ["**FAILED**"]

    monkeypatch.setattr(export_lib.verify, "require_torch", lambda: None)
    monkeypatch.setattr(export_lib.verify, "verify", lambda *given: Verdict())
    request = export_lib.Request(run, pathlib.Path("unused"), verify_sequences=1)
    with pytest.raises(errors.UsageError, match=rf"^{ADDRESS}: verification failed: logits"):
        export_lib.export_to_bucket(request, ADDRESS, quiet)
    assert not store.objects()


def test_a_run_opens_its_dataset_in_the_bucket(store, made, run):
    from qkjax.trained import trained_run

    shutil.copytree(made, store.folder)
    opened = trained_run.open_run(run, data_dir=ADDRESS)
    assert opened.dataset.directory != made and opened.tokenizer.vocab_size == small_run.VOCABULARY
    with pytest.raises(errors.UsageError, match=r"^--data_dir: s3://bucket/none holds no dataset"):
        trained_run.open_run(run, data_dir="s3://bucket/none")


def test_a_study_hands_the_address_to_its_runs_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan._absolute(ADDRESS) == ADDRESS
    assert plan._absolute("data") == str(tmp_path / "data")


# --------------------------------------------------------------------------------------------
# Against servers, as processes of their own.

SERVERS = ROOT / ".venv-buckets" / "bin"
needs_servers = pytest.mark.skipif(
    not SERVERS.is_dir(), reason="no servers here: bash tools/set_up_buckets.sh installs them"
)


class Server:
    """One store with one bucket, called `bucket`; `environment` leads to it."""

    def __init__(self, scheme: str, port: int) -> None:
        self.scheme, self.port = scheme, port
        self.environment = self.at(port)

    def at(self, port: int) -> dict[str, str]:
        where = f"http://127.0.0.1:{port}"
        if self.scheme == "gs":
            return {"CLOUD_STORAGE_EMULATOR_ENDPOINT": where}
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        return {"AWS_ENDPOINT_URL": where, "AWS_EC2_METADATA_DISABLED": "true", **keys}

    def make_bucket(self) -> None:
        where = f"127.0.0.1:{self.port}"
        if self.scheme == "gs":
            system = fs.GcsFileSystem(
                anonymous=True, scheme="http", endpoint_override=where, project_id="tests"
            )
        else:
            system = fs.S3FileSystem(
                access_key="key",
                secret_key="secret",
                scheme="http",
                endpoint_override=where,
                region="us-east-1",
                allow_bucket_creation=True,
            )
        system.create_dir("bucket")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(params=["s3", "gs"])
def server(request, tmp_path, monkeypatch) -> Iterator[Server]:
    port = free_port()
    command = {
        "s3": ["moto_server", "-H", "127.0.0.1", "-p", str(port)],
        "gs": [
            "gcp-storage-emulator",
            "start",
            "--host=127.0.0.1",
            f"--port={port}",
            "--in-memory",
        ],
    }[request.param]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [SERVERS / command[0], *command[1:]], stdout=log, stderr=log, cwd=tmp_path
        )
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        assert process.poll() is None, (tmp_path / "server.log").read_text()
        found = Server(request.param, port)
        found.make_bucket()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found
    finally:
        process.kill()
        process.wait()


def qkjax(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qkjax.commands", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout if code == 0 else done.stderr


@needs_servers
@pytest.mark.process
@pytest.mark.long
def test_commands_work_on_a_server_of_the_protocol(server, made, run, tmp_path):
    address = f"{server.scheme}://bucket/sets/mine"
    options = [
        f"--source=jsonl:{made.parent}/{made.name}.jsonl",
        f"--tokenizer=train:{small_run.VOCABULARY}",
        f"--sequence_length={small_run.LENGTH}",
        f"--train_tokens={160 * small_run.LENGTH}",
        f"--validation_tokens={7 * small_run.LENGTH}",
        "--workers=1",
        f"--out={address}",
    ]
    assert f"{address}: complete" in qkjax("prepare", *options)
    assert f"{address}: already complete, nothing to do" in qkjax("prepare", *options)
    folder = buckets.open_folder("--out", address)
    assert {*folder.names()} == listed(made)
    files = set(folder.names()) - {"dataset.json"}
    assert all(folder.read(name) == (made / name).read_bytes() for name in files)
    assert "mine: sound" in qkjax("check", address)

    there = dataset_lib.open_dataset(small_run.make_config(address))  # as a run opens it
    assert names(there.directory) == listed(made)

    out = f"{server.scheme}://bucket/exports/mine"
    flags = [f"--workdir={run}", f"--data_dir={address}"]
    assert f"{out}: copied" in qkjax("export", *flags, f"--out={out}")
    qkjax("export", *flags, f"--out={tmp_path / 'local'}")
    exported = buckets.open_folder("--out", out)
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert {name: exported.read(name) for name in exported.names()} == local
    said = qkjax("export", *flags, f"--out={out}", code=2)
    assert said.startswith(f"ERROR: --out: {out} already holds ")

    said = qkjax("check", f"{server.scheme}://other/x", code=2)
    assert said == (
        f"ERROR: DIR: {server.scheme}://other/x: there is no bucket other. "
        "Make it, or fix its name.\n"
    )


class Line:
    """Passes bytes on to a server, and is cut after a number of bytes of its answers."""

    def __init__(self, port: int, budget: int) -> None:
        self.target, self.budget = port, budget
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                ends = client, socket.create_connection(("127.0.0.1", self.target))
                for source, sink in (ends, ends[::-1]):
                    threading.Thread(
                        target=self._pass_on, args=(source, sink, sink is client), daemon=True
                    ).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(1 << 12):
                if counted:
                    self.budget -= len(block)
                    if self.budget < 0:
                        break
                sink.sendall(block)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@needs_servers
@pytest.mark.process
@pytest.mark.long
def test_a_line_that_breaks_midway_leaves_nothing_half_and_the_next_command_resumes(
    server, made, monkeypatch, tmp_path
):
    monkeypatch.setattr(buckets, "_COPIES", 1)
    monkeypatch.setattr(buckets, "_RETRY", buckets.datetime.timedelta(seconds=2))
    address = f"{server.scheme}://bucket/sets/mine"
    prepare.prepare(request_of(made), address, progress=quiet)
    sizes = sorted((made / name).stat().st_size for name in listed(made))
    shutil.rmtree(tmp_path / "cache")
    line = Line(server.port, sum(sizes[:-1]))  # the largest file cannot pass
    for name, value in server.at(line.port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.StorageError, match=r"cannot be reached .*run the same command"):
        mirror.local_directory("data.dir", address, quiet)
    (left,) = (tmp_path / "cache" / "qkjax" / "datasets").iterdir()
    assert "dataset.json" not in names(left)
    assert all((left / n).read_bytes() == (made / n).read_bytes() for n in names(left))
    kept = len(names(left))
    line.budget = 1 << 30
    lines: list[str] = []
    assert mirror.local_directory("data.dir", address, lines.append) == left
    assert f"fetching {len(listed(made)) - 1 - kept} files" in lines[0]
    check.check(left, progress=quiet)
