"""An offer without a run: what each site would do with a plan and what that would cost it, asked and nothing else.

`dry_run` runs in the operator's command and waits for the answers; `gather_offers` runs in the ServerApp that asks.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.federation.fleet.registry import Registry
from server.federation.messaging.agreement import Agreement, Outcome
from server.federation.messaging.question import submit
from server.federation.messaging.transport import Grid, Timing, persist
from server.federation.rounds.request import header_of
from server.federation.updates.global_model import GlobalModel
from server.runs.run_directory import create
from shared.experiment.config import Experiment
from shared.messages.training import RequestHeader
from shared.storage.files import remove_folder, write_atomically
from shared.storage.runlog import RunLog

OFFER_FILE = "offer.json"
NOT_ONLINE = "not online"


def dry_run(
    home: Path, experiment: Experiment, model: GlobalModel, say: Callable[[str], None], poll_seconds: float = 0.5
) -> list[dict[str, Any]]:
    """Ask all registered sites what they would do with the plan, and leave nothing behind but their answers.

    Args:
        home: the coordinator's folder, with a running SuperLink.
        experiment: resolved.
        model: the model of round 0; its weights stay here.
        say: told each outcome.
        poll_seconds: between two looks at the question.

    Returns:
        The events of kind `offer`, one for each site.

    Raises:
        ControlError: the SuperLink cannot be reached, or does not end the question in time.
    """
    run = f"offers-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    made = create(home / "runs" / run, experiment)
    write_atomically(made.path / OFFER_FILE, header_of(model, experiment, run).model_dump_json() + "\n")
    timing = Timing()
    seconds = timing.offer_seconds + timing.offer_seconds_per_site * len(Registry(home / "sites.json").active())
    try:
        return submit(home, experiment, run, "offer", say, poll_seconds=poll_seconds, deadline_seconds=seconds)
    finally:
        remove_folder(made.path)


def gather_offers(grid: Grid, home: Path, folder: Path, timing: Timing | None = None) -> None:
    """Offer the plan of `folder` to every site that is online; one event per site in the run log."""
    timing, metrics = timing or Timing(), RunLog(folder / "metrics.jsonl")
    header = RequestHeader.model_validate_json((folder / OFFER_FILE).read_text(encoding="utf-8"))
    online = {node.node_id for node in persist(lambda: list(grid.get_nodes()), "asking who is online", timing)}
    sites = {site.alias: site.node_id for site in Registry(home / "sites.json").active()}
    agreement = Agreement(grid, folder, metrics, timing)
    nodes = {site: node for site, node in sites.items() if node is not None and node in online}
    agreement.ask(header, nodes)
    for site in sorted(sites.keys() - nodes.keys()):
        agreement.note(site, Outcome("offline", NOT_ONLINE), header.server_round)
    metrics.write_durably("end", status="completed")
