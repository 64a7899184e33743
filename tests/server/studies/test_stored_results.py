import json
import math
import re
from typing import get_args

import pytest
from typer.testing import CliRunner

from server.cli import main as cli
from server.studies import stored_results
from server.studies.page import results_page
from server.studies.page.break_even import compared_points, count, head_start, verdict
from server.studies.page.derived import chosen_point, crossing, derive, distance_at
from server.studies.page.results_page import make_pages
from server.studies.stored_results import ArmResult, EndPoint, read_results, result_file, write_result
from server.studies.stored_toys import TOYS, ToyName
from server.studies.study_files import load_study
from shared.errors import InputError
from shared.student import mean_interval

NAME = "fd_onnx:net"
pytestmark = pytest.mark.usefixtures("charts_drawn_once")


def metrics(test, validation):
    def found(distance):
        return {NAME: {"distance": distance, "kernel": 0.01, "precision": 0.5, "recall": 0.25}}

    return {"test": found(test), "validation": found(validation)}


def make_result(study, arm, curve, *, init_flops=0.0, per_image=10.0, scale="cpu", copied=None, own=None, seed=0):
    """`curve`: (images, test distance, validation distance)."""
    facts = {"set": "faces.zip", "split": "train", "share": "1", "images": 90, "persons": 30, "sha256": "00"}
    init = {"arm": "x/y", "checkpoint": "ab", "images": 5, "steps": 1, "flops": init_flops} if init_flops else None
    points = [
        {"images": images, "steps": images, "flops": images * per_image, "metrics": metrics(test, validation)}
        | ({} if copied is None else {"copied": {"pixels": copied, NAME: copied / 3}})
        for images, test, validation in curve
    ]
    return ArmResult.model_validate(
        {
            "schema": 1,
            "study": study,
            "arm": arm,
            "scale": scale,
            "curve": points,
            "init": init,
            "experiment": {
                "model": {"size": "T", "image_size": 32, "patch_size": 4},
                "diffusion": {"prediction": "v"},
                "train": {"seed": seed},
            },
            "data": {"train": facts, "test": facts},
            "training_images": {} if own is None else metrics(own, own),
            "extractors": {NAME: "cd"},
            "measured": {"num_images": 500, "nfe": 10, "sampler": "dpm++"},
            "training_seconds": 60.0,
            "measuring_seconds": 5.0,
            "threads": 1,
            "hardware": "a processor",
            "versions": {},
            "commit": "0123456789abcdef",
            "command": "maskfed-server reproduce",
            "date": "2026-01-01",
        }
    )


def stored_of(*found):
    return {(result.study, result.scale, result.arm): result for result in found}


@pytest.fixture
def words_only(monkeypatch):
    """For tests of the page's words: nothing is drawn."""
    monkeypatch.setattr(results_page, "line_chart", lambda *_, **__: "<svg></svg>")


SCRATCH = make_result("acceleration", "scratch", [(100, 8.0, 8.0), (1000, 4.0, 4.0), (10_000, 2.0, 2.0)])
AFTER = make_result("acceleration", "after-pretraining", [(10, 6.0, 6.0), (1000, 1.0, 1.0)], init_flops=5000.0)


def test_a_curve_is_interpolated_over_the_logarithm_of_the_images():
    curve = [(100, 8.0), (1000, 4.0), (10_000, 2.0)]
    found = crossing(curve, 5.0)
    assert found is not None
    # Three quarters of the way from 8 to 4, so of the way from 10^2 to 10^3.
    assert found.images == pytest.approx(10**2.75)
    assert crossing(curve, 4.0).images == pytest.approx(1000)
    assert crossing(curve, 1.0) is None
    assert crossing(curve, 9.0).is_bound
    assert crossing(curve, 9.0).images == 100


def test_the_speedup_is_at_the_smallest_distance_that_both_reach_and_counts_pretraining():
    (found,) = derive(load_study("acceleration"), "acceleration", stored_of(SCRATCH, AFTER), "cpu")
    # Both reach 2: scratch at 10,000; the other four fifths of the way from 10 to 1000.
    ours = 10 ** (1 + 2 * 0.8)
    assert found.level == 2.0
    assert found.value == pytest.approx(10_000 / ours)
    assert found.flop_value == pytest.approx(10_000 * 10 / (5000 + ours * 10))
    assert found.bound == ""
    assert math.isclose(found.arm_value, ours)


