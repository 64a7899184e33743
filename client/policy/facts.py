"""What the rules on training need to know of the site now, read from its ledger, its data set and its approvals."""

import datetime as dt

from client.data.dataset import Dataset
from client.home import Home
from client.policy.approval import read_approved
from client.policy.budget import has_dp_releases, own_unit
from client.policy.rules import Facts
from client.records.ledger_history import History
from client.settings import SiteConfig


def gather_facts(home: Home, settings: SiteConfig, run: str, data: Dataset | None, history: History) -> Facts:
    """The facts of this moment for a request that belongs to `run`; no run: for a plan that nobody has asked for yet.

    Without a scanned data set nothing of it is known, and nothing stands against a plan for its sake.

    Raises:
        InputError: the file of approvals is damaged, or others can change it.
    """
    now, approved = dt.datetime.now(dt.UTC), read_approved(home)
    return Facts(
        num_images=settings.policy.min_images_train if data is None else len(data.train),
        has_persons=data is None or data.persons is not None,
        image_size=settings.image_size,
        approved_experiments=approved.experiments,
        refused_experiments=approved.refused,
        run_plan=history.plan_of(run),
        committed_rounds=history.num_committed(run),
        rounds_last_day=history.num_since(now - dt.timedelta(days=1)),
        own_unit=None if data is None else own_unit(history, data.dataset_id),
        has_dp_releases=data is not None and has_dp_releases(history.own_charges(data.dataset_id)),
        has_linked_dp_releases=data is not None and has_dp_releases(history.charges_of(data.dataset_id)),
        spent_unit=None if data is None else history.unit_of(data.dataset_id),
        is_clock_behind=history.is_clock_behind(now),
    )
