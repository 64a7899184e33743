import json
import multiprocessing
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from shared.storage.runlog import RunLog, RunLogReader, read_metrics


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


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "round", "rou',
        b"\0" * 300,
        b"[1]",
        b"[" * 100_000,
        b'{"kind": 5}',
        b"9" * 5000,
        b"\xff\xfe",
        b'{"kind": "round"}',
        b'{"kind": "round", "round": "2"}',
        b'{"kind": "round", "round": true}',
        b'{"kind": "round", "round": 2, "answered": [1]}',
        b'{"kind": "round", "round": 2, "seconds": 3}',
        b'{"kind": "train", "loss": 1.0}',
    ],
)
def test_damaged_lines_are_skipped_counted_and_named(tmp_path, caplog, line):
    path = tmp_path / "m.jsonl"
    RunLog(path).write("round", round=1)
    with path.open("ab") as file:
        file.write(line + b"\n")
    RunLog(path).write("round", round=3)
    assert [event["round"] for event in read_metrics(path)] == [1, 3]
    assert "1 damaged lines skipped (2)" in caplog.text


def test_a_round_has_every_field_that_readers_use(tmp_path):
    path = tmp_path / "m.jsonl"
    RunLog(path).write("round", round=1, answered=[{"site": "a"}])
    (event,) = read_metrics(path)
    assert event["answered"] == [{"site": "a"}]
    assert (event["refused"], event["bytes_sent"], event["seconds"]) == ([], 0, {})


def test_a_follower_parses_only_what_is_new(tmp_path, monkeypatch):
    path, parsed = tmp_path / "m.jsonl", []
    reader, loads = RunLogReader(path), json.loads
    assert reader.read() == []
    monkeypatch.setattr("shared.storage.runlog.json.loads", lambda line: (parsed.append(line), loads(line))[1])
    for number in range(3):
        RunLog(path).write("train", step=number)
        assert [event["step"] for event in reader.read()] == list(range(number + 1))
    assert len(parsed) == 3
    with path.open("ab") as file:
        file.write(b'{"kind": "tr')
    assert len(reader.read()) == 3
    path.write_text("")
    assert reader.read() == []


def test_what_happens_once_per_round_is_on_disk_when_it_is_told(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("shared.storage.runlog.os.fsync", synced.append)
    log = RunLog(tmp_path / "m.jsonl")
    log.write("train", step=1)
    assert not synced
    log.write_durably("round", round=1)
    assert len(synced) == 1


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
