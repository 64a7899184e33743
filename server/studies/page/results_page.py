"""`server/RESULTS.md` and its plots, written from stored results alone: no number in it is typed by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.report.svg_charts import Series, is_same_drawing, line_chart, standalone
from server.studies import stored_results
from server.studies.page.break_even import equal_operations
from server.studies.page.derived import curve_to_test, derive
from server.studies.page.results_text import ScaleSection, StudyText, grid_rows, read_reported, render
from server.studies.page.seed_spread import AllSeeds, spread_of
from server.studies.page.toy_table import toy_table
from server.studies.schema import SCALES, Scale, Study
from server.studies.stored_results import ArmResult, read_results, result_file
from server.studies.stored_toys import TOYS, read_toys
from server.studies.study_files import arms_at, load_study, study_names
from shared.errors import InputError
from shared.storage.files import write_atomically

PAGE_NAME, REPORTED_FILE = "RESULTS.md", "reported.toml"


@dataclass(frozen=True)
class Pages:
    """Texts of the page and of its plots, by path."""

    texts: dict[Path, str]
    folder: Path
    """Of the results."""

    def write(self) -> None:
        """Write what is stale; plots that no result gives any more go."""
        for path, text in self.texts.items():
            if not _is_same(path, text):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, text)
        for path in self._left_over():
            path.unlink()

    def stale(self) -> list[Path]:
        """Files that are missing, say something else than the results, or should not be there."""
        wrong = [path for path, text in self.texts.items() if not _is_same(path, text)]
        return [*wrong, *self._left_over()]

    def _left_over(self) -> list[Path]:
        found = {
            plot for folder in (self.folder, self.folder / stored_results.SYNTHETIC) for plot in folder.glob("*.svg")
        }
        return sorted(found - set(self.texts))


def _is_same(path: Path, text: str) -> bool:
    """Whether a file says what `text` says; plots are compared as drawings."""
    if not path.is_file():
        return False
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
    shown = []
    for name, study in studies.items():
        blocks = _blocks(study, name, stored, synthetic, folder, texts)
        shown.append(StudyText(study.title, study.question.strip(), study.arms, study.discussion.strip(), blocks))
    reported = read_reported(folder / REPORTED_FILE)
    toys = [toy_table(each, f"{folder.name}/{TOYS}/{each.name}.png") for each in read_toys(folder / TOYS)]
    everything = [result for found in (stored, synthetic) for results in found.values() for result in results]
    texts[folder.parent / PAGE_NAME] = render(shown, toys, reported, everything)
    return Pages(texts, folder)


def _blocks(
    study: Study, name: str, stored: AllSeeds, synthetic: AllSeeds, folder: Path, texts: dict[Path, str]
) -> list[ScaleSection]:
    """A study scale by scale, synthetic faces after real ones; its plots go to `texts`."""
    found = []
    for scale in (scale for scale in SCALES if scale in study.scales):
        found.append(_block(study, name, scale, stored, folder, texts))
        if any(key[:2] == (name, scale) for key in synthetic):
            found.append(_block(study, name, scale, synthetic, folder / stored_results.SYNTHETIC, texts))
    return found


def _block(
    study: Study, name: str, scale: Scale, seeds: AllSeeds, folder: Path, texts: dict[Path, str]
) -> ScaleSection:
    """The arms in one folder of results: those of the smallest seed one by one, of several their spread."""
    stored = {key: results[0] for key, results in seeds.items()}
    wanted = arms_at(study, name, scale)
    arms = [(arm, stored[name, scale, arm]) for arm in wanted if (name, scale, arm) in stored]
    is_synthetic = folder.name == stored_results.SYNTHETIC
    place = f"{folder.parent.name}/{folder.name}" if is_synthetic else folder.name
    plots = {distance: (f"{name}-{scale}-{_file_name(distance)}.svg", svg) for distance, svg in _charts(arms)}
    texts.update({folder / file: svg for file, svg in plots.values()})
    pictures = [
        (arm, result, f"{place}/{file.name}")
        for arm, result in arms
        for file in [result_file(folder, name, scale, arm).with_suffix(".png")]
        if result.extractors and file.exists()
    ]
    return ScaleSection(
        title=f"{study.title}, scale `{scale}`{', synthetic faces' if is_synthetic else ''}",
        command=f"maskfed-server reproduce {name} --scale {scale}",
        arms=arms,
        missing=[] if is_synthetic else [arm for arm in wanted if arm not in dict(arms)],
        plots=[(distance, f"{place}/{file}") for distance, (file, _) in plots.items()],
        pictures=pictures,
        grids=[(grid, grid_rows(name, scale, grid, stored)) for grid in study.grids],
        derived=derive(study, name, stored, scale),
        compared=equal_operations(study, name, scale, stored),
        spread=spread_of(study, name, scale, seeds),
    )


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