def test_where_the_baseline_ends_closer_the_level_is_the_others_best():
    worse = make_result("acceleration", "after-pretraining", [(10, 6.0, 6.0), (1000, 4.0, 4.0)], init_flops=1.0)
    (found,) = derive(load_study("acceleration"), "acceleration", stored_of(SCRATCH, worse), "cpu")
    assert (found.level, found.value, found.is_as_claimed) == (4.0, 1.0, False)


@pytest.mark.parametrize(
    ("scratch", "after", "bound", "value"),
    [
        ([(100, 8.0), (1000, 4.0)], [(10, 3.0), (50, 2.0)], "at least", 100.0),
        ([(100, 4.0), (1000, 2.0)], [(10, 9.0), (50, 5.0)], "at most", 2.0),
    ],
)
@pytest.mark.usefixtures("words_only")
def test_a_level_below_a_first_point_bounds_the_speedup(scratch, after, bound, value, folder):
    first = make_result("acceleration", "scratch", [(images, test, test) for images, test in scratch])
    second = make_result("acceleration", "after-pretraining", [(images, test, test) for images, test in after])
    (found,) = derive(load_study("acceleration"), "acceleration", stored_of(first, second), "cpu")
    assert (found.bound, found.value) == (bound, pytest.approx(value))
    for result in (first, second):
        write_result(result, result_file(folder, "acceleration", "cpu", result.arm))
    assert f"**{bound} {value:.2f} times fewer images**" in make_pages(folder).texts[folder.parent / "RESULTS.md"]


def test_validation_chooses_the_point_and_test_is_reported():
    scratch = make_result("transfer", "scratch-10", [(100, 5.0, 3.0), (200, 1.0, 4.0)])
    other = make_result("transfer", "other-10", [(100, 3.0, 9.0), (200, 3.5, 1.0)])
    assert chosen_point(scratch).images == 100
    (found,) = derive(load_study("transfer"), "transfer", stored_of(scratch, other), "cpu")
    assert (found.arm_value, found.baseline_value) == (3.5, 5.0)
    assert found.value == pytest.approx(0.3)
    at_gpu = [each.model_copy(update={"scale": "gpu"}) for each in (scratch, other)]
    (found,) = derive(load_study("transfer"), "transfer", stored_of(*at_gpu), "gpu")
    assert (found.goal, found.is_reached) == (0.4, False)


@pytest.mark.usefixtures("words_only")
def test_a_reduction_also_says_how_it_is_at_equal_operations(folder):
    # The arm has used 90 + 10 * 1 operations: the baseline's curve is half way between 10 and 1000 there.
    scratch = make_result("transfer", "scratch-10", [(10, 8.0, 8.0), (1000, 4.0, 4.0)], per_image=1.0)
    other = make_result("transfer", "other-10", [(10, 4.5, 4.5)], init_flops=90.0, per_image=1.0)
    (found,) = derive(load_study("transfer"), "transfer", stored_of(scratch, other), "cpu")
    assert found.value == pytest.approx(-0.125)
    assert found.equal_flops_value == pytest.approx(0.25)
    assert distance_at(scratch, NAME, 1001) is None
    for result in (scratch, other):
        write_result(result, result_file(folder, "transfer", "cpu", result.arm))
    text = make_pages(folder).texts[folder.parent / "RESULTS.md"]
    assert "**12% higher** than 10 %, from scratch (4.5 against 4), 25% lower at equal operations" in text


def test_the_cost_of_federation_is_a_ratio_with_a_goal_from_above():
    one = make_result("federated", "one-site", [(100, 2.0, 2.0)], scale="gpu")
    four = make_result("federated", "four-sites", [(100, 2.1, 2.1)], scale="gpu")
    (found,) = derive(load_study("federated"), "federated", stored_of(one, four), "gpu")
    assert found.value == pytest.approx(1.05)
    assert found.is_reached


