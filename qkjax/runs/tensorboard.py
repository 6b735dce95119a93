"""TensorBoard event files without TensorFlow, and CLU's writers without TensorFlow.

`clu.metric_writers` always imports its own TensorFlow writer. So this module puts
its `SummaryWriter` in that place before the first import; then the interface, CLU's other writers
and `create_default_writer` work. Import this module before `clu.metric_writers`.
"""

import os
import pathlib
import socket
import struct
import sys
import time
import types
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_FLUSH_SECONDS = 10.0  # a kill loses at most this much of what TensorBoard shows
_REPLACED = "clu.metric_writers.summary_writer"


class ScalarsOnly:
    """The kinds of CLU's MetricWriter that nothing here writes: accepted, and not written."""

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Does nothing."""

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Does nothing."""

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Does nothing."""

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Does nothing."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Does nothing."""

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Does nothing."""


class SummaryWriter(ScalarsOnly):
    """CLU's MetricWriter (a virtual subclass) that appends a new event file to a directory.

    It writes in the caller's thread, so that a full disk raises where it is met (tensorboardX's own
    writer loses such errors in a thread). Needs tensorboardX, for the protocol buffers.
    """

    def __init__(self, log_dir: str | os.PathLike[str], resume_step: int | None = None) -> None:
        """Opens a new event file, which TensorBoard reads after the ones that are there.

        Args:
            resume_step: TensorBoard drops what earlier files say of later steps; None drops none.
        Raises:
            ImportError: tensorboardX is not installed.
            OSError: the file cannot be written.
        """
        from tensorboardX import record_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        self._protos: tuple[Any, Any] = event_pb2, summary_pb2
        self._records = record_writer.RecordWriter(os.fspath(_next_event_file(log_dir)))
        self._flushed = time.monotonic()
        self._write(file_version="brain.Event:2")
        if resume_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=resume_step + 1, session_log=start)
        self._records.flush()

    def _write(self, **fields: Any) -> None:
        event = self._protos[0].Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _write_values(self, step: int, values: Iterable[Any]) -> None:
        self._write(step=int(step), summary=self._protos[1].Summary(value=list(values)))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes numbers, as float32; a None is left out."""
        value = self._protos[1].Summary.Value
        self._write_values(
            step,
            [
                value(tag=tag, simple_value=np.asarray(scalar).item())
                for tag, scalar in scalars.items()
                if scalar is not None
            ],
        )

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images [H, W, C] or [N, H, W, C]: uint8, or floats in [0, 1]; C in {1, 3, 4}.

        A matplotlib figure is the image np.asarray(figure.canvas.buffer_rgba()).

        Raises:
            ValueError: another shape.
        """
        summary = self._protos[1].Summary
        values = []
        for tag, image in images.items():
            array = np.asarray(image)
            batch = array[None] if array.ndim == 3 else array
            if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4):
                raise ValueError(f"{tag}: image of shape {array.shape}, expected [..., H, W, C]")
            for i, pixels in enumerate(batch):
                height, width, channels = pixels.shape
                png = summary.Image(
                    height=height,
                    width=width,
                    colorspace=channels,
                    encoded_image_string=encode_png(pixels),
                )
                name = tag if len(batch) == 1 else f"{tag}/{i}"
                values.append(summary.Value(tag=name, image=png))
        self._write_values(step, values)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes a flat mapping of options; once for an event file. A None is left out."""
        from tensorboardX import summary

        simple = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in hparams.items()
            if value is not None
        }
        # Without tensorboardX's "experiment", TensorBoard offers every scalar as a metric.
        _, session_start, _ = summary.hparams(simple, {})
        self._write_values(0, session_start.value)

    def flush(self) -> None:
        """Writes everything to the disk and syncs it.

        Raises:
            OSError: the disk is full or fails.
        """
        self._flushed = time.monotonic()
        self._records.flush()

    def close(self) -> None:
        """Flushes and closes the event file.

        Raises:
            OSError: the disk is full or fails.
        """
        try:
            self.flush()
        finally:
            self._records.close()


def _next_event_file(log_dir: str | os.PathLike[str]) -> pathlib.Path:
    """A name that sorts after all others: TensorBoard reads a directory in sorted order.

    The usual name has the second only, so that two starts within one would overwrite each other.
    """
    directory = pathlib.Path(log_dir)
    directory.mkdir(parents=True, exist_ok=True)
    numbers = [
        int(parts[3])
        for path in directory.glob("events.out.tfevents.*")
        if len(parts := path.name.split(".")) > 3 and parts[3].isdecimal()
    ]
    number = max([int(time.time()), *(n + 1 for n in numbers)])
    return directory / f"events.out.tfevents.{number}.{socket.gethostname()}"


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG file of an image [H, W, C], C in {1, 3, 4}: uint8, or floats that are cut to [0, 1].

    Source: the PNG specification (third edition, W3C 2025), sections 5 and 11.
    """
    if pixels.dtype != np.uint8:
        pixels = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    height, width, channels = pixels.shape
    colour_type = {1: 0, 3: 2, 4: 6}[channels]
    rows = np.ascontiguousarray(pixels).reshape(height, width * channels)
    scanlines = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # 0: no filter

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    body = zlib.compress(scanlines.tobytes())
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def _import_metric_writer() -> Any:
    """CLU's MetricWriter, imported with our class instead of CLU's TensorFlow writer.

    The class cannot inherit from what this import gives, so it is registered afterwards.
    """
    if _REPLACED not in sys.modules:
        module: Any = types.ModuleType(_REPLACED)
        module.SummaryWriter = SummaryWriter
        sys.modules[_REPLACED] = module
    from clu.metric_writers import interface

    interface.MetricWriter.register(SummaryWriter)
    return interface.MetricWriter


MetricWriter = _import_metric_writer()
