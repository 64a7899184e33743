"""Settings of the whole suite: no network, few threads, no leftovers of the user's environment."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
for name in ("MASKFED_SERVER_HOME", "MASKFED_CLIENT_HOME"):
    os.environ.pop(name, None)
