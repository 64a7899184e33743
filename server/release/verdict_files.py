"""Verdict files of audits: what a site's operator has sent, or a site has answered, taken into the run's folder."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from server.federation.fleet.registry import ALIAS_PATTERN
from server.runs.history import AUDITS_FOLDER
from shared.errors import InputError
from shared.experiment.config import explain
from shared.messages.audit import AuditVerdict
from shared.storage.files import write_atomically

VERDICT_SCHEMA = 1


class VerdictFile(AuditVerdict):
    """Outcome of one audit of one checkpoint at one site."""

    schema_version: int = Field(alias="schema", ge=VERDICT_SCHEMA, le=VERDICT_SCHEMA)
    site: str = Field(pattern=ALIAS_PATTERN)
    checkpoint: str = Field(max_length=100)
    checkpoint_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    references: tuple[str, ...] = ()
    """Digests of the reference models, where the coordinator has asked."""
    versions: dict[str, str] = Field(default_factory=dict)
    time: str = ""
    """ISO 8601, UTC, in minutes."""

    @property
    def file_name(self) -> str:
        """Where the run keeps it: a later verdict on the same model takes an earlier one's place."""
        return f"{self.site}-{self.audit}-{self.checkpoint_digest[:16]}.json"


def add_verdicts(run: Path, files: Sequence[Path]) -> list[Path]:
    """Copy verdict files into the run, so that gate and report see them; all of them or none.

    Raises:
        InputError: a file is no verdict.
    """
    verdicts = [(read_verdict(file), file) for file in files]
    folder = run / AUDITS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for verdict, file in verdicts:
        write_atomically(folder / verdict.file_name, file.read_bytes())
    return [folder / verdict.file_name for verdict, _ in verdicts]


def read_verdict(file: Path) -> VerdictFile:
    """One verdict.

    Raises:
        InputError: it is none.
    """
    try:
        return VerdictFile.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: not an audit verdict ({error.strerror}): name a file") from error
    except ValidationError as error:
        raise InputError(
            f"{file}: not an audit verdict ({explain(error)}): give a file of `maskfed-client audit --out`"
        ) from error
