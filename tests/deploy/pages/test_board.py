import asyncio
import json
import threading

import pytest

from deploy.pages.board import Board


def part(name: str, value: object) -> dict[str, object]:
    return {"id": name, "value": value}


def ids(lines: bytes) -> list[str]:
    return [json.loads(line)["id"] for line in lines.splitlines()]


def test_only_parts_that_changed_are_sent_again():
    board = Board(list)
    board.take([part("a", 1), part("b", 2)])
    number, lines = board.newer(0)
    assert ids(lines) == ["order", "a", "b"]
    board.take([part("a", 1), part("b", 2)])
    assert board.newer(number) == (number, b"")
    board.take([part("a", 1), part("b", 3)])
    number, lines = board.newer(number)
    assert ids(lines) == ["b"]
    board.take([part("b", 3), part("c", 4)])
    assert ids(board.newer(number)[1]) == ["order", "c"]


def test_whoever_comes_later_gets_everything():
    board = Board(list)
    for value in range(5):
        board.take([part("a", value)])
    assert [json.loads(line) for line in board.newer(0)[1].splitlines()][1] == part("a", 4)


def test_files_are_read_only_while_somebody_watches_and_once_for_all():
    read, alone = [], threading.Lock()

    def look() -> list[dict[str, object]]:
        assert alone.acquire(blocking=False)
        read.append(len(read))
        alone.release()
        return [part("a", len(read))]

    async def run() -> None:
        board = Board(look, look_seconds=0.001)
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await asyncio.sleep(0.02)
        assert read == []
        async with board.watched(), board.watched():
            number = 0
            for _ in range(3):
                await board.changed(number, gone, 10)
                number, lines = board.newer(number)
                assert lines
        count = len(read)
        await asyncio.sleep(0.05)
        assert count <= len(read) <= count + 1  # a look that had begun

    asyncio.run(run())


def test_what_cannot_be_read_is_told_and_read_again(caplog: pytest.LogCaptureFixture):
    answers: list[object] = [[part("a", 1)], ValueError("secret text of /home/x"), [part("a", 2)]]

    def look() -> list[dict[str, object]]:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[return-value]

    async def run() -> list[list[str]]:
        board, seen = Board(look, look_seconds=0.001), []
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with board.watched():
            number = 0
            while len(seen) < 3:
                await board.changed(number, gone, 10)
                number, lines = board.newer(number)
                assert b"secret" not in lines
                seen.append(ids(lines))
        return seen

    assert asyncio.run(run()) == [["order", "a"], ["order", "problem"], ["order", "a"]]
    assert "ValueError: secret text" in caplog.text


def test_a_number_that_json_does_not_have_is_refused_before_it_is_sent():
    with pytest.raises(ValueError, match="JSON"):
        Board(list).take([part("a", float("nan"))])
