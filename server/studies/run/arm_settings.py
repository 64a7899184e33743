"""What the arms of studies run on: images, extractors, folders."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ArmSettings:
    """Where images and extractors come from, and where everything goes.

    Attributes:
        public: folder or zip; empty: synthetic faces.
        private: the same, a folder per person where persons are known.
        extractors: as of `shared.evaluation.networks.load_extractor`; the first one chooses among points.
        weights: file of the Inception weights, for the extractors that take one.
        weights_sha256: their digest, where it is not the published file.
        root: folder of all runs.
        results: folder that a finished result is copied to; that of synthetic faces goes to a folder in it.
        seed: of the training, and of the arms that it starts from.
        device: for sampling and features; empty: a GPU where there is one.
        say: told what happens.
        on_progress: told items done and in all.
    """

    public: str
    private: str
    extractors: tuple[str, ...]
    weights: Path | None
    root: Path
    results: Path
    seed: int = 0
    device: str = ""
    say: Callable[[str], None] = field(default=lambda _line: None, compare=False)
    weights_sha256: str = ""
    on_progress: Callable[[int, int], None] = field(default=lambda _done, _total: None, compare=False)

    def command(self, study: str, scale: str, arm: str) -> str:
        """What to type for one arm, with the names of files only."""
        words = ["maskfed-server", "reproduce", study, "--scale", scale, "--arm", arm]
        for option, value in (("--public", self.public), ("--private", self.private)):
            words += [option, Path(value).name] if value else []
        for spec in self.extractors:
            kind, is_file, file = spec.partition("onnx:")
            words += ["--extractor", f"{is_file}{Path(file).name}" if is_file else kind]
        words += ["--weights", self.weights.name] if self.weights else []
        words += ["--seed", str(self.seed)] if self.seed else []
        return shlex.join([*words, *(["--weights-sha256", self.weights_sha256] if self.weights_sha256 else [])])
