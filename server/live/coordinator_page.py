"""The coordinator's live page: sites, runs, the round that is running, curves and grids, read from its home."""

import json
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from server.federation.fleet.online import STALE_SECONDS, read_online
from server.federation.fleet.registry import Registry
from server.live.figures import CHUNK_BYTES, RunFigures, SiteInRun
from server.live.run_parts import grids_of, picture_name, run_parts, spent_cell, when
from server.report.formatting import format_number
from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.pages.assets import live_files
from shared.pages.parts import Part, cell, facts, lines, table, title

MOST_RUNS = 20
"""Runs whose logs are followed, the newest; older ones have their report."""
SHOWN_RUNS = 3
"""Runs that are told in full: those that are running, or the newest one."""
DEFAULT_ROUNDS = 0


class _Run(NamedTuple):
    figures: RunFigures
    path: Path
    rounds: int


class CoordinatorPage:
    """Reads files of the coordinator's home: what is new in logs, and the few small ones whole. Holds no lock."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._runs: dict[str, _Run] = {}
        self._made: dict[str, tuple[tuple[int, ...], list[Part]]] = {}
        """Parts of runs, and what they were made from."""
        self._pictures: dict[str, Path] = {}
        self.files: Mapping[str, tuple[str, bytes]] = live_files()

    def read(self) -> list[Part]:
        """All parts, as they are now."""
        problems, wanted = [], {}
        try:
            wanted = self._wanted()
        except InputError as error:
            problems.append(str(error))
        self._follow()
        shown = self._shown(wanted)
        told = [self._parts_of(name) for name in shown]
        parts = [title(f"Coordinator {self._address()}"), *_problems(problems), self._facts(wanted)]
        parts += [each[0] for each in told]
        parts += [self._sites(), self._table_of_runs(wanted)]
        for each in told:
            parts += each[1:]
        self._pictures = {
            picture_name(name, number): self._runs[name].path / "samples" / f"round-{number:06d}.png"
            for name in shown
            for number in grids_of(RunDir(self._runs[name].path))
        }
        return parts

    def picture(self, name: str) -> bytes | None:
        """A sample grid that the page has named."""
        path = self._pictures.get(name)
        try:
            return path.read_bytes() if path else None
        except OSError:
            return None

    def _wanted(self) -> dict[str, dict[str, Any]]:
        path = self._home / "wanted.json"
        try:
            return {str(each["run"]): dict(each) for each in json.loads(path.read_text(encoding="utf-8"))["runs"]}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged: remove it, and resume runs with --resume") from error

    def _follow(self) -> None:
        """Read on in the logs of the newest runs, a bounded amount over all."""
        folders = [each for each in (self._home / "runs").glob("*") if (each / "experiment.toml").is_file()]
        newest = sorted(folders, key=_age, reverse=True)[:MOST_RUNS]
        for folder in newest:
            if folder.name not in self._runs:
                self._runs[folder.name] = _Run(RunFigures(folder / "metrics.jsonl"), folder, _num_rounds(folder))
        kept = {folder.name for folder in newest}
        self._runs = {name: run for name, run in self._runs.items() if name in kept}
        left = CHUNK_BYTES
        for folder in newest:
            if left > 0:
                left -= self._runs[folder.name].figures.catch_up(left)

    def _parts_of(self, name: str) -> list[Part]:
        """The parts of a run, made anew when one of its files has changed."""
        run = self._runs[name]
        place = RunDir(run.path)
        stamp = (run.figures.read_bytes, _changed(place.progress), _changed(place.samples))
        if self._made.get(name, ((), []))[0] != stamp:
            self._made[name] = (stamp, list(run_parts(name, *run)))
        return self._made[name][1]

    def _shown(self, wanted: Mapping[str, Mapping[str, Any]]) -> list[str]:
        newest = sorted(self._runs, key=lambda name: _age(self._runs[name].path), reverse=True)
        running = [name for name in newest if wanted.get(name, {}).get("status") == "running"]
        trained = [name for name in newest if name in wanted or self._runs[name].figures.rounds]
        # Questions for audits or mean images have folders among the runs, and no rounds.
        return (running or trained[:1] or newest[:1])[:SHOWN_RUNS]

    def _address(self) -> str:
        try:
            return str(tomllib.loads((self._home / "coordinator.toml").read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError):
            return ""

    def _facts(self, wanted: Mapping[str, Mapping[str, Any]]) -> Part:
        online = read_online(self._home)
        is_fresh = time.time() - online["noted"] < STALE_SECONDS
        here = sum(bool(each.get("is_online")) for each in online["sites"].values())
        running = [name for name, each in wanted.items() if each.get("status") == "running"]
        free = shutil.disk_usage(self._home).free / 2**30
        return facts(
            "now",
            "Now",
            [
                ("sites online", f"{here} of {self._num_active()}" if is_fresh else "not known: nothing noted lately"),
                ("runs", f"{', '.join(running) or 'none'} running, {len(wanted) - len(running)} ended"),
                ("free on this disk", f"{free:.0f} GiB" if free >= 10 else f"{free:.1f} GiB"),
            ],
        )

    def _active(self) -> list[str]:
        return [site.alias for site in Registry(self._home / "sites.json").active()]

    def _num_active(self) -> str:
        try:
            return str(len(self._active()))
        except InputError:  # told where the sites are
            return "?"

    def _sites(self) -> Part:
        try:
            aliases = self._active()
        except InputError as error:
            return lines("sites", "Sites", [(str(error), "failed")])
        online, rows = read_online(self._home)["sites"], []
        for alias in aliases:
            seen, found = online.get(alias, {}), self._newest_of(alias)
            has_been_here = bool(seen or (found and found.last_answer))
            state = "online" if seen.get("is_online") else "offline" if has_been_here else "never seen"
            counts = f"{found.answered} of {found.asked}, {found.refused} refused" if found else "–"
            rows.append(
                [
                    alias,
                    cell(state, "answered" if state == "online" else "late"),
                    when(seen.get("since")),
                    found.last_answer[:19].replace("T", " ") if found and found.last_answer else "–",
                    counts,
                    spent_cell(found),
                    f"{found.state}: {found.reason}" if found and found.reason else found.state if found else "–",
                ]
            )
        columns = ["site", "now", "since", "last answer, UTC", "answered", "epsilon of its cap", "newest round"]
        empty = "no site yet: `maskfed-server sites add`"
        return table(
            "sites", "Sites", columns, rows, empty=empty, text_columns=["now", "epsilon of its cap", "newest round"]
        )

    def _newest_of(self, alias: str) -> SiteInRun | None:
        known = [run.figures.sites[alias] for run in self._runs.values() if alias in run.figures.sites]
        return max(known, key=lambda site: (site.last_answer, site.round), default=None)

    def _table_of_runs(self, wanted: Mapping[str, Mapping[str, Any]]) -> Part:
        names, rows = sorted({*wanted, *self._runs}), []
        for name in names:
            entry, run = wanted.get(name, {}), self._runs.get(name)
            is_training = bool(entry or (run and run.figures.rounds))
            done = f"{max(run.figures.rounds, default=0)} of {run.rounds}" if run and is_training else "–"
            newest = (
                [f"{metric} {format_number(values[max(values)])}" for metric, values in run.figures.distances.items()]
                if run
                else []
            )
            status = str(entry.get("status") or (run.figures.status if run else "") or "–")
            colour = {"running": "answered", "completed": "none", "failed": "failed"}.get(status, "late")
            rows.append([name, cell(status, colour), done, ", ".join(newest) or "–", str(entry.get("reason", ""))])
        columns = ["run", "status", "rounds", "newest distance", "reason"]
        empty = "no run yet: `maskfed-server finetune`"
        return table(
            "runs",
            "Runs and questions",
            columns,
            rows,
            empty=empty,
            text_columns=["status", "newest distance", "reason"],
        )


def page(home: Path) -> CoordinatorPage:
    """What `deploy.pages.serve` shows of a coordinator's home."""
    return CoordinatorPage(home)


def _problems(texts: list[str]) -> Iterator[Part]:
    if texts:
        yield lines("damaged", "What cannot be read", [(text, "failed") for text in texts])


def _age(folder: Path) -> float:
    for name in ("metrics.jsonl", "experiment.toml"):
        try:
            return (folder / name).stat().st_mtime
        except OSError:
            continue
    return 0.0


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _num_rounds(folder: Path) -> int:
    try:
        tree = tomllib.loads((folder / "experiment.toml").read_text(encoding="utf-8"))
        return int(tree["federation"]["rounds"])
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_ROUNDS
