import json

import pytest

from client.home import Home
from client.live.figures import KNOWN_REQUESTS, NEWEST, SiteFigures
from client.records.chain import ChainError, ChainReader, open_chain, read_chain
from client.records.journal import Journal


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


def ask(home, digest, task="train", run="first", server_round=3):
    Journal(home.journal).write("request", task=task, run=run, server_round=server_round, request_digest=digest)


def test_what_was_asked_and_not_answered_is_open(home):
    figures = SiteFigures(home)
    ask(home, "d1")
    ask(home, "d2", server_round=4)
    figures.catch_up()
    assert [each.server_round for each in figures.open.values()] == [3, 4]
    Journal(home.journal).write("refusal", code="policy", reason="no", request_digest="d1")
    numbers = ["update", "num_examples"]
    Journal(home.journal).write(
        "release", request_digest="d2", numbers=numbers, bytes=70, epsilon=1.25, is_unbounded=False
    )
    figures.catch_up()
    assert not figures.open and figures.epsilons == [1.25]
    (entry, asked), (released,) = figures.refusals[0], figures.releases
    assert (entry.fields["code"], asked.server_round) == ("policy", 3)
    assert (released.numbers, released.bytes, released.asked.server_round) == (("update", "num_examples"), 70, 4)


def test_a_release_by_the_operators_own_hand_is_told_without_a_request(home):
    Journal(home.journal).write("release", task="statistics", release="exact", extractor="ab", numbers=["n", "sum"])
    figures = SiteFigures(home)
    figures.catch_up()
    assert figures.releases[0].asked.task == "statistics" and figures.epsilons == []


def test_the_same_figures_come_of_a_journal_that_grew_while_it_was_read(home):
    stepwise = SiteFigures(home)
    for number in range(30):
        ask(home, f"d{number}", server_round=number)
        if number % 3:
            Journal(home.journal).write("refusal", code="policy", reason="no", request_digest=f"d{number}")
        stepwise.catch_up()
    whole = SiteFigures(home)
    assert whole.catch_up() == len(read_chain(home.journal)) == 50
    assert (whole.open, whole.newest, whole.refusals) == (stepwise.open, stepwise.newest, stepwise.refusals)


def test_memory_does_not_follow_the_journal(home):
    with open_chain(home.journal, wait=True) as chain:
        for number in range(KNOWN_REQUESTS + 60):
            fields = {"task": "train", "run": "r", "server_round": number, "request_digest": f"d{number}"}
            chain.append("request", **fields)
    figures = SiteFigures(home)
    figures.catch_up()
    assert len(figures.newest) == NEWEST and len(figures.open) == len(figures._asked) == KNOWN_REQUESTS


def test_charges_count_until_they_are_completed(home):
    figures = SiteFigures(home)
    with open_chain(home.ledger, wait=True) as chain:
        chain.append("open", ledger_id="x")
        first = chain.append("reserve", task="train")
        second = chain.append("reserve", task="train")
        chain.append("commit", reserve=first.sequence)
    figures.catch_up()
    assert (figures.num_charges, figures.uncommitted) == (2, {second.sequence})
    assert figures.newest_change == second.sequence


def changed(line):
    entry = json.loads(line)
    entry["fields"]["run"] = "another"
    return json.dumps(entry).encode()


@pytest.mark.parametrize("harm", ["change", "drop", "shorten", "swap"])
def test_a_chain_that_was_harmed_after_it_was_read_is_noticed(home, harm):
    reader = ChainReader(home.journal)
    for number in range(3):
        ask(home, f"d{number}")
    assert len(reader.read_new()) == 3
    ask(home, "d3")
    lines = home.journal.read_bytes().splitlines()
    kept = {"change": [*lines[:3], changed(lines[3])], "drop": [*lines[:2], b" " * (len(lines[2])), lines[3]],
            "shorten": lines[:1], "swap": [*lines[:3], lines[2]]}[harm]  # fmt: skip
    home.journal.write_bytes(b"\n".join(kept) + b"\n")
    if harm == "drop":  # in the part that was read: the next whole check finds it
        reader.read_new()
        with pytest.raises(ChainError):
            read_chain(home.journal)
    else:
        with pytest.raises(ChainError, match=r"journal\.jsonl"):
            reader.read_new()


def test_a_torn_last_line_waits_for_its_end(home):
    reader = ChainReader(home.journal)
    ask(home, "d0")
    whole = home.journal.read_bytes()
    home.journal.write_bytes(whole[:-10])
    assert reader.read_new() == []
    home.journal.write_bytes(whole)
    assert len(reader.read_new()) == 1
