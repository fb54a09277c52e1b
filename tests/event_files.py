"""Reads TensorBoard's event files without TensorBoard: each record is a length, a checksum, an Event, a checksum."""

from __future__ import annotations

import pathlib
import struct

from tensorboardX.proto.event_pb2 import Event


def read_events(workdir: pathlib.Path) -> list[Event]:
    """The events in `tensorboard/` of `workdir`, file by file."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def read_texts(workdir: pathlib.Path) -> list[tuple[int, str, str]]:
    """(update, tag, text) of everything that the Text tab shows."""
    return [
        (event.step, value.tag, value.tensor.string_val[0].decode())
        for event in read_events(workdir)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "text"
    ]
