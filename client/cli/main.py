"""Take part in a federation with images that stay with you: join, limit what training may cost, decide what may run."""

import os
import sys

from client.cli import approvals, audit, join, ledger, policy, records, site
from deploy.errors import ProvisionError
from deploy.observe.logs import set_up_logging
from shared.commandline import in_panels, new_program, run_app, tell_error
from shared.errors import InputError

app = new_program(__doc__)
join.register(app)
ledger.register(app)
records.register(app)
approvals.register(app)
policy.register(app)
audit.register(app)
site.register(app)
PANELS = {
    "Begin and end": ("enroll", "join", "certificate", "leave", "data"),
    "Take part": ("start", "status", "doctor", "metrics", "alerts"),
    "Decide": ("policy", "approve"),
    "See what it cost and gains, show it elsewhere": ("ledger", "journal", "evidence", "compare-alone"),
    "Look for leaks, release by hand": ("audit", "statistics"),
}
in_panels(app, PANELS)


def main() -> None:
    """Run a command; what the user can cure is one line and exit code 2, any other failure exit code 1."""
    os.umask(0o077)
    set_up_logging(quiet=("httpx", "flwr", "alembic", "shared.data.decoding"))
    try:
        status = run_app(app)
    except (InputError, ProvisionError) as error:
        tell_error(error)
        sys.exit(2)
    sys.exit(status)


if __name__ == "__main__":
    main()
