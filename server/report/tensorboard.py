"""The report's figures for TensorBoard: distances, losses, costs and grids of a federated run, by round."""

import shutil

import numpy as np
from PIL import Image

from server.report.run_charts import dp_epsilon
from server.runs.history import RunData
from server.runs.run_directory import RunDir

FOLDER = "report"


def write_curves(data: RunData) -> None:
    """Write `tensorboard/report` anew; a training writes its own curves beside it."""
    from torch.utils.tensorboard import SummaryWriter

    folder = RunDir(data.path).tensorboard / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for evaluation in data.evaluations:
            for name, value in evaluation.result["metrics"].items():
                writer.add_scalar(f"evaluation/{name}", value, evaluation.place)
        for event in data.rounds:
            number, seconds = event["round"], event.get("seconds", {})
            for entry in event.get("answered", []):
                for name, value in entry.get("scalars", {}).items():
                    writer.add_scalar(f"{name}/{entry['site']}", value, number)
                if (spent := dp_epsilon(entry)) is not None:
                    writer.add_scalar(f"epsilon/{entry['site']}", spent, number)
            costs = {
                "bytes_sent": event.get("bytes_sent", 0),
                "bytes_received": event.get("bytes_received", 0),
                "seconds": seconds.get("total", sum(seconds.values())),
                "update_norm": event.get("update_norm", 0.0),
                "answered": len(event.get("answered", [])),
            }
            for name, value in costs.items():
                writer.add_scalar(f"round/{name}", value, number)
        for place, path in data.grids:
            with Image.open(path) as grid:
                writer.add_image("samples", np.asarray(grid.convert("RGB")), place, dataformats="HWC")
