import base64
import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from server.report import page
from server.report.build import report
from server.report.formatting import (
    breakable,
    format_bytes,
    format_interval,
    format_number,
    format_seconds,
    reference_label,
)
from server.report.page import _trend, build_page
from server.report.svg_charts import Series, line_chart
from server.runs.history import read_run, spent_text
from server.runs.run_directory import create
from shared.data.synthetic import generate
from shared.errors import InputError
from shared.evaluation.generate import save_grid
from shared.experiment.config import parse_experiment
from shared.storage.checkpoint import save_checkpoint
from shared.storage.runlog import RunLog
from shared.storage.synthetic_mark import SyntheticMark, read_mark
from tests.needs import need_binary

pytestmark = pytest.mark.usefixtures("charts_drawn_once")
SITES = ["north", "south", "<b>east</b>"]
OUTCOMES = ("answered", "refused", "failed", "late", "lost", "rejected")


def result(place, value, *, federated=True, name="fd_random_inception_192", reference="synthetic:heldout:100"):
    checkpoint = {"round": place, "step": None} if federated else {"round": None, "step": place}
    return {
        "metrics": {name: value, "precision": 0.5},
        "intervals": {name: [value * 0.9, value * 1.1], "precision": [0.41, 0.59]},
        "extractor": {"extractor": "random_inception", "layer": "192", "sha256": "ab" * 32},
        "reference": {"name": reference, "n": 100.0, "release": "own"},
        "checkpoint": checkpoint | {"name": f"place-{place}"},
        "sampler": "ddim",
        "nfe": 5,
        "num_images": 64,
        "weights": "ema",
        "command": "maskfed-server evaluate",
    }


def write_result(run, name, content):
    run.evaluation(name).mkdir(parents=True)
    (run.evaluation(name) / "result.json").write_text(json.dumps(content))


def record(number, states):
    entries = {state: [] for state in OUTCOMES}
    for site, state in zip(SITES, states, strict=True):
        done = {
            "epsilon": "unbounded",
            "dp_epsilon": 1.5 * number,
            "delta": 1e-5,
            "epsilon_cap": 8.0,
            "unit": "person",
            "scalars": {"loss": 1 / number},
        }
        entries[state].append({"site": site} | (done if state == "answered" else {"reason": f"why {state}"}))
    costs = {"bytes_sent": 2_500_000, "bytes_received": 1_200_000, "seconds": {"train": 3.0, "total": 4.5}}
    return {"round": number, "asked": [{"site": site} for site in SITES], **entries, **costs, "update_norm": 1.0}


@pytest.fixture
def federated(tmp_path):
    experiment = parse_experiment("[model]\nimage_size = 16\n[privacy]\nmechanism = 'dp-sgd'\nunit = 'person'\n")
    run = create(tmp_path / "trial", experiment)
    log = RunLog(run.metrics)
    log.write("start", round=0, rounds=3, run="trial")
    log.write("round", **record(1, ["answered", "answered", "late"]), weights_changed=True)
    log.write("round", **record(2, ["answered", "lost", "refused"]), weights_changed=False, reason="too few")
    log.write("round", **record(3, ["answered", "rejected", "failed"]), weights_changed=True)
    log.write("end", status="completed")
    faces = generate(32, 16, 0)[0]
    for place, value in ((0, 20.0), (1, 16.0), (2, 12.0), (3, 5.0)):
        write_result(run, f"round-{place:06d}", result(place, value))
        mark = SyntheticMark(f"{place:064x}", "0 to 31")
        save_grid(faces // (4 - place), run.samples / f"round-{place:06d}.png", 8, mark)
        save_checkpoint(
            run.round_checkpoint(place), {"ema": {"a": np.zeros(1)}}, {"experiment": experiment, "round": place}
        )
    (run.path / "audits").mkdir()
    audit = {
        "site": "north",
        "audit": "membership",
        "checkpoint": "round-000003",
        "passed": False,
        "figures": {"auc": 0.91},
    }
    (run.path / "audits" / "north.json").write_text(json.dumps(audit))
    return run


@pytest.fixture
def central(tmp_path):
    run = create(tmp_path / "central", parse_experiment("[train]\nsteps = 20\n"))
    log = RunLog(run.metrics)
    for step in (10, 20):
        log.write("train", step=step, loss=1 / step, images_per_second=100.0)
    write_result(run, "step-20", result(20, 7.0, federated=False))
    return run


def test_page_tells_the_distance_of_each_round_and_its_change(federated):
    page = report([federated.path]).read_text()
    assert "20 → 5" in page
    for text in ("-75.0 %", "-20.0 %", "-40.0 %", "synthetic:heldout:100", "This distance is not FID"):
        assert text in page


def test_page_needs_nothing_from_outside(federated):
    page = report([federated.path]).read_text()
    links = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page) + re.findall(r"url\(([^)]+)\)", page)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "<script" not in page and "@import" not in page