@pytest.mark.usefixtures("words_only")
def test_several_seeds_give_a_spread_of_arms_and_of_what_they_share(folder):
    # Ratios 1.05, 1.2 and 1.25; a fourth seed of one arm has no partner, and counts for that arm alone.
    ends = {0: (2.0, 2.1), 1: (3.0, 3.6), 2: (4.0, 5.0), 7: (5.0, None)}
    for seed, (one, four) in ends.items():
        for arm, value in (("one-site", one), ("four-sites", four)):
            if value is not None:
                result = make_result("federated", arm, [(100, value, value)], seed=seed)
                write_result(result, result_file(folder, "federated", "cpu", arm, seed))
    assert (folder / "federated-cpu-four-sites-seed-2.json").exists()
    text = make_pages(folder).texts[folder.parent / "RESULTS.md"]
    mean, low, high = mean_interval([2.0, 3.0, 4.0, 5.0])
    assert f"| `{NAME}` | one-site | 4 | {mean:.4g} | {low:.4g} to {high:.4g} | 2 | 5 |" in text
    middle, low, high = map(math.exp, mean_interval([math.log(each) for each in (1.05, 1.2, 1.25)]))
    assert f"over 3 seeds: **{middle:.3f}** [{low:.3f}, {high:.3f}], not told apart from 1." in text.replace("\n", " ")
    # What stands elsewhere on the page is of the smallest seed, and every seed says where it comes from.
    assert "**1.050** (2.1 against 2)" in text
    assert len(re.findall(r"\| 0123456789 \| a processor, 1 \|.*\| 7 \|", text)) == 1


def test_one_seed_has_no_spread(folder):
    write_result(SCRATCH, result_file(folder, "acceleration", "cpu", "scratch"))
    assert "Over seeds" not in make_pages(folder).texts[folder.parent / "RESULTS.md"]


def test_the_page_holds_what_the_results_say_and_lists_what_has_not_run(folder):
    for result in (SCRATCH, AFTER):
        write_result(result, result_file(folder, result.study, result.scale, result.arm))
    pages = make_pages(folder)
    text = pages.texts[folder.parent / "RESULTS.md"]
    assert "**25.12 times fewer images**" in text
    assert "and 11.13 times fewer operations" in text
    assert "1 of 1 figures go the way" in text
    assert "Not run: pretrain, pretrain-long, after-long (`maskfed-server reproduce acceleration --scale cpu`)" in text
    assert "No arm has run (`maskfed-server reproduce transfer --scale gpu`)" in text
    assert "| 10 % | 37.17 | 24.59 | 20.71 | reported by the paper |" in text
    assert "| 0123456789 | a processor, 1 | 2026-01-01 | 60.0 s | 5.0 s | 500 | 0 |" in text
    plots = [path for path in pages.texts if path.suffix == ".svg"]
    assert [path.name for path in plots] == ["acceleration-cpu-fd_onnx-net.svg"]
    assert "results/acceleration-cpu-fd_onnx-net.svg" in text
    svg = pages.texts[plots[0]]
    assert svg.startswith("<svg")
    # A file of its own knows its colours, light and dark, and has no date.
    assert svg.count("--series-1:#") == 2
    assert "prefers-color-scheme:dark" in svg
    assert "202" not in "".join(part for part in svg.split(">") if "date" in part)


