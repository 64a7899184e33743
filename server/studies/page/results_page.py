"""`server/RESULTS.md` and its plots, written from stored results alone: no number in it is typed by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.report.svg_charts import Series, is_same_drawing, line_chart, standalone
from server.studies import stored_results
from server.studies.page.break_even import equal_operations
from server.studies.page.derived import curve_to_test, derive
from server.studies.page.results_text import (
    Results,
    arms_table,
    curves_table,
    distances_table,
    grid_table,
    picture_caption,
    provenance,
    reading,
    reported,
    sentence,
    setting,
)
from server.studies.schema import SCALES, Scale, Study, arms_at, load_study, study_names
from server.studies.stored_results import ArmResult, read_results, result_file
from shared.errors import InputError
from shared.storage.files import write_atomically

PAGE_NAME, REPORTED_FILE = "RESULTS.md", "reported.toml"
HEADER = """# Results

Written by `maskfed-server report --results` from the files in [results](results); do not edit by hand. Studies are data
files in [studies/definitions](studies/definitions); an arm runs with `maskfed-server reproduce STUDY --scale SCALE
--arm ARM`.

How to read it: distances are Frechet distances between features of generated images and of the test split
(`fd_onnx:NAME`: the features of an ONNX network; only the Inception-2015 weights give an FID), lower is closer;
"kernel" is the kernel distance (KID where the distance is an FID). Splits never share a person. What is reported of an
arm is its point of least distance to the validation split by the first extractor; the test split decides nothing. One
seed: differences of a few percent are noise.

A distance does not ask whose faces it sees. "copied" is the share of generated images that the memorisation audit
calls copies of training images, by pixels (mirrored ones as well) and by the features of the extractor, which may be
wrong on images that are no faces yet; "training images themselves" is the distance that a model would get which only
hands out its training images, each equally often.
"""


@dataclass(frozen=True)
class Pages:
    """Texts of the page and of its plots, by path."""

    texts: dict[Path, str]
    folder: Path
    """Of the results."""

    def write(self) -> None:
        """Write all; plots that no result gives any more go."""
        for path, text in self.texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        for path in self._left_over():
            path.unlink()

    def stale(self) -> list[Path]:
        """Files that are missing, say something else than the results, or should not be there."""
        wrong = [path for path, text in self.texts.items() if not path.is_file() or not _is_same(path, text)]
        return [*wrong, *self._left_over()]

    def _left_over(self) -> list[Path]:
        found = {
            plot for folder in (self.folder, self.folder / stored_results.SYNTHETIC) for plot in folder.glob("*.svg")
        }
        return sorted(found - set(self.texts))


def _is_same(path: Path, text: str) -> bool:
    """Whether a file says what `text` says; plots are compared as drawings."""
    found = path.read_text(encoding="utf-8")
    return is_same_drawing(found, text) if path.suffix == ".svg" else found == text


def make_pages(folder: Path = stored_results.FOLDER) -> Pages:
    """The page beside a folder of stored_results, and its plots in the folder.

    Raises:
        InputError: a damaged result, or one of a study or arm that there is not.
    """
    stored, synthetic = read_results(folder), read_results(folder / stored_results.SYNTHETIC)
    studies = {name: load_study(name) for name in study_names()}
    for named, _, arm in (*stored, *synthetic):
        if named not in studies or arm not in studies[named].arms:
            raise InputError(f"result of {named}, arm {arm}: there is no such arm: remove the file")
    texts: dict[Path, str] = {}
    parts = [HEADER]
    for name, study in studies.items():
        parts.append(f"## {study.title}\n\n{study.question.strip()}\n")
        for scale in SCALES:
            if scale not in study.scales:
                continue
            parts += _at_scale(study, name, scale, stored, folder, texts)
            if missing := [arm for arm in arms_at(study, name, scale) if (name, scale, arm) not in stored]:
                what = (
                    f"Not run: {', '.join(missing)}"
                    if any(key[:2] == (name, scale) for key in stored)
                    else "No arm has run"
                )
                parts.append(f"{what} (`maskfed-server reproduce {name} --scale {scale}`).\n")
            if any(key[:2] == (name, scale) for key in synthetic):
                parts += _at_scale(study, name, scale, synthetic, folder / stored_results.SYNTHETIC, texts)
        if study.discussion:
            parts.append(study.discussion.strip() + "\n")
    parts += reported(folder / REPORTED_FILE)
    parts.append("## Where the numbers come from\n\n" + provenance([*stored.values(), *synthetic.values()]))
    texts[folder.parent / PAGE_NAME] = "\n".join(parts)
    return Pages(texts, folder)


def _at_scale(
    study: Study, name: str, scale: Scale, stored: Results, folder: Path, texts: dict[Path, str]
) -> list[str]:
    """Tables, plots, pictures and figures of the arms in one folder of results."""
    arms = [(arm, stored[name, scale, arm]) for arm in arms_at(study, name, scale) if (name, scale, arm) in stored]
    measured = [(arm, result) for arm, result in arms if result.extractors]
    is_synthetic = folder.name == stored_results.SYNTHETIC
    parts = [f"### {study.title}, scale `{scale}`{', synthetic faces' if is_synthetic else ''}\n"]
    if not arms:
        return parts
    parts += [setting((measured or arms)[0][1]), arms_table(study, arms)]
    if measured:
        parts.append(distances_table(measured))
    place = f"{folder.parent.name}/{folder.name}" if is_synthetic else folder.name
    for distance, svg in _charts(measured):
        file = folder / f"{name}-{scale}-{_file_name(distance)}.svg"
        texts[file] = svg
        parts.append(f"![{distance} against images]({place}/{file.name})\n")
    for arm, result in measured:
        picture = result_file(folder, name, scale, arm).with_suffix(".png")
        if picture.exists():
            parts.append(f"{picture_caption(study, arm, result)}\n\n![{arm}]({place}/{picture.name})\n")
    if measured:
        parts.append(curves_table(measured))
    parts += filter(None, (grid_table(name, scale, grid, stored) for grid in study.grids))
    if derived := derive(study, name, stored, scale):
        parts.append("\n".join(f"- {sentence(study, each)}." for each in derived) + "\n")
        parts.append(reading(study, derived))
    if compared := equal_operations(study, name, scale, stored):
        parts.append(compared)
    return parts


def _charts(arms: Sequence[tuple[str, ArmResult]]) -> list[tuple[str, str]]:
    """(distance, SVG) by extractor."""
    found = []
    for distance in dict.fromkeys(distance for _, result in arms for distance in result.extractors):
        series = [
            Series(arm, [float(images) for images, _ in curve], [value for _, value in curve])
            for arm, result in arms
            if distance in result.extractors
            for curve in [curve_to_test(result, distance)]
        ]
        svg = line_chart(series, "images seen in this stage", distance, log_x=True, log_y=True)
        found.append((distance, standalone(svg) + "\n"))
    return found


def _file_name(distance: str) -> str:
    return distance.replace(":", "-").replace("/", "-")
