import json
import multiprocessing
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from shared.storage.runlog import RunLog, read_metrics


def test_events_come_back_in_order_with_kind_and_utc_time(tmp_path):
    log = RunLog(tmp_path / "run" / "metrics.jsonl")
    log.write("start", experiment="a")
    log.write("train", step=1, loss=0.5)
    events = read_metrics(log.path)
    assert [event["kind"] for event in events] == ["start", "train"]
    assert events[1]["loss"] == 0.5
    assert datetime.fromisoformat(events[0]["time"]).utcoffset() == timedelta(0)


def test_values_that_json_lacks_are_written_plainly(tmp_path):
    log = RunLog(tmp_path / "m.jsonl")
    log.write("x", loss=float("nan"), count=np.int64(3), rate=np.float32("inf"), path=Path("a"), sites=({"site": "b"},))
    event = read_metrics(log.path)[0]
    assert event["loss"] is None and event["rate"] is None
    assert event["count"] == 3
    assert event["path"] == "a"
    assert event["sites"] == [{"site": "b"}]


def test_torn_last_line_is_ignored_by_readers_and_cut_by_the_next_writer(tmp_path):
    path = tmp_path / "m.jsonl"
    RunLog(path).write("train", step=1)
    with path.open("a") as file:
        file.write('{"kind": "tr')
    assert [event["step"] for event in read_metrics(path)] == [1]
    RunLog(path).write("train", step=2)
    assert [event["step"] for event in read_metrics(path)] == [1, 2]


def test_damage_in_the_middle_is_not_hidden(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "a"\n{"kind": "b"}\n')
    with pytest.raises(json.JSONDecodeError):
        read_metrics(path)


def test_missing_file_has_no_events(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


def _write_many(path, name):
    for number in range(50):
        RunLog(path).write(name, number=number)


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "m.jsonl"
    workers = [multiprocessing.get_context("fork").Process(target=_write_many, args=(path, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    events = read_metrics(path)
    for name in "ab":
        assert [event["number"] for event in events if event["kind"] == name] == list(range(50))
