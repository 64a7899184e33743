"""The process of a simulated run: Flower's, started by our superexec with the token through a pipe.

It unpacks the bundle, for Ray's workers import the apps from there; only who holds the simulation's secret submits one.
"""

import sys

from flwr.simulation.app import flwr_simulation


def main() -> None:
    """Run Flower's process of a simulation."""
    sys.argv[0] = "flwr-simulation"
    flwr_simulation()


if __name__ == "__main__":
    main()
