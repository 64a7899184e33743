"""Where a site's own files are. Nothing heavy is loaded here: every command begins with this."""

from dataclasses import dataclass
from pathlib import Path

from shared.paths import path_variable

HOME_VARIABLE = "MASKFED_CLIENT_HOME"


@dataclass(frozen=True)
class Home:
    """Paths below a site's home folder (0700)."""

    path: Path

    @property
    def settings(self) -> Path:
        """`site.toml`, written by `join`, edited by the operator."""
        return self.path / "site.toml"

    @property
    def ledger(self) -> Path:
        """Hash-chained spending."""
        return self.path / "ledger.jsonl"

    @property
    def journal(self) -> Path:
        """Hash-chained requests, decisions and releases."""
        return self.path / "journal.jsonl"

    @property
    def asked(self) -> Path:
        """Times of the newest question of each run that still stands, so that no older one is answered again."""
        return self.path / "asked.json"

    @property
    def approved(self) -> Path:
        """Digests of code and experiments that the operator has approved."""
        return self.path / "approved.txt"

    @property
    def pending(self) -> Path:
        """Experiments that were asked for and wait for approval."""
        return self.path / "pending"

    @property
    def data_key(self) -> Path:
        """Secret of this site: fingerprints, held-out split and random streams derive from it."""
        return self.path / "data.key"

    @property
    def signing_key(self) -> Path:
        """Ed25519 key that every answer is signed with; made by `enroll`."""
        return self.path / "site-sign.key"

    @property
    def request_certificate(self) -> Path:
        """Certificate of the newest request key that was seen; older ones are refused."""
        return self.path / "request.der"

    @property
    def confirmed_persons(self) -> Path:
        """Digest of the persons that the operator has confirmed."""
        return self.path / "persons.confirmed"

    @property
    def datasets(self) -> Path:
        """Private image caches, one folder per data set."""
        return self.path / "cache"

    @property
    def base(self) -> Path:
        """Frozen tensors that were received once."""
        return self.path / "cache" / "base"

    @property
    def replies(self) -> Path:
        """The last reply of each run."""
        return self.path / "last_reply"

    @property
    def spent(self) -> Path:
        """What the newest charge has brought the total to, for pages that load no accountant."""
        return self.path / "spent.json"

    @property
    def offers(self) -> Path:
        """Answers to the offers of the last 24 hours."""
        return self.path / "offers.json"

    @property
    def secure_sums(self) -> Path:
        """For each run its key for secure sums, and what was said of the newest round."""
        return self.path / "secure_sums"

    @property
    def rosters(self) -> Path:
        """Rosters that were asked for and wait for approval."""
        return self.path / "pending" / "rosters"

    @property
    def moments(self) -> Path:
        """AdamW's moments of the runs that keep them, by run and round."""
        return self.path / "moments"

    @property
    def mean_images(self) -> Path:
        """The mean image that was released for each question."""
        return self.path / "last_mean_image"

    @property
    def logs(self) -> Path:
        """Logs for the operator only."""
        return self.path / "logs"


def find_home(path: Path | None = None) -> Home:
    """The home given, else the one of MASKFED_CLIENT_HOME, else ./site; absolute."""
    return Home((path or Path(path_variable(HOME_VARIABLE) or "site")).resolve())