def test_names_of_sites_are_text_not_markup(federated):
    page = report([federated.path]).read_text()
    assert "<b>east</b>" not in page and "&lt;b&gt;east&lt;/b&gt;" in page


def test_page_tells_who_took_part_and_why_not(federated):
    page = report([federated.path]).read_text()
    for state in ("answered", "refused", "failed", "late", "lost", "rejected"):
        assert f'class="cell {state}"' in page
    for text in (
        "south lost: why lost",
        "weights unchanged, too few",
        "2.5 MB",
        "4.5 s",
        "per</th>",
        "person",
        "unbounded (DP part 4.5)",
        "1e-05",
    ):
        assert text in page
    assert "0.91" in page and ">fail<" in page


def test_who_took_part_in_many_rounds_is_shown_for_the_newest_and_what_went_wrong_for_all(federated, monkeypatch):
    assert "rounds; all of them are in" not in report([federated.path]).read_text()
    monkeypatch.setattr(page, "MOST_CELLS", 2 * len(SITES) + 1)
    built = build_page(read_run(federated.path))
    assert built.matrix_rounds == [2, 3] and {len(cells) for _, cells in built.matrix} == {2}
    assert dict(built.matrix)["south"][0]["state"] == "lost"
    assert any(line.startswith("Round 1:") for line in built.problems)
    text = report([federated.path]).read_text()
    assert "The newest 2 of 3 rounds" in text and "<tr><th>site</th><th>2</th><th>3</th></tr>" in text


def test_same_seeds_stand_side_by_side(federated, tmp_path):
    page = report([federated.path]).read_text()
    assert page.count("data:image/png") == 3
    assert "round 0 (before)" in page and "round 3 (after)" in page


def test_every_picture_of_the_page_says_that_it_is_generated(federated, tmp_path):
    old = federated.samples / "round-000003.png"
    with Image.open(old) as picture:
        pixels = np.asarray(picture)
    Image.fromarray(pixels).save(old)  # as versions without marks wrote them
    page, marks = report([federated.path]).read_text(), []
    for number, text in enumerate(re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)):
        file = tmp_path / f"{number}.png"
        file.write_bytes(base64.b64decode(text))
        marks.append(read_mark(file))
    models = ", ".join(f"{place:064x}" for place in range(3))
    assert marks == [SyntheticMark(f"{0:064x}", "0 to 31"), SyntheticMark(), SyntheticMark(models)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "1.png")), pixels)


def test_training_without_dp_says_unbounded(tmp_path):
    run = create(tmp_path / "plain", parse_experiment(""))
    states = ["answered"] * 3
    entry = record(1, states)
    for answer in entry["answered"]:
        answer.pop("epsilon")
    RunLog(run.metrics).write("round", **entry, weights_changed=True)
    assert "epsilon is <b>unbounded</b>" in report([run.path]).read_text()


@pytest.mark.parametrize("secure", [True, False])
def test_a_run_with_masked_updates_says_what_was_released(tmp_path, secure):
    text = f"[federation]\nsecure = {str(secure).lower()}\n"
    run = create(tmp_path / "masked", parse_experiment(text))
    RunLog(run.metrics).write("round", **record(1, ["answered"] * 3), weights_changed=True)
    assert ("masked updates, each of no use alone" in report([run.path]).read_text()) == secure


def test_central_run_shows_loss_over_steps(central):
    page = report([central.path]).read_text()
    assert "Training loss" in page and "step" in page and "Who took part" not in page


def test_an_empty_run_still_makes_a_page(tmp_path):
    run = create(tmp_path / "fresh", parse_experiment(""))
    assert "not started" in report([run.path]).read_text()


