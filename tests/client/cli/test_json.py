"""What each command prints as JSON: one table of fields and types, and why the others have none."""

import json
from pathlib import Path
from types import NoneType

import pytest
from typer.testing import CliRunner

from client.cli.main import app
from client.policy.approval import keep_pending
from client.records.journal import Journal
from client.records.ledger import open_ledger
from client.records.spending import Charge
from tests.client.conftest import DP, MakeSite, experiment
from tests.odd_words import commands

COMMANDS = {" ".join(words): command for words, command in commands(app)}
NUMBER = (int, float)
TOTAL = {
    "epsilon": (float, NoneType),
    "is_unbounded": bool,
    "delta": float,
    "unit": (str, NoneType),
    "num_charges": int,
    "num_uncommitted": int,
}
ENTRY = {"sequence": int, "time": str, "kind": str, "fields": dict}
SCHEMAS = {
    "status": {
        "alias": str,
        "address": str,
        "is_running": bool,
        "disk_problem": str,
        "data_set": {"dataset_id": str, "num_train": int, "num_held_out": int},
        "data_problem": str,
        "ledger_problem": str,
        "spent": TOTAL,
        "epsilon_cap": NUMBER,
        "newest": [ENTRY],
    },
    "doctor": [{"name": str, "is_ok": bool, "text": str}],
    "ledger show": {"charges": [dict], "committed": [int], "totals": dict},
    "ledger verify": {"file": str, "num_entries": int, "head": (str, NoneType)},
    "ledger plan": {
        "spent": TOTAL,
        "epsilon_cap": NUMBER,
        "epsilon_mean_image": (float, NoneType),
        "epsilon_round": (float, NoneType),
        "epsilon_run": (float, NoneType),
        "rounds": int,
        "rounds_that_fit": int,
        "noise_that_fits": (float, NoneType),
        "units_per_step": NUMBER,
        "signal_to_noise": (float, NoneType),
        "trained_values": int,
        "megabytes_per_round": NUMBER,
        "megabytes_sent": NUMBER,
        "images_per_round": NUMBER,
        "images_per_second": NUMBER,
        "seconds_per_round": NUMBER,
        "refusals": [{"code": str, "reason": str}],
    },
    "journal show": [ENTRY],
    "journal verify": {"file": str, "num_entries": int},
    "approve list": {
        **{kind: [str] for kind in ("code", "experiments", "peers", "projections", "references", "refused")},
        "installed_code": str,
        "rosters": [str],
        "waiting": [
            {
                "number": int,
                "digest": str,
                "run": str,
                "asked": str,
                "recipe": str,
                "differences": [str],
                "in_words": [str],
            }
        ],
    },
    "policy show": dict,
    "alerts": {"host": (str, NoneType), "proxy": str, "tested": (int, NoneType)},
}
LONG = {"audit canaries", "compare-alone"}
"""Print JSON too, and take minutes."""
ACT = {
    *("enroll", "join", "certificate", "evidence", "statistics", "start", "metrics", "leave", "data scan"),
    *("ledger accept-clock", "policy migrate", "audit model"),
    *(f"approve {what}" for what in ("code", "experiment", "refuse", "projection", "reference", "roster", "revoke")),
}
"""Change or write something, and say that they did."""


def check(value, schema, where=""):
    """Every field that is named and no other, each of its type; a number is never a text."""
    match schema:
        case dict():
            assert isinstance(value, dict) and value.keys() == schema.keys(), f"{where}: {value.keys()}"
            for name, part in schema.items():
                check(value[name], part, f"{where}.{name}")
        case [part]:
            assert isinstance(value, list), where
            for each in value:
                check(each, part, f"{where}[]")
        case _:
            assert isinstance(value, schema), f"{where}: {value!r}"
            assert not isinstance(value, bool) or schema is bool, where


def test_every_command_prints_facts_as_json_or_acts():
    assert SCHEMAS.keys() | LONG | ACT == COMMANDS.keys()
    with_json = {name for name, each in COMMANDS.items() if any("--json" in one.opts for one in each.params)}
    assert with_json == SCHEMAS.keys() | LONG


@pytest.fixture
def site(make_site: MakeSite):
    """A site that was charged, has written a journal, and has an experiment that waits."""
    home, settings = make_site()
    home.path.chmod(0o700)
    Journal(home.journal).write("request", task="train", run="first", server_round=1, request_digest="x")
    charge = {"dataset_id": "d", "fingerprint": "f", "task": "train", "run": "first", "server_round": 1}
    charge |= {"request_digest": "x", "plan_digest": "p", "mechanism": "dp-sgd", "noise_multiplier": 1.0}
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        spent = Charge(**charge, sample_rate=0.2, steps=2)
        ledger.reserve(spent, cap=9.0, delta=1e-5, epsilon_of=lambda *_: 1.0)
    keep_pending(home, experiment(privacy=DP), "first")
    return home


def run(site, words, *more):
    return CliRunner().invoke(app, [*words.split(), *more, "--home", str(site.path), "--json"])


@pytest.mark.parametrize("words", sorted(SCHEMAS.keys() - {"ledger plan", "doctor"}))
def test_json_has_the_fields_of_the_table(site, words):
    done = run(site, words, *(("--probe-seconds", "0") if words == "approve list" else ()))
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    check(value, SCHEMAS[words], words)
    assert value


def test_a_plan_is_told_in_numbers(site, tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text(experiment(privacy=DP).to_toml())
    done = run(site, "ledger plan", str(file), "--probe-seconds", "0.1")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    check(value, SCHEMAS["ledger plan"], "ledger plan")
    assert value["rounds"] == 3 and 0 <= value["rounds_that_fit"] <= 3


def test_what_is_not_finite_is_null(capsys):
    from shared.commandline import tell_json

    tell_json({"epsilon": float("inf"), "rows": [float("nan"), (1.5, True, None)]})
    assert json.loads(capsys.readouterr().out) == {"epsilon": None, "rows": [None, [1.5, True, None]]}