@pytest.mark.parametrize(
    ("distances", "words"),
    [
        # The baseline is at 6, 5 and 4 after 100, 316 and 1000 operations.
        ((7.0, 4.5, 3.5), "ahead from 316.2 TFLOP (226 images of its own stage) on"),
        (
            (5.5, 4.5, 3.5),
            "ahead at every point that both curves reach, from 100 TFLOP (10 images of its own stage) on",
        ),
        ((5.5, 4.5, 4.5), "behind at the last point that both curves reach, 1,000 TFLOP (910 images of its own stage)"),
        ((7.0, 5.5, 4.5), "behind at the last point"),
    ],
)
@pytest.mark.usefixtures("words_only")
def test_the_page_says_from_which_scale_on_an_arm_pays_at_equal_operations(distances, words, folder):
    tera = 1e12
    scratch = make_result("transfer", "scratch-10", [(10, 8.0, 8.0), (1000, 4.0, 4.0)], per_image=tera)
    curve = [(images, each, each) for images, each in zip((10, 226.2, 910), distances, strict=True)]
    other = make_result(
        "transfer",
        "other-10",
        [(int(images), test, test) for images, test, _ in curve],
        init_flops=90 * tera,
        per_image=tera,
    )
    compared = compared_points(other, scratch, NAME)
    assert [place.baseline for place in compared] == pytest.approx([6.0, 5.0, 4.0], abs=0.002)
    # From 8 to 4 the baseline needs two powers of ten of its images; below 4 it never gets.
    for place in compared:
        expected = None if place.distance < 4 else pytest.approx(10 ** (1 + (8 - place.distance) / 2))
        assert place.needed == expected
    for result in (scratch, other):
        write_result(result, result_file(folder, "transfer", "cpu", result.arm))
    text = make_pages(folder).texts[folder.parent / "RESULTS.md"]
    title = "10 %, after pre-training on the other set, against 10 %, from scratch"
    assert f"- `fd_onnx:net`: {title}: {words.replace('316.2', '316')}" in text
    assert "; the stages before saved " in text
    beginning = (
        f"| `fd_onnx:net` | other-10 | 10 | 100 | {distances[0]:g} | scratch-10 | 6 | {distances[0] / 6 - 1:+.0%} |"
    )
    needed = 10 ** (1 + (8 - distances[0]) / 2)
    assert f"{beginning} {count(needed)} | {needed / 10:.1f} |" in text


def test_the_page_says_what_the_stages_before_saved_and_what_they_cost(folder):
    # The baseline is at 6, 5 and 4 after 100, 316 and 1000 images: 90, 297 and 960 are saved.
    scratch = make_result("transfer", "scratch-10", [(10, 8.0, 8.0), (1000, 4.0, 4.0)], per_image=1e12)
    curve = [(10, 6.0, 6.0), (19, 5.0, 5.0), (40, 4.0, 4.0), (50, 3.0, 3.0)]
    other = make_result("transfer", "other-10", curve, init_flops=90e12, per_image=1e12)
    said = head_start(compared_points(other, scratch, NAME), other, scratch)
    assert said == "; the stages before saved 90 to 960 images, median 297, worth 297.2 TFLOP, and cost 90"
    worse = make_result("transfer", "other-10", [(500, 6.0, 6.0)], init_flops=90e12, per_image=1e12)
    assert head_start(compared_points(worse, scratch, NAME), worse, scratch) == (
        "; the stages before saved no images (median -400)"
    )
    alone = make_result("transfer", "other-10", curve, per_image=1e12)
    assert head_start(compared_points(alone, scratch, NAME), alone, scratch) == ""


def test_curves_without_operations_in_common_are_not_compared():
    scratch = make_result("transfer", "scratch-10", [(10, 8.0, 8.0), (20, 4.0, 4.0)])
    other = make_result("transfer", "other-10", [(10, 5.0, 5.0)], init_flops=1e6)
    assert verdict(compared_points(other, scratch, NAME)) == "the two curves have no number of operations in common"


@pytest.mark.usefixtures("words_only")
def test_a_distance_shows_its_interval_and_the_page_says_how_many_arms_have_one(folder):
    def page():
        (text,) = [text for path, text in make_pages(folder).texts.items() if path.name == results_page.PAGE_NAME]
        return text

    write_result(SCRATCH, result_file(folder, "acceleration", "cpu", "scratch"))
    assert "one: 0 of the 1 arms with distances have." in page() and "| 2 | 0.01 |" in page()
    tree = SCRATCH.model_dump(mode="json", by_alias=True)
    for point in tree["curve"]:
        for found in point["metrics"].values():
            ends = {"distance_low": 1.25, "distance_high": 2.75, "kernel_low": 0.005, "kernel_high": 0.015}
            found[NAME] |= ends
    write_result(ArmResult.model_validate(tree), result_file(folder, "acceleration", "cpu", "scratch"))
    assert "one: 1 of the 1 arms with distances have." in page()
    assert "| 2 (1.25 to 2.75) | 0.01 (0.005 to 0.015) |" in page()


