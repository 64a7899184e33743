"""API.md: every example is run, in the order of the page and in one folder."""

import importlib.util
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.runs.run_directory import RunDir
from tests.small_network import SEEN_SIDE

pytestmark = pytest.mark.full_size

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "API.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory):
    """Names of the page after all examples; the two that take hours stop where their training would begin."""
    from server.simulation import simulate
    from server.studies.run import reproduce
    from server.training import watch
    from shared.evaluation import random_inception

    folder, before = tmp_path_factory.mktemp("api"), Path.cwd()
    names: dict[str, object] = {"__name__": "api"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "GRID_IMAGES", 2)
        patch.setattr(random_inception, "RANDOM_SIDE", SEEN_SIDE)
        patch.setattr(simulate, "_follow", lambda *_: 0)
        patch.setattr(simulate, "simulation_runtime", _no_runtime)
        patch.setattr(reproduce.Job, "run", lambda job: job.folder)
        patch.setattr("importlib.util.find_spec", _with_ray)
        (folder / "server").symlink_to(ROOT / "server")
        os.chdir(folder)
        try:
            for number, example in enumerate(EXAMPLES, 1):
                exec(compile(example, f"API.md, example {number}", "exec"), names)
        finally:
            os.chdir(before)
    return SimpleNamespace(folder=folder, **names)


class _no_runtime:  # noqa: N801
    def __init__(self, _folder):
        pass

    def __enter__(self):
        return SimpleNamespace(submit=lambda *_: 1)

    def __exit__(self, *_):
        pass


_find_spec = importlib.util.find_spec


def _with_ray(name, package=None):
    return _find_spec(name, package) or (SimpleNamespace(name=name) if name == "ray" else None)


def test_the_page_covers_what_it_promises():
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert headings == ["Load and sample", "Train", "Evaluate", "Simulate", "Studies", "A model elsewhere"]
    assert len(EXAMPLES) >= 9


def test_examples_give_what_they_say(ran):
    assert (ran.loaded.experiment.model.size, ran.loaded.nfe) == ("T", 4)
    assert (ran.folder / "grid.png").is_file() and ran.x_t.shape == (2, 3, 32, 32)
    assert RunDir(ran.folder / "trained").latest.name.endswith("2")
    assert ran.result["reference"]["n"] == 16
    assert ran.loss.losses.shape == (8,) and 0 < ran.loss.losses.mean() < 4
    assert ran.status == 0 and (ran.folder / "simulated" / "site.toml").is_file()
    assert ("acceleration", "cpu", "scratch") in ran.stored
    assert (ran.folder / "back" / "meta.json").is_file() and (
        ran.folder / "for-diffusers" / "model_index.json"
    ).is_file()
