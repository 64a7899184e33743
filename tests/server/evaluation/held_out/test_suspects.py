"""A loss that is the distance of the weights from where honest sites go, so that every answer is known."""

import numpy as np
import pytest

from server.evaluation.held_out.suspects import find_suspects
from server.federation.acceptance.kept_replies import KeptReplies, Reply, StoredReplies

SIZE = 40
GOAL = np.linspace(-0.1, 0.1, SIZE)
BEFORE = {"all": 1.0 + float(np.abs(GOAL).sum())}


@pytest.fixture
def suspects(tmp_path):
    """Suspects of a round with the given updates; honest ones go to GOAL, each with an error of its own."""

    def find(poisoned, num_sites=9, bound=0.1, breaks_at=np.inf):
        random, kept = np.random.default_rng(1), KeptReplies(tmp_path / "replies")
        for number in range(num_sites):
            honest = GOAL + random.normal(scale=0.01, size=SIZE)
            update = poisoned.get(number, honest).astype(np.float32)
            kept.keep(Reply(f"site-{number}", 1 + number % 2, 1.0), update)
        kept.close()

        def losses_after(total):
            mean = total.mean(total.total_weight)
            distance = np.abs(mean - GOAL)
            return {"all": np.nan if distance.max() > breaks_at else 1.0 + float(distance.sum())}

        return find_suspects(StoredReplies(tmp_path / "replies", "float32"), SIZE, losses_after, BEFORE, bound)

    return find


def test_one_bad_site_is_named_alone(suspects):
    assert suspects({6: np.full(SIZE, 3.0)}) == ["site-6"]


def test_two_that_act_together_are_both_named(suspects):
    assert sorted(suspects({3: np.full(SIZE, 1.5), 7: np.full(SIZE, 1.4)})) == ["site-3", "site-7"]


def test_a_loss_that_is_not_finite_with_a_site_in_it_is_that_sites(suspects):
    assert suspects({2: np.full(SIZE, 4.0)}, num_sites=3, breaks_at=0.5) == ["site-2"]


def test_nobody_is_named_where_no_minority_explains_the_jump(suspects):
    everybody = {number: np.full(SIZE, 3.0) for number in range(9)}
    assert suspects(everybody) == []
    assert suspects({0: np.full(SIZE, 3.0)}, num_sites=1) == []