@pytest.mark.usefixtures("words_only")
def test_copies_stand_beside_the_distances_and_what_copying_everything_would_get(folder):
    scratch = make_result("transfer", "scratch-10", [(10, 8.0, 8.0), (20, 4.0, 4.0)], copied=0.375, own=0.7)
    other = make_result("transfer", "other-10", [(10, 5.0, 5.0)])
    for result in (scratch, other):
        write_result(result, result_file(folder, "transfer", "cpu", result.arm))
    text = make_pages(folder).texts[folder.parent / "RESULTS.md"]
    assert "| `fd_onnx:net` | scratch-10 | 20 | 4 | 0.01 | 0.5 | 0.25 | 37.5% | 12.5% | 0.7 |" in text
    assert "| `fd_onnx:net` | other-10 | 10 | 5 | 0.01 | 0.5 | 0.25 | – | – | – |" in text
    assert "| scratch-10 | 10 | 1e-10 | 8 | 37.5% |" in text
    assert "| `fd_onnx:net` | 10 % | 4 (38% copied) | – | 5 (+25%) |" in text


@pytest.mark.usefixtures("words_only")
def test_the_end_of_an_arm_with_many_images_has_a_table_of_its_own(folder):
    def page():
        return make_pages(folder).texts[folder.parent / "RESULTS.md"]

    write_result(SCRATCH, result_file(folder, "acceleration", "cpu", "scratch"))
    assert "At the end of the arms" not in page()
    values = {"distance": 12.5, "distance_low": 12.0, "distance_high": 13.0, "kernel": 0.25}
    end = EndPoint(
        num_images=5000,
        metrics={"fid": values, stored_results.HELD_OUT_LOSS: {"distance": 0.1}},
        extractors={"fid": "0123456789abcdef"},
        seconds=7.5,
    )
    measured = SCRATCH.model_copy(update={"end": end})
    write_result(measured, result_file(folder, "acceleration", "cpu", "scratch"))
    assert read_results(folder)["acceleration", "cpu", "scratch"] == [measured]
    text = page()
    assert "| `fid` | scratch | 5,000 | 12.5 (12 to 13) | 0.25 | – | – | 0123456789ab |" in text
    assert f"| `{stored_results.HELD_OUT_LOSS}` | scratch |" not in text


def test_results_on_synthetic_faces_are_apart_and_have_pictures(folder):
    write_result(SCRATCH, result_file(folder, "acceleration", "cpu", "scratch"))
    (folder / "synthetic").mkdir()
    write_result(AFTER, result_file(folder / "synthetic", "acceleration", "cpu", "after-pretraining"))
    (folder / "synthetic" / "acceleration-cpu-after-pretraining.png").touch()
    (folder / "synthetic" / "acceleration-cpu-old.svg").touch()
    pages = make_pages(folder)
    real, synthetic = pages.texts[folder.parent / "RESULTS.md"].split("### Acceleration, scale `cpu`, synthetic faces")
    assert "Not run: pretrain, after-pretraining" in real
    assert "after-pretraining |" not in real
    assert "from top to bottom after 10, 1,000 images; one column, one noise:" in synthetic
    assert "![after-pretraining](results/synthetic/acceleration-cpu-after-pretraining.png)" in synthetic
    assert "(results/synthetic/acceleration-cpu-fd_onnx-net.svg)" in synthetic
    assert folder / "synthetic" / "acceleration-cpu-old.svg" in pages.stale()


@pytest.mark.usefixtures("words_only")
def test_a_missed_goal_says_by_how_much(folder):
    one = make_result("federated", "one-site", [(100, 2.0, 2.0)], scale="gpu")
    four = make_result("federated", "four-sites", [(100, 3.0, 3.0)], scale="gpu")
    for result in (one, four):
        write_result(result, result_file(folder, result.study, result.scale, result.arm))
    text = make_pages(folder).texts[folder.parent / "RESULTS.md"]
    assert "4 sites over 1 site: **1.500** (3 against 2); goal 1.1: missed by 0.4." in text
    assert "0 of 1 figures go the way" in text
    assert "Against it: 4 sites by `fd_onnx:net`" in text


