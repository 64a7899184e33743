"""What a demo is asked for, and the folder it has for itself."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.errors import InputError
from shared.storage.files import locked

MARK, REPORT = ".maskfed-demo", "report.html"
"""The first file that a demo writes, and its last."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo shows.

    Attributes:
        public: public images for the pre-training; None: synthetic ones.
        faces: private images, divided by person among the sites and the evaluator; None: synthetic ones.
        num_sites: sites on this machine.
        rounds: fine-tuning rounds.
        out: new folder for all that the demo makes.
        port: first port to use; 0: any free ones.
        is_private: whether sites train with differential privacy only, which needs the synthetic faces.
    """

    public: Path | None
    faces: Path | None
    num_sites: int
    rounds: int
    out: Path
    port: int = 0
    is_private: bool = True


@contextmanager
def own_folder(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the demo's folder; what an interrupted demo has left there is removed first.

    Raises:
        InputError: the folder holds something else, a finished demo, or one that is running.
    """
    mark = out / MARK
    if out.exists() and any(out.iterdir()) and (not mark.is_file() or (out / REPORT).exists()):
        raise InputError(f"demo: folder {out} is not empty: give another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    with locked(mark, f"demo: folder {out} is in use by"):
        left = [each for each in out.iterdir() if each != mark]
        if left:
            say(f"folder {out} holds an interrupted demo, which is removed")
        for each in left:
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
        yield
