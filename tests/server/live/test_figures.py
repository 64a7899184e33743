import json
import random

from server.live.figures import MATRIX_ROUNDS, NEWEST_PROBLEMS, RunFigures
from shared.storage.runlog import OUTCOMES, RunLog


def write_round(log, number, outcomes, *, changed=True, seconds=4.5, **entry):
    lists = {state: [] for state in OUTCOMES}
    for site, state in outcomes.items():
        told = {"bytes": 900, "seconds": 2.5, **entry} if state == "answered" else {"reason": f"why {state}"}
        lists[state].append({"site": site, **told})
    fields = {"update_norm": 3.0, "bytes_sent": 100, "bytes_received": 20, "weights_changed": changed}
    log.write("round", round=number, asked=[{"site": site} for site in outcomes], **lists, **fields,
              seconds={"train": 3.0, "total": seconds}, reason="" if changed else "too few")  # fmt: skip


def test_rounds_and_sites_are_added_up(tmp_path):
    log, figures = RunLog(tmp_path / "metrics.jsonl"), RunFigures(tmp_path / "metrics.jsonl")
    spent = {"epsilon": "unbounded", "dp_epsilon": 1.5, "epsilon_cap": 8.0, "delta": 1e-5, "unit": "person"}
    write_round(log, 1, {"north": "answered", "south": "refused"}, scalars={"loss": 0.5}, **spent)
    figures.catch_up()
    write_round(log, 2, {"north": "late", "south": "answered"}, changed=False, epsilon=2.25)
    figures.catch_up()
    first, second = figures.rounds[1], figures.rounds[2]
    assert dict(zip(OUTCOMES, first.outcomes, strict=True)) | {"answered": 1, "refused": 1} == dict(
        zip(OUTCOMES, first.outcomes, strict=True)
    )
    assert (first.loss, first.bytes, first.seconds, first.epsilon) == (0.5, 120, 4.5, 1.5)
    assert (second.is_changed, second.reason, second.epsilon) == (False, "too few", 2.25)
    north, south = figures.sites["north"], figures.sites["south"]
    assert (north.asked, north.answered, north.refused, north.state, north.reason) == (2, 1, 0, "late", "why late")
    assert north.spent == spent and north.curve == {1: 1.5}
    assert (south.refused, south.state, south.bytes, south.seconds) == (1, "answered", 900, 2.5)
    assert list(figures.problems) == [
        "round 1: south refused: why refused",
        "round 2: north late: why late",
        "round 2: weights unchanged, too few",
    ]


def test_who_is_doubted_is_told_in_the_round_that_named_it(tmp_path):
    log, figures = RunLog(tmp_path / "metrics.jsonl"), RunFigures(tmp_path / "metrics.jsonl")
    lists = {state: [] for state in OUTCOMES}
    doubted = {"west": {"round": 2, "persistence": 0.71, "share": 0.4}}
    shared = {"median": 0.04, "largest": 0.71, "site": "west"}
    log.write("round", round=2, asked=[], named=["west"], doubted=doubted, persistence=shared, **lists)
    log.write("round", round=3, asked=[], doubted=doubted, **lists)
    figures.catch_up()
    (told,) = figures.problems
    assert told.startswith("round 2: west is doubted") and "0.71, median of all sites 0.04), so they count 40%" in told


def test_a_long_log_is_caught_up_with_in_bounded_steps_to_the_same_figures(tmp_path):
    path, draw = tmp_path / "metrics.jsonl", random.Random(0)
    log = RunLog(path)
    sites = [f"site-{number}" for number in range(30)]
    for number in range(1, 61):
        states = {site: "answered" if draw.random() < 0.8 else draw.choice(OUTCOMES) for site in sites}
        write_round(log, number, states, epsilon=float(number))
    whole, stepwise = RunFigures(path), RunFigures(path)
    whole.catch_up(10**9)
    took = []
    while took[-1:] != [0]:
        took.append(stepwise.catch_up(10_000))
    longest = max(map(len, path.read_bytes().splitlines(keepends=True)))
    assert len(took) > 10 and max(took) <= 10_000 + longest
    assert sum(took) == path.stat().st_size
    assert (stepwise.rounds, stepwise.sites, stepwise.matrix) == (whole.rounds, whole.sites, whole.matrix)


def test_what_is_kept_does_not_grow_with_the_reasons_in_the_log(tmp_path):
    log, figures = RunLog(tmp_path / "metrics.jsonl"), RunFigures(tmp_path / "metrics.jsonl")
    for number in range(1, 101):
        write_round(log, number, {"north": "refused", "south": "lost"})
    figures.catch_up(10**9)
    assert len(figures.problems) == NEWEST_PROBLEMS and len(figures.matrix) == MATRIX_ROUNDS
    assert figures.problems[-1] == "round 100: south lost: why lost"
    assert sorted(figures.matrix)[0] == 101 - MATRIX_ROUNDS


def test_another_file_in_the_logs_place_begins_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log, figures = RunLog(path), RunFigures(path)
    for number in (1, 2):
        write_round(log, number, {"north": "answered"})
    figures.catch_up()
    path.unlink()
    write_round(RunLog(path), 7, {"south": "answered"})
    figures.catch_up()
    assert list(figures.rounds) == [7] and list(figures.sites) == ["south"]


def test_damaged_lines_are_named_and_a_torn_one_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log, figures = RunLog(path), RunFigures(path)
    write_round(log, 1, {"north": "answered"})
    with path.open("a") as file:
        file.write("no json\n" + json.dumps({"kind": "round"})[:-1])
    figures.catch_up()
    assert list(figures.rounds) == [1] and "1 damaged lines" in figures.progress_text


def test_distances_offers_and_ends_are_kept(tmp_path):
    log, figures = RunLog(tmp_path / "metrics.jsonl"), RunFigures(tmp_path / "metrics.jsonl")
    log.write("start", round=0)
    log.write("evaluation", round=0, metrics={"fd_x_1": 3.5, "precision": 0.5})
    log.write("offer", site="north", status="refused", reason="no room", epsilon_run=9.5, epsilon_cap=8.0)
    figures.catch_up()
    assert figures.status == "running" and figures.distances == {"fd_x_1": {0: 3.5}}
    assert figures.offers["north"]["epsilon_run"] == 9.5
    log.write("end", status="failed", reason="too few sites")
    log.write("evaluation_failed", round=2, reason="no network")
    figures.catch_up()
    assert figures.status == "failed" and "evaluation of round 2 failed: no network" in figures.problems
