"""The process of a run: installed code only, whatever the bundle holds; allowances before each question."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Context, RecordDict

import server.app
from server import entry
from shared.errors import InputError


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    for name in ("HttpGrid", "install_from_fab", "get_fab_metadata", "get_project_dir", "get_project_config",
                 "get_fused_config_from_dir", "run_"):  # fmt: skip
        monkeypatch.setattr(entry.runtime, name, vars(entry.runtime)[name])
    entry.install_guards()
    return SimpleNamespace(**vars(entry.runtime))


def test_a_bundle_is_neither_read_nor_unpacked(
    guarded: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert guarded.install_from_fab(b"no bundle at all", skip_prompt=True) is None
    guarded.get_fab_metadata(b"no bundle at all")
    assert list(tmp_path.iterdir()) == []


def test_the_installed_serverapp_runs_whatever_the_bundle_names(
    guarded: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    called: list[dict[str, object]] = []
    monkeypatch.setattr(server.app, "app", lambda **given: called.append(given))
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    path = list(sys.path)
    assert guarded.run_(grid="grid", server_app_dir="/evil", server_app_attr="os:system", context=context) is context
    assert called == [{"grid": "grid", "context": context}]
    assert sys.path == path


def test_a_run_that_ends_with_a_reason_ends_its_log_with_it(
    guarded: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(**_: object) -> None:
        raise InputError("2 of 3 sites accept, min_replies is 3")

    flower = logging.getLogger("flwr")
    monkeypatch.setattr(flower, "filters", list(flower.filters))
    monkeypatch.setattr(flower, "propagate", True)
    caplog.set_level(logging.INFO, logger="flwr")
    monkeypatch.setattr(server.app, "app", refuse)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(InputError) as caught:
        guarded.run_(grid="grid", server_app_dir="", server_app_attr="", context=context)
    # As Flower goes on then.
    flower.log(logging.ERROR, "%s raised an exception", "ServerApp", exc_info=caught.value)
    flower.log(logging.ERROR, "Exit Code: 201\n\nAn unhandled exception occurred.")
    flower.log(logging.INFO, "something else")
    assert caplog.messages[-2:] == ["the run ends: 2 of 3 sites accept, min_replies is 3", "something else"]


def test_a_submitted_configuration_gives_two_keys_only(guarded: SimpleNamespace):
    given = {"experiment": "text", "run": "one", "other": 1}
    assert guarded.get_fused_config_from_dir("anywhere", given) == {"experiment": "text", "run": "one"}


def test_a_guard_that_flower_would_not_call_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(entry.runtime, "install_from_fab")
    with pytest.raises(RuntimeError, match="install_from_fab"):
        entry.install_guards()


def test_who_may_answer_is_written_before_the_question_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASKFED_SERVER_HOME", str(tmp_path))
    monkeypatch.setenv(entry.LARGEST_VARIABLE, "0")
    sent: list[str] = []

    def send(_grid: object, run_id: int, questions: list[SimpleNamespace]) -> list[str]:
        (file,) = (tmp_path / "run" / "allowances").iterdir()
        assert file.name == f"{run_id}.jsonl"
        sent.extend(file.read_text().splitlines())
        return [question.metadata.message_id for question in questions]

    monkeypatch.setattr(entry.HttpGrid, "_try_push_messages", send)
    grid = entry.GuardedGrid(token="t")
    grid.allow(10 * 2**20)
    asked = [
        SimpleNamespace(metadata=SimpleNamespace(message_id=name, dst_node_id=node))
        for name, node in (("a", 7), ("b", 8))
    ]
    assert grid._try_push_messages(5, iter(asked)) == ["a", "b"]
    most = {"bytes": 11 * 2**20, "objects": 2 + 64}
    assert [json.loads(line) for line in sent] == [
        {"message": "a", "node": 7, **most},
        {"message": "b", "node": 8, **most},
    ]
    assert os.environ[entry.LARGEST_VARIABLE] == str(11 * 2**20)


def test_the_process_of_a_run_loads_neither_torch_nor_what_only_a_superlink_needs():
    """It holds models, so what it needs beside them counts; and every run waits for its start."""
    code = (
        "import sys; from deploy.guards.apps import leave_out; leave_out('server.entry')\n"
        "import server.entry as entry; assert entry.runtime.HttpGrid is entry.HttpGrid\n"
        "sys.exit(', '.join({'torch', 'sqlalchemy', 'flwr.superlink.cli'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_the_superexec_says_where_the_superlink_is():
    told = ["--runtime-api-address", "127.0.0.1:9", "--root-certificates", "ca.crt", "--parent-pid", "7"]
    options = entry.read_options([*told, "--token", "secret"])
    assert (options.runtime_api_address, options.root_certificates) == ("127.0.0.1:9", "ca.crt")
    assert (options.parent_pid, options.insecure, options.token) == (7, False, "secret")
    with pytest.raises(SystemExit):
        entry.read_options(told)
