"""What a site gives its operator reason to hear: requests it refused, its cap, records that are damaged.

Texts leave the machine, so they name runs and codes and no number: neither what was spent nor what is allowed.
"""

from client.home import Home
from client.records.chain import ChainError, ChainReader, Entry
from client.records.spending import read_kept_total
from client.settings import load_settings

CAP_SHARE = 0.8
Told = tuple[str, str, str]
"""Kind, key and text of an alert."""


class SiteAlerts:
    """Follows the journal of a site; only what is new is read."""

    def __init__(self, home: Home) -> None:
        self._home, self._journal = home, ChainReader(home.journal)
        self._runs: dict[str, str] = {}
        """Run of each request that has no answer yet, by digest."""
        self._found: dict[str, Told] = {}

    def __call__(self, since: float) -> list[Told]:
        """Everything to tell that happened since a Unix time, or holds now."""
        try:
            for entry in self._journal.read_new():
                self._take(entry, since)
        except ChainError:
            text = "the journal is damaged: `maskfed-client doctor` says what to do"
            self._found["records"] = ("records", "records", text)
        return [*self._found.values(), *self._near_cap()]

    def _take(self, entry: Entry, since: float) -> None:
        digest = str(entry.fields.get("request_digest", ""))
        if entry.kind == "request":
            self._runs[digest] = str(entry.fields.get("run", ""))
            return
        run = self._runs.pop(digest, "")
        if entry.kind == "refusal" and entry.time.timestamp() >= since:
            code, whose = str(entry.fields.get("code", "")), f" of run {run}" if run else ""
            text = f"a request{whose} was refused ({code}): `maskfed-client journal show` says why"
            self._found[f"refused {run} {code}"] = ("refused", f"refused {run} {code}", text)

    def _near_cap(self) -> list[Told]:
        kept, cap = read_kept_total(self._home.spent), load_settings(self._home).policy.epsilon_cap
        if kept is None or kept.epsilon is None or not kept.epsilon >= CAP_SHARE * cap > 0:
            return []
        text = f"{CAP_SHARE:.0%} of the epsilon cap or more are spent: `maskfed-client status`"
        return [("cap", f"cap {kept.dataset_id} {cap}", text)]
