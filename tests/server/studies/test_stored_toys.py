"""Stored toys: what is refused, and what the page makes of them."""

import json

import pytest

from server.studies.page import results_page
from server.studies.page.results_page import make_pages
from server.studies.page.toy_table import toy_table
from server.studies.stored_toys import ToyResult, read_toys
from shared.errors import InputError

# Energy distances of three seeds at two budgets: masked stage alone, both stages, from scratch.
SEEDS = [
    [(0.30, 0.10, 0.20), (0.09, 0.020, 0.019)],
    [(0.40, 0.11, 0.22), (0.08, 0.031, 0.030)],
    [(0.50, 0.15, 0.24), (0.10, 0.010, 0.013)],
]


def make_toy(name="rose", seeds=SEEDS):
    def point(operations, values):
        steps = {"operations": operations, "masked_steps": 3, "denoising_steps": 4}
        return steps | dict(zip(("proxy", "two_stages", "scratch"), values, strict=True))

    runs = [
        {
            "seed": seed,
            "points": [point(operations, values) for operations, values in zip((500, 2000), found, strict=True)],
            "floor": 0.001 * seed,
            "independent": 0.2 + 0.01 * seed,
        }
        for seed, found in enumerate(seeds)
    ]
    facts = {"threads": 1, "hardware": "a processor", "commit": "0123456789abcdef", "date": "2026-01-01"}
    return {
        "name": name,
        "num_samples": 4000,
        "runs": runs,
        "seconds": 61.5,
        "command": f"maskfed-server toy {name}",
        **facts,
    }


def store(folder, tree, name=None):
    place = folder / "toys" / f"{name or tree['name']}.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(tree))
    return place


def test_both_ways_are_paired_by_seed_and_judged_by_the_interval_of_their_difference():
    table = toy_table(ToyResult.model_validate(make_toy()), "rose.png")
    near, level = table.rows
    # Differences -0.10, -0.11 and -0.09: mean -0.1, deviation 0.01, Student's 4.303 over the root of three.
    half = 4.303 * 0.01 / 3**0.5
    assert near.difference == pytest.approx((-0.1, -0.1 - half, -0.1 + half), rel=1e-6)
    assert near.verdict == "both stages nearer"
    assert (near.proxy, near.two_stages, near.scratch) == pytest.approx((0.4, 0.12, 0.22))
    assert level.verdict == "not told apart"
    assert (table.floor, near.independent) == pytest.approx((0.001, 0.21))
    # From scratch 0.22, so above what independent coordinates have; both stages at 0.3 are too then.
    later = [[(proxy, both + 0.2, scratch + 0.01) for proxy, both, scratch in found] for found in SEEDS]
    too_short = toy_table(ToyResult.model_validate(make_toy(seeds=later)), "").rows[0]
    assert too_short.verdict == "from scratch nearer, both no nearer than independent coordinates: too short"
    turned = [[(proxy, scratch, both) for proxy, both, scratch in found] for found in SEEDS]
    assert toy_table(ToyResult.model_validate(make_toy(seeds=turned)), "").rows[0].verdict == "from scratch nearer"
    alone = toy_table(ToyResult.model_validate(make_toy(seeds=SEEDS[:1])), "").rows[0]
    assert (alone.difference, alone.verdict) == (None, "one seed tells nothing")


def test_the_page_shows_toys_where_there_are_some(folder):
    def page():
        return make_pages(folder).texts[folder.parent / results_page.PAGE_NAME]

    assert "Figure 2)" not in page()
    store(folder, make_toy())
    text = page()
    assert "| rose | 500 | 0.4 | 0.12 | 0.22 | -0.1 [-0.12, -0.075] | both stages nearer |" in text
    assert "| rose | 2,000 |" in text and "| not told apart |" in text
    assert "![rose](results/toys/rose.png)" in text
    assert "| `maskfed-server toy rose` | 0123456789 | a processor, 1 | 2026-01-01 | 61.5 s | 4,000 | 0, 1, 2 |" in text


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (lambda tree: tree | {"colour": 1}, "rose", "unknown key 'colour'"),
        (lambda tree: tree | {"runs": []}, "rose", "runs"),
        (lambda tree: tree | {"name": "tulip"}, "tulip", "name"),
        (lambda tree: tree, "swiss-roll", "give it that name"),
        (lambda _tree: [], "rose", "rose.json"),
    ],
)
def test_a_wrong_toy_is_refused_in_one_line(change, name, words, folder):
    store(folder, change(make_toy()), name)
    with pytest.raises(InputError) as refusal:
        read_toys(folder / "toys")
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_seeds_with_other_budgets_and_torn_files_are_refused(folder):
    tree = make_toy()
    tree["runs"][1]["points"][1]["operations"] = 9000
    store(folder, tree)
    with pytest.raises(InputError, match="seeds have other budgets"):
        read_toys(folder / "toys")
    (folder / "toys" / "rose.json").write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        make_pages(folder)