def test_the_same_results_give_the_same_bytes_and_check_finds_what_is_stale(folder):
    write_result(SCRATCH, result_file(folder, "acceleration", "cpu", "scratch"))
    first = make_pages(folder)
    assert first.texts == make_pages(folder).texts
    first.write()
    assert make_pages(folder).stale() == []
    page, plot = folder.parent / "RESULTS.md", folder / "acceleration-cpu-fd_onnx-net.svg"
    page.write_text(page.read_text() + " ")
    plot.unlink()
    (folder / "acceleration-cpu-old.svg").write_text("<svg/>")
    write_result(AFTER, result_file(folder, "acceleration", "cpu", "after-pretraining"))
    assert set(make_pages(folder).stale()) == {page, plot, folder / "acceleration-cpu-old.svg"}
    make_pages(folder).write()
    assert make_pages(folder).stale() == []


def test_the_committed_page_and_plots_are_those_of_the_committed_results():
    assert CliRunner().invoke(cli.app, ["report", "--results", "--check"]).output == ""


def test_check_exits_with_1_where_the_page_is_stale(folder, monkeypatch):
    monkeypatch.setattr(results_page, "make_pages", lambda: make_pages(folder))
    done = CliRunner().invoke(cli.app, ["report", "--results", "--check"])
    assert (done.exit_code, done.output.count("stale: ")) == (1, 1)
    assert CliRunner().invoke(cli.app, ["report", "--results"]).exit_code == 0
    assert CliRunner().invoke(cli.app, ["report", "--results", "--check"]).exit_code == 0


def test_only_synthetic_faces_and_toys_have_pictures():
    pictures = {path.relative_to(stored_results.FOLDER).as_posix() for path in stored_results.FOLDER.rglob("*.png")}
    allowed = {f"{TOYS}/{name}.png" for name in get_args(ToyName)}
    assert all(name.startswith(f"{stored_results.SYNTHETIC}/") or name in allowed for name in pictures)
    for result, *_ in read_results(stored_results.FOLDER / stored_results.SYNTHETIC).values():
        assert {str(part["set"]) for part in result.data.values()} <= {"4000 synthetic faces", "10000 synthetic faces"}


def test_stored_results_hold_numbers_only_and_no_path():
    everything = [
        *read_results(stored_results.FOLDER).items(),
        *read_results(stored_results.FOLDER / stored_results.SYNTHETIC).items(),
    ]
    for (study, _, arm), result in [(key, each) for key, results in everything for each in results]:
        assert arm in load_study(study).arms
        assert "/" not in "".join(str(part["set"]) for part in result.data.values())
        text = json.dumps(result.model_dump(mode="json"))
        assert not re.findall(r"[\s\"'=:](?:~|[A-Za-z]:)?[/\\][\w.-]+", text)
        assert ".png" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree | {"schema": 2}, "schema 2, this version reads 1"),
        (lambda tree: tree | {"colour": 1}, "unknown key 'colour'"),
        (lambda tree: tree | {"curve": []}, "curve"),
        (lambda tree: tree | {"arm": "other"}, "give it that name"),
        (lambda _tree: [], "schema None"),
    ],
)
def test_a_result_of_another_kind_is_refused_in_one_line(change, words, folder):
    file = result_file(folder, "acceleration", "cpu", "scratch")
    write_result(SCRATCH, file)
    assert read_results(folder)["acceleration", "cpu", "scratch"] == [SCRATCH]
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError) as refusal:
        read_results(folder)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_torn_result_and_one_of_an_unknown_arm_are_refused(folder):
    (folder / "acceleration-cpu-scratch.json").write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        make_pages(folder)
    (folder / "acceleration-cpu-scratch.json").unlink()
    write_result(make_result("acceleration", "none", [(1, 1.0, 1.0)]), folder / "acceleration-cpu-none.json")
    with pytest.raises(InputError, match="no such arm"):
        make_pages(folder)
