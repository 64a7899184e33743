"""How a site says no: a code and one line of fixed text. Texts of exceptions stay in the site's own log."""

import errno
import logging

from client.data.dataset import NotScannedError
from client.policy.freshness import ReplayError
from client.records.chain import BusyError, ChainError
from client.records.journal import Journal
from client.records.ledger import ClockError, OutdatedDataError
from shared.errors import InputError
from shared.messages.packing import MessageError
from shared.messages.signature import SignatureError
from shared.messages.training import RefusalCode
from shared.secure_aggregation.roster import SecureSumError

FAILED = "the site's work failed; its operator finds the cause in the site's log"
UNKNOWN_REQUEST = "0" * 64
"""Stands for the digest of a request that could not be read."""
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
log = logging.getLogger("maskfed.client")


class RefusedError(Exception):
    """A decision against the request; carried to the one place that answers. The note is for the operator's log."""

    def __init__(self, code: RefusalCode, reason: str, note: str = "") -> None:
        super().__init__(reason)
        self.code: RefusalCode = code
        self.reason, self.note = reason, note


class PolicyError(InputError):
    """Forbidden by the site's policy. The text is fixed words and public numbers, so it may leave."""


TOLD: dict[type[Exception], RefusalCode] = {
    PolicyError: "task_not_allowed",
    SecureSumError: "secure_sum",
}
"""Errors whose own text leaves: made of policy, public constants and the names of sites only."""
FIXED: dict[type[Exception], tuple[RefusalCode, str]] = {
    NotScannedError: ("data_not_ready", "the site's images are not scanned"),
    OutdatedDataError: ("data_not_ready", "the site's images were scanned again meanwhile"),
    ClockError: ("clock", "the site's clock stands before its newest ledger entry"),
    BusyError: ("ledger_busy", "another round or a scan is running at the site"),
    ReplayError: ("replayed", "the request is an old one: its time is over, or a newer one of its run was taken"),
    SignatureError: ("not_signed", "the request is not signed by this federation's coordinator for this site"),
    ChainError: ("ledger_damaged", "the site's ledger is damaged or not its newest copy; its operator must act"),
}
"""Errors that say something else to the coordinator than to the site's log; the first kind that fits counts."""


def refusal_of(error: Exception) -> tuple[RefusalCode, str]:
    """Code and reason that the coordinator is told of an exception; the log gets the rest."""
    if isinstance(error, RefusedError):
        if error.note:
            log.warning("refused: %s", error.note)
        return error.code, error.reason
    if told := next((code for kind, code in TOLD.items() if isinstance(error, kind)), None):
        return told, str(error)
    if isinstance(error, MessageError):
        log.warning("malformed request: %s", error)
        is_schema = str(error).startswith("message schema")
        return "schema" if is_schema else "malformed", "the request does not follow the protocol of this version"
    if fixed := next((answer for kind, answer in FIXED.items() if isinstance(error, kind)), None):
        log.error("%s", error)
        return fixed
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        log.error("disk full", exc_info=error)
        return "disk_full", "the site's disk is full"
    log.error("the site's work failed", exc_info=error)
    return "failed", FAILED


def note_refusal(journal: Journal, code: RefusalCode, reason: str, digest: str) -> None:
    """Record a refusal; a journal that cannot be written must not hide the answer."""
    log.info("refused: %s: %s", code, reason)
    try:
        journal.write("refusal", code=code, reason=reason, request_digest=digest)
    except (OSError, InputError) as error:
        log.error("journal: %s", error)
