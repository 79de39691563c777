"""Event files for TensorBoard: a folder for each trial, with its scalars, its parameters and its end."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from search.logs import NODE
from search.trackers.runs import Run


class TensorBoard:
    """Writes as TensorBoard itself does without TensorFlow; each event is on the disk at once."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder)
        self._folder = folder
        self._files: dict[int, RecordWriter] = {}

    def begin(self, run: Run) -> None:
        folder = self._folder / f"trial-{run.number}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{NODE}.{os.getpid()}"  # TensorBoard reads them in this order
        self._files[run.number] = RecordWriter((folder / name).open("xb"))
        self._write(run.number, Event(file_version="brain.Event:2"))
        self._write(run.number, Event(summary=hparams_pb(dict(run.params), trial_id=run.name)))
        self._write(run.number, Event(summary=_text("about", run.tags)))

    def log(self, number: int, images: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(number, Event(step=images, summary=Summary(value=scalars)))

    def end(self, number: int, state: str, tags: Mapping[str, str]) -> None:
        self._write(number, Event(summary=_text("end", tags)))
        if state != "WAITING":
            self._write(number, Event(summary=_session_end(state)))
        self._files.pop(number).close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _write(self, number: int, event: Event) -> None:
        event.wall_time = time.time()
        self._files[number].write(event.SerializeToString())
        self._files[number].flush()


def _text(tag: str, lines: Mapping[str, str]) -> Summary:
    """A table for the page of texts."""
    table = "\n".join(["| | |", "|-|-|", *(f"| {name} | {value} |" for name, value in lines.items())])
    tensor = TensorProto(dtype=DT_STRING, string_val=[table.encode()])
    return Summary(value=[Summary.Value(tag=tag, metadata=create_summary_metadata(None, None), tensor=tensor)])


def _session_end(state: str) -> Summary:
    """For the page of parameters."""
    status = api_pb2.STATUS_SUCCESS if state in ("COMPLETE", "PRUNED") else api_pb2.STATUS_FAILURE
    content = HParamsPluginData(session_end_info=SessionEndInfo(status=status, end_time_secs=time.time()))
    about = metadata.create_summary_metadata(content)
    return Summary(
        value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)]
    )
