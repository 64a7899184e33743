"""Starts nginx where its socket lies: `python -I -m deploy.processes.door FOLDER PROGRAM ...`, below a keeper.

nginx's worker runs as another user when root starts it, and has no way into the coordinator's private folder; from its
working folder it reaches the socket all the same. A socket that a killed nginx has left would stop the next one.
"""

import os
import sys
from pathlib import Path

from deploy.processes import keeper

SOCKET = "door.sock"


def main() -> int:
    """Run the program in the folder; its exit code."""
    folder = Path(sys.argv.pop(1))
    folder.mkdir(mode=0o711, exist_ok=True)
    folder.chmod(0o711)  # the umask does not decide
    os.chdir(folder)
    Path(SOCKET).unlink(missing_ok=True)
    return keeper.main()


if __name__ == "__main__":
    sys.exit(main())
