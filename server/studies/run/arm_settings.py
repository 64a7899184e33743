"""What the arms of studies run on: images, extractors, folders."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shared.errors import InputError
from shared.evaluation.extractor import Extractor
from shared.evaluation.networks import INCEPTION, load_extractor


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
        end_extractors: of one more measurement at the end of each arm, as of the others; none: it is not made.
        end_images: generated for it.
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
    end_extractors: tuple[str, ...] = ()
    end_images: int = 0
    on_progress: Callable[[int, int], None] = field(default=lambda _done, _total: None, compare=False)

    def command(self, study: str, scale: str, arm: str) -> str:
        """What to type for one arm, with the names of files only."""
        words = ["maskfed-server", "reproduce", study, "--scale", scale, "--arm", arm]
        for option, value in (("--public", self.public), ("--private", self.private)):
            words += [option, Path(value).name] if value else []
        for option, specs in (("--extractor", self.extractors), ("--end-extractor", self.end_extractors)):
            for spec in specs:
                kind, is_file, file = spec.partition("onnx:")
                words += [option, f"{is_file}{Path(file).name}" if is_file else kind]
        words += ["--end-images", str(self.end_images)] if self.end_extractors else []
        words += ["--weights", self.weights.name] if self.weights else []
        words += ["--seed", str(self.seed)] if self.seed else []
        return shlex.join([*words, *(["--weights-sha256", self.weights_sha256] if self.weights_sha256 else [])])


def open_extractors(settings: ArmSettings, device: torch.device) -> tuple[list[Extractor], list[Extractor]]:
    """The networks of the points, and those of the end.

    Raises:
        InputError: an unknown network, a file that is missing or another one, or weights that no network takes.
    """
    specs = (*settings.extractors, *settings.end_extractors)
    if settings.weights and not any(_takes_weights(spec) for spec in specs):
        raise InputError(f"--weights {settings.weights}: no extractor takes it, give one such as {INCEPTION}")

    def opened(specs: Sequence[str]) -> list[Extractor]:
        return [
            load_extractor(
                spec,
                weights=settings.weights,
                weights_sha256=settings.weights_sha256 if _takes_weights(spec) else "",
                device=device,
            )
            for spec in specs
        ]

    return opened(settings.extractors), opened(settings.end_extractors)


def _takes_weights(spec: str) -> bool:
    return spec.startswith(("inception", "clip"))
