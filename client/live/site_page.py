"""A site's live page: what is asked now, what was spent, every number that left, what waits for the operator."""

import datetime as dt
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from client.home import Home
from client.live.decisions import Decisions
from client.live.figures import SeenRequest, SiteFigures
from client.offers.waiting import Waiting, length_in_words, told, waiting
from client.operator.status import event_line
from client.policy.approval import read_approved
from client.policy.rules import is_any_allowed
from client.records.spending import KeptTotal, read_kept_total
from client.settings import SiteConfig, load_settings
from client.training.progress import FILE, Progress
from shared.errors import InputError
from shared.pages.assets import live_files
from shared.pages.parts import Part, cell, chart, facts, lines, table, title

SHOWN_RELEASES = 50
TASKS = {"train": "train a round", "offer": "answer to a plan, free", "statistics": "statistics of the images"} | {
    "mean_image": "a mean image",
    "audit": "audit a model",
}
CURE_TOTAL = "`maskfed-client status` computes it"


class SitePage:
    """Reads files of the site's home: what is new in journal and ledger, and the few small ones whole. No lock."""

    def __init__(self, home: Path) -> None:
        self._home = Home(home)
        self._figures = SiteFigures(self._home)
        self._pending: tuple[int, list[Waiting]] = (-1, [])
        """What waits, and when its folder changed last."""
        self._decisions = Decisions(self._home)
        self.files: Mapping[str, tuple[str, bytes]] = live_files()

    def read(self) -> list[Part]:
        """All parts, as they are now."""
        try:
            settings = load_settings(self._home)
            self._figures.catch_up()
        except InputError as error:
            return [title("Site"), lines("damaged", "What cannot be read", [(str(error), "failed")])]
        figures = self._figures
        return [
            title(f"Site {settings.alias}"),
            self._now(settings),
            self._spent(settings),
            *filter(None, [_curve(figures, settings)]),
            *self._waiting(),
            _releases(figures),
            lines("refusals", "Refused", _refusals(figures), empty="nothing was refused"),
            lines("journal", "Journal", [(event_line(entry), "") for entry in reversed(figures.newest)]),
        ]

    def picture(self, _name: str) -> None:
        """There are none: no picture of a site is shown by a browser."""
        return

    def _now(self, settings: SiteConfig) -> Part:
        rows: list[tuple[str, object]] = [("coordinator", settings.address)]
        asked = next(reversed(self._figures.open.values()), None)
        if asked is None:
            rows.append(("asked now", "nothing: it waits for requests"))
        else:
            rows.append(("asked now", cell(_what(asked), "answered")))
            rows.append(("asked by", f"run {asked.run} of this coordinator, which has signed the request"))
            rows.append(("since", f"{asked.time:%Y-%m-%d %H:%M:%S} UTC"))
            rows += self._progress(asked)
        policy, free = settings.policy, shutil.disk_usage(self._home.path).free / 2**30
        rows.append(("allowed", f"{', '.join(policy.tasks) or 'nothing'}; {_experiments(self._home, settings)}"))
        rows.append(("free on this disk", f"{free:.0f} GiB" if free >= 10 else f"{free:.1f} GiB"))
        return facts("now", "Now", rows)

    def _progress(self, asked: SeenRequest) -> Iterator[tuple[str, object]]:
        """How far the round is, by its file; that is not locked here, so its newest sign of life is told, too."""
        path = self._home.path / FILE
        try:
            now = Progress(*json.loads(path.read_bytes()))
            alive = dt.datetime.fromtimestamp(path.stat().st_mtime, dt.UTC)
        except (OSError, ValueError, TypeError):
            return
        if (now.run, now.server_round) == (asked.run, asked.server_round) and now.steps > 0:
            yield "steps", cell(f"{now.steps_done} of {now.steps}", share=min(1.0, now.steps_done / now.steps))
            yield "newest sign of life", f"{alive:%Y-%m-%d %H:%M:%S} UTC"

    def _spent(self, settings: SiteConfig) -> Part:
        kept, cap = read_kept_total(self._home.spent), settings.policy.epsilon_cap
        rows: list[tuple[str, object]] = []
        if kept is None or kept.sequence < self._figures.newest_change:
            text = "nothing yet" if not self._figures.num_charges else f"not known since the newest entry: {CURE_TOTAL}"
            rows.append(("epsilon spent", text))
        else:
            rows += _total(kept, cap)
        rows.append(("charges", str(self._figures.num_charges)))
        if left := len(self._figures.uncommitted):
            rows.append(("never completed", cell(f"{left}: they count as spent", "late")))
        return facts("spent", "Privacy spent", rows)

    def _waiting(self) -> Iterator[Part]:
        """What waits, and of each what `approve list` tells of it."""
        stamp = _changed(self._home.pending)
        if stamp != self._pending[0]:
            self._pending = (stamp, waiting(self._home))
        if not (found := self._pending[1]):
            return
        self._decisions.catch_up()
        note = "decide: `maskfed-client approve experiment NUMBER`, or `approve refuse NUMBER`"
        columns = ["number", "asked by run", "when, UTC", "what", "privacy", "digest"]
        rows = [_waiting_row(each) for each in found]
        yield table("waiting", "Waiting for your decision", columns, rows, note=note, text_columns=columns[1:])
        for each in found:
            facts = self._decisions.of(each.digest)
            words = [(line, "") for line in told(facts)] if facts else []
            empty = "what it costs here is being worked out; `maskfed-client approve list` tells the same"
            heading = f"Decision {each.number}: experiment {each.digest[:12]}"
            yield lines(f"decision-{each.digest[:12]}", heading, words, empty=empty)


