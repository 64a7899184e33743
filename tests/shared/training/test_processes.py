import pytest

from shared.errors import InputError
from shared.training.processes import joined_world


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR is not set: start the command by torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "do not meet .*torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "no host", "MASTER_PORT": "1"}, "do not meet .*torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, WORLD_SIZE 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ],
)
def test_an_environment_that_no_torchrun_made_is_one_line(monkeypatch, given, line):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=line) as caught, joined_world():
        pass
    assert "\n" not in str(caught.value)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_world() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
