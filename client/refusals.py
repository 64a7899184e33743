"""How a site says no: a code and one line of fixed text. Texts of exceptions stay in the site's own log."""

import errno
import logging

from client.chain import BusyError, ChainError
from client.journal import Journal
from shared.errors import InputError
from shared.messages import MessageError, RefusalCode

FAILED = "the site's work failed; its operator finds the cause in the site's log"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
log = logging.getLogger("maskfed.client")


class RefusedError(Exception):
    """A decision against the request; carried to the one place that answers."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code: RefusalCode = code
        self.reason = reason


def refusal_of(error: Exception) -> tuple[RefusalCode, str]:
    """Code and reason that the coordinator is told of an exception; the log gets the rest."""
    match error:
        case RefusedError():
            return error.code, error.reason
        case MessageError():
            log.warning("malformed request: %s", error)
            is_schema = str(error).startswith("message schema")
            return "schema" if is_schema else "malformed", "the request does not follow the protocol of this version"
        case BusyError():
            return "ledger_busy", "another round or a scan is running at the site"
        case ChainError():
            log.error("ledger: %s", error)
            return "ledger_damaged", "the site's ledger is damaged or not its newest copy; its operator must act"
        case OSError() if error.errno in DISK_FULL:
            log.error("disk full", exc_info=error)
            return "disk_full", "the site's disk is full"
        case _:
            log.error("the site's work failed", exc_info=error)
            return "failed", FAILED


def note_refusal(journal: Journal, code: RefusalCode, reason: str, digest: str) -> None:
    """Record a refusal; a journal that cannot be written must not hide the answer."""
    log.info("refused: %s: %s", code, reason)
    try:
        journal.write("refusal", code=code, reason=reason, request_digest=digest)
    except (OSError, InputError) as error:
        log.error("journal: %s", error)