def test_tensorboard_gets_the_same_figures_and_grids(federated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # The second report replaces the curves of the first.
        report([federated.path])
    curves = EventAccumulator(str(federated.tensorboard / "report"), size_guidance={"images": 0}).Reload()
    points = [(event.step, event.value) for event in curves.Scalars("evaluation/fd_random_inception_192")]
    assert points == [(0, 20.0), (1, 16.0), (2, 12.0), (3, 5.0)]
    assert [event.value for event in curves.Scalars("round/answered")] == [2.0, 1.0, 1.0]
    assert [event.value for event in curves.Scalars("epsilon/north")] == [1.5, 3.0, 4.5]
    assert len(curves.Images("samples")) == 4


def test_runs_are_compared_in_one_chart_when_they_measured_the_same(federated, central, tmp_path):
    page = report([federated.path, central.path], tmp_path / "out" / "both.html").read_text()
    assert "Comparison of 2 runs" in page and "no common chart" in page
    twice = report([federated.path, federated.path], tmp_path / "twice.html").read_text()
    assert "Distance by round" in twice


def test_distances_to_other_references_stay_apart(federated):
    write_result(federated, "other", result(3, 99.0, reference="elsewhere"))
    data = read_run(federated.path)
    assert data.main_group[:2] == ("fd_random_inception_192", "synthetic:heldout:100")
    assert "Further distances" in report([federated.path]).read_text()


def test_a_repeated_round_counts_once(federated):
    RunLog(federated.metrics).write("round", **record(3, ["answered"] * 3), weights_changed=True)
    assert [event["round"] for event in read_run(federated.path).rounds] == [1, 2, 3]


def test_a_folder_without_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"experiment\.toml"):
        report([tmp_path])


def test_a_damaged_result_is_named(federated):
    path = federated.evaluation("round-000001") / "result.json"
    path.write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        report([federated.path])


def test_chart_takes_the_pages_colours_and_escapes_labels():
    svg = line_chart([Series("<a>", [0, 1], [1.0, None]), Series("b", [0, 1], [2.0, 3.0])], "round", "x < y")
    assert svg.startswith("<svg") and "var(--series-1)" in svg and "var(--ink)" in svg
    assert "#0a0b" not in svg and "&lt;a&gt;" in svg and "<a>" not in svg and " width=" not in svg[:200]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_number(None), "–"),
        (format_number("unbounded"), "unbounded"),
        (spent_text({"epsilon": 3.14159}), "3.142"),
        (spent_text({"epsilon": "unbounded"}), "unbounded"),
        (spent_text({"epsilon": "unbounded", "dp_epsilon": 2.5}), "unbounded (DP part 2.5)"),
        (format_number(12345.6), "12,346"),
        (format_number(0.012346), "0.01235"),
        (format_bytes(999), "999 B"),
        (format_bytes(54_123_456), "54.1 MB"),
        (format_seconds(59.94), "59.9 s"),
        (format_seconds(600), "10.0 min"),
        (format_seconds(None), "–"),
    ],
)
def test_numbers_are_readable(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ({"name": "/data/faces/held-out.zip", "release": "own"}, "held-out.zip"),
        ({"name": "a/b.safetensors,c/d.safetensors", "release": "own"}, "b.safetensors, d.safetensors"),
        ({"name": "synthetic:heldout:100", "release": "own"}, "synthetic:heldout:100"),
        ({"name": "x/pooled.safetensors", "release": "exact", "sites": "a+b"}, "exact statistics of a, b"),
        ({"name": "x", "release": "dp", "sites": "a+b+c+d"}, "private (DP) statistics of 4 sites"),
    ],
)
def test_references_are_told_without_folders(reference, text):
    assert reference_label(reference) == text


def test_long_names_break_after_separators_and_stay_text():
    assert str(breakable("fd_onnx:<b>")) == "fd_<wbr>onnx:<wbr>&lt;b&gt;"
    assert format_interval([0.5, 2.25]) == "0.5 to 2.25" and format_interval(None) == "–"


def test_verdicts_stand_by_site_and_kind(federated):
    folder = federated.path / "audits"
    for site, audit, passed in (("south", "membership", True), ("south", "memorisation", False)):
        content = {"site": site, "audit": audit, "checkpoint": "round-000003", "passed": passed, "figures": {}}
        content["reason"] = "" if passed else "generated images are copies of training images"
        (folder / f"{site}-{audit}.json").write_text(json.dumps(content))
    (table,) = build_page(read_run(federated.path)).audits
    assert table.kinds == ["membership", "memorisation"] and [site for site, _ in table.sites] == ["north", "south"]
    page = report([federated.path]).read_text()
    assert "copies of training images" in page and "no figures" in page
    assert "copy rate 0.05, AUC of the calibrated membership attack 0.6" in page


def test_epsilon_stands_against_its_cap(federated):
    page = build_page(read_run(federated.path))
    north = next(entry for entry in page.epsilons if entry["site"] == "north")
    assert north["share"] == pytest.approx(100 * 4.5 / 8)
    assert page.epsilon_chart is not None and "cap 8" in page.epsilon_chart[1]
    assert "56 percent of the cap" in report([federated.path]).read_text()


