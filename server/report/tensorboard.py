"""The report's figures for TensorBoard: distances, losses, costs and grids of a federated run, by round."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from server.runs.history import RunData
from server.runs.run_directory import RunDir
from shared.storage.round_records import dp_epsilon

FOLDER = "report"
FILE = "events.out.tfevents.report"


def write_curves(data: RunData) -> None:
    """Write `tensorboard/report` anew; a training writes its own curves beside it. No torch: one event per round."""
    # The parts of TensorBoard that need neither TensorFlow nor torch.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder, now = RunDir(data.path).tensorboard / FOLDER, time.time()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / FILE).open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        for place, values in _scalars(data):
            event = Event(wall_time=now, step=place)
            for tag, value in values.items():
                event.summary.value.add(tag=tag, simple_value=value)
            writer.write(event.SerializeToString())
        for place, path in data.grids:
            event = Event(wall_time=now, step=place)
            _add_picture(event.summary.value.add(tag="samples").image, path)
            writer.write(event.SerializeToString())
        writer.flush()


def _scalars(data: RunData) -> Iterator[tuple[int, dict[str, float]]]:
    """Place, and the values there by tag."""
    for evaluation in data.evaluations:
        metrics = evaluation.result["metrics"].items()
        yield evaluation.place, {f"evaluation/{name}": value for name, value in metrics}
    for event in data.rounds:
        yield event["round"], _of_round(event)


def _of_round(event: dict[str, Any]) -> dict[str, float]:
    seconds = event["seconds"]
    values = {
        "round/bytes_sent": event["bytes_sent"],
        "round/bytes_received": event["bytes_received"],
        "round/seconds": seconds.get("total", sum(seconds.values())),
        "round/update_norm": event["update_norm"],
        "round/answered": len(event["answered"]),
    }
    for entry in event["answered"]:
        site = entry["site"]
        values |= {f"{name}/{site}": value for name, value in entry.get("scalars", {}).items()}
        if (spent := dp_epsilon(entry)) is not None:
            values[f"epsilon/{site}"] = spent
    return values


def _add_picture(target: Any, path: Path) -> None:  # noqa: ANN401  # a protobuf message without types
    with Image.open(path) as grid:
        target.width, target.height = grid.size
        target.colorspace = len(grid.getbands())
    target.encoded_image_string = path.read_bytes()