def page(home: Path) -> SitePage:
    """What `deploy.pages.serve` shows of a site's home."""
    return SitePage(home)


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _what(asked: SeenRequest) -> str:
    number = "" if asked.server_round is None else f", round {asked.server_round}"
    return f"{TASKS.get(asked.task, asked.task)}{number}"


def _experiments(home: Home, settings: SiteConfig) -> str:
    is_open = is_any_allowed(settings.policy, read_approved(home).refused)
    return "any experiment" if is_open else "each experiment needs your approval"


def _total(kept: KeptTotal, cap: float) -> Iterator[tuple[str, object]]:
    if kept.is_unbounded:
        yield "epsilon spent", cell("unbounded: something left without differential privacy", "failed")
    part = "epsilon of the part with DP" if kept.is_unbounded else "epsilon spent"
    if kept.epsilon is None:
        yield part, "no bound exists"
        return
    per = f"per {kept.unit or 'unit'} at delta {kept.delta:g}"
    yield part, cell(f"{kept.epsilon:.3f} of {cap:g} {per}", share=kept.epsilon / cap if cap else 1.0)
    if kept.epsilon_next is not None:
        fits = "" if kept.epsilon_next <= cap else ": BEYOND THE CAP, it is refused"
        state = "answered" if not fits else "late"
        cost = f"{kept.epsilon_next:.3f}{fits} (+{kept.epsilon_next - kept.epsilon:.3f})"
        yield "after one more like the last", cell(cost, state)


def _curve(figures: SiteFigures, settings: SiteConfig) -> Part | None:
    xs = [float(number) for number in range(1, len(figures.epsilons) + 1)]
    limits = [(f"cap {settings.policy.epsilon_cap:g}", settings.policy.epsilon_cap)]
    return chart(
        "epsilon", "Epsilon told with each release", "release", [("epsilon", xs, figures.epsilons)], limits=limits
    )


def _releases(figures: SiteFigures) -> Part:
    rows = []
    for each in list(reversed(figures.releases))[:SHOWN_RELEASES]:
        what = (
            "–" if each.asked is None else f"{_what(each.asked)}{f' of run {each.asked.run}' if each.asked.run else ''}"
        )
        size = "–" if each.bytes is None else f"{each.bytes / 1e6:.1f} MB"
        epsilon = "–" if each.epsilon is None else f"{each.epsilon:.3f}"
        rows.append(
            [
                f"{each.time:%Y-%m-%d %H:%M}",
                what,
                ", ".join(each.numbers),
                size,
                cell("unbounded", "failed") if each.is_unbounded else epsilon,
            ]
        )
    older = figures.num_releases - len(rows)
    note = f"the newest {len(rows)}; {older} older ones: `maskfed-client journal show`" if older else ""
    columns = ["when, UTC", "for", "numbers that left", "size", "epsilon told"]
    return table(
        "releases",
        "Every number that left",
        columns,
        rows,
        note=note,
        empty="nothing has left",
        text_columns=columns[1:3],
    )


def _refusals(figures: SiteFigures) -> Iterator[tuple[str, str]]:
    for entry, asked in reversed(figures.refusals):
        whose = f" (run {asked.run})" if asked else ""
        yield f"{event_line(entry)}{whose}", "refused"


def _waiting_row(each: Waiting) -> list[str]:
    federation, model, privacy = each.experiment.federation, each.experiment.model, each.experiment.privacy
    what = f"{length_in_words(federation.rounds, federation.local_steps)}, model {model.size} at {model.image_size} px"
    dp = "WITHOUT differential privacy"
    if privacy.mechanism != "none":
        dp = f"DP-SGD per {privacy.unit}: sigma {privacy.noise_multiplier:g}, q {privacy.sample_rate:g}"
    return [str(each.number), each.run, each.asked, what, dp, each.digest[:12]]
