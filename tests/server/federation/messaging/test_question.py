import errno
import os

import pytest
from flwr.app import ConfigRecord, MessageType, RecordDict

from server.federation.fleet.registry import Registry
from server.federation.messaging.question import collect
from shared.storage import room
from shared.storage.runlog import RunLog, read_metrics
from tests.server.fake_federation import FAST
from tests.server.fake_grid import FakeGrid, Site
from tests.signing import public_of


def says(text):
    return RecordDict({"header": ConfigRecord({"json": text})})


@pytest.mark.parametrize("where", ["the answer", "its line", "the end"])
def test_an_answer_that_a_site_was_charged_for_waits_for_room_and_is_not_asked_for_again(tmp_path, monkeypatch, where):
    Registry(tmp_path / "sites.json").add("site-0", "ecdsa-sha2-nistp384 key", public_of("site-0"))
    Registry(tmp_path / "sites.json").set_node_id("site-0", 100)
    grid, log, tried = FakeGrid({100: Site(lambda *_: says("fine"))}), RunLog(tmp_path / "run" / "metrics.jsonl"), []
    looks, append = iter([False, False]), RunLog._append

    def full_once(place):
        if place == where and place not in tried:
            tried.append(place)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def written(self, kind, *rest, **options):
        full_once("the end" if kind == "end" else "its line")
        append(self, kind, *rest, **options)

    def take(message, alias):
        full_once("the answer")
        return "taken", message.content["header"]["json"]

    monkeypatch.setattr(RunLog, "_append", written)
    monkeypatch.setattr(room, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(room, "has_room", lambda *_: next(looks, True))
    collect(grid, tmp_path, says("?"), MessageType.QUERY, take, log, "audit", timing=FAST, deadline_seconds=20)
    assert tried == [where]
    assert grid.sites[100].asked == 1
    outcome, end = read_metrics(log.path)
    assert (outcome["site"], outcome["status"], outcome["reason"]) == ("site-0", "taken", "fine")
    assert end["kind"] == "end"