def test_long_tables_are_folded(federated):
    assert "<small>0.41 to 0.59</small>" in report([federated.path]).read_text()
    assert "<details open><summary>4 evaluations" in report([federated.path]).read_text()
    for place in range(4, 14):
        write_result(federated, f"round-{place:06d}", result(place, 4.0))
    assert "<details><summary>14 evaluations" in report([federated.path]).read_text()


def test_a_legend_of_many_lines_hides_none_of_them():
    few = line_chart([Series(f"s{n}", [0, 1], [0, n]) for n in range(3)], "x", "y")
    many = line_chart([Series(f"s{n}", [0, 1], [0, n]) for n in range(9)], "x", "y")

    def height(svg):
        return float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg).group(1))

    assert height(many) > height(few) + 40


def test_a_limit_has_no_markers():
    curve, limit = (line_chart([Series("cap", [0, 1], [8, 8], is_limit=kind)], "x", "y") for kind in (False, True))
    assert "var(--series-1)" in curve and "var(--series-1)" not in limit


@pytest.mark.parametrize("width", [400, 1400])
def test_browser_draws_the_page_without_complaint(federated, tmp_path, width):
    chromium = need_binary("chromium")
    page, shot = report([federated.path]), tmp_path / "shot.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--window-size={width},3000",
        f"--screenshot={shot}",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    picture = np.asarray(Image.open(shot).convert("RGB"))
    assert picture.shape[1] == width
    blue = (picture == np.array([0x0B, 0x63, 0xB5])).all(-1) | (picture == np.array([0x7A, 0xB8, 0xF5])).all(-1)
    assert blue.sum() > 100, "the first series' colour is on the page, so charts are drawn"
    assert (picture[:, -3:] == picture[0, 0]).all(), "nothing runs over the right edge"


@pytest.mark.parametrize(
    ("first", "last", "trend"),
    [
        ([18.0, 22.0], [10.0, 14.0], "down"),
        ([18.0, 22.0], [25.0, 27.0], "up"),
        ([18.0, 22.0], [14.0, 18.5], ""),
        ([18.0, 22.0], None, ""),
        (None, [1.0, 2.0], ""),
    ],
)
def test_a_change_has_a_colour_only_where_the_intervals_are_apart(first, last, trend):
    assert _trend(first, last) == trend


def test_one_evaluation_is_one_and_tells_no_change(central):
    page = report([central.path]).read_text()
    assert '<div class="headline">7</div>' in page and "1 evaluation<" in page
    assert "95 percent interval: 6.3 to 7.7" in page


def test_distances_of_other_numbers_of_images_do_not_make_one_curve(federated):
    write_result(federated, "few", result(3, 1.0) | {"num_images": 8})
    page = build_page(read_run(federated.path))
    assert [row.value for row in page.rows] == [20.0, 16.0, 12.0, 5.0]
    assert [[row.value for row in rows] for rows in page.others] == [[1.0]]


def test_every_distance_of_the_page_has_its_interval_and_number_of_images(federated):
    write_result(federated, "other", result(3, 100.0, reference="elsewhere"))
    assert "<td>100<small>90 to 110, 64 images</small>" in report([federated.path]).read_text()
    page = report([federated.path, federated.path], federated.path / "twice.html").read_text()
    assert page.count("<td>20<small>18 to 22, 64 images</small></td>") == 2


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"reference": None}, "reference"),
        ({"reference": {"name": "x", "n": "many"}}, "reference"),
        ({"num_images": "64"}, "num_images"),
        ({"metrics": {"fid": float("nan")}}, "metrics"),
        ({"metrics": {"fid": 1.0, "kid": "low"}}, "metrics"),
        ({"intervals": {"fid": [1.0]}}, "intervals"),
        ({"intervals": {"fid": [1.0, float("inf")]}}, "intervals"),
        ({"checkpoint": {"round": "last"}}, "num_images, round or step"),
    ],
)
def test_a_result_that_evaluate_did_not_write_is_one_line(central, change, line):
    write_result(central, "odd", result(3, 1.0) | change)
    with pytest.raises(InputError, match=rf"odd/result.json: no result of `evaluate` \({line}") as caught:
        read_run(central.path)
    assert "\n" not in str(caught.value)


def test_a_page_of_somebody_else_is_not_replaced(central, tmp_path):
    (tmp_path / "thesis.html").write_text("<title>years</title>")
    with pytest.raises(InputError, match="no page that `report` made"):
        report([central.path], tmp_path / "thesis.html")
    assert (tmp_path / "thesis.html").read_text() == "<title>years</title>"
    for _ in range(2):
        report([central.path], tmp_path / "own.html")
