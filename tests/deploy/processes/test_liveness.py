"""Three misses in a row make a service hang; one answer, or a new start, begins the count again."""

from deploy.processes.liveness import MOST_MISSES, Liveness


def test_three_misses_in_a_row_count_and_an_answer_begins_again():
    answers = iter([False, False, True, False, False, False, True])
    liveness = Liveness({"a": lambda: next(answers), "b": lambda: True})
    hung = []
    for _ in range(7):
        liveness.check()
        hung.append((liveness.hangs("a"), liveness.hangs("b")))
    assert MOST_MISSES == 3
    assert [a for a, _ in hung] == [False, False, False, False, False, True, False]
    assert not any(b for _, b in hung)


def test_a_service_that_was_just_started_has_missed_nothing():
    liveness = Liveness({"a": lambda: False})
    for _ in range(MOST_MISSES):
        liveness.check()
    assert liveness.hangs("a")
    liveness.forget("a")
    assert not liveness.hangs("a")
    assert not liveness.hangs("unknown")


def test_a_check_that_fails_itself_is_a_miss_and_ends_nothing():
    def broken() -> bool:
        raise OSError("no route")

    liveness = Liveness({"a": broken, "b": lambda: False})
    for _ in range(MOST_MISSES):
        liveness.check()
    assert liveness.hangs("a")
    assert liveness.hangs("b")
