"""The gRPC health service of our own: what it says of services, and who may have its port."""

import sys

import pytest

from deploy.checks.probe import probe
from deploy.guards import supernode
from deploy.observe.health import STALE_SECONDS, Told, serve_health
from deploy.processes.process import free_ports


def test_everything_together_and_each_service_by_its_name():
    states = {"superlink": True, "superexec": True}
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with serve_health(address, lambda: states):
        assert probe(address) == probe(address, "superlink") == "SERVING"
        states["superexec"] = False
        assert probe(address) == probe(address, "superexec") == "NOT_SERVING"
        assert probe(address, "superlink") == "SERVING"
        assert probe(address, "nginx") == "NOT_FOUND"
        states.clear()
        assert probe(address) == "NOT_SERVING"
        with pytest.raises(RuntimeError), serve_health(address, lambda: {"other": True}):
            pass
    assert probe(address, seconds=0.5) in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}


def test_a_check_that_fails_is_an_answer_of_its_own():
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with serve_health(address, lambda: {"superlink": 1 / 0 > 0}):
        assert probe(address) == "UNKNOWN"


def test_what_a_supervisor_said_long_ago_does_not_count():
    clock = [0.0]
    told = Told(lambda: clock[0])
    assert told.states() == {}
    told.take(b'{"superlink": true, "edge": false}')
    clock[0] = STALE_SECONDS - 1
    assert told.states() == {"superlink": True, "edge": False}
    clock[0] = STALE_SECONDS
    assert told.states() == {"superlink": False, "edge": False}


def test_a_supernode_without_a_supervisor_answers_for_itself(monkeypatch):
    address, asked = f"127.0.0.1:{free_ports(1)[0]}", []
    monkeypatch.setattr(supernode, "is_listening", lambda *where: asked.append(where) is None)
    argv = ["supernode", "--host", "127.0.0.1", "--port", "9101", "--health-server-address", address,
            "--ssl-ca-certfile", "tls/ca.crt"]  # fmt: skip
    with supernode.own_health(argv):
        assert argv == ["supernode", "--host", "127.0.0.1", "--port", "9101", "--ssl-ca-certfile", "tls/ca.crt"]
        assert probe(address) == "SERVING"
    assert [(where, str(file)) for where, file in asked] == [("127.0.0.1:9101", "tls/ca.crt")]
    with supernode.own_health([sys.executable]):
        pass
