"""What the rules need to know of the site, gathered from its files."""

import datetime as dt

from client.data.dataset import Dataset
from client.policy.approval import read_approved
from client.policy.budget import own_unit
from client.policy.rules import Facts
from client.records.ledger import Ledger
from client.settings import Home, SiteConfig


def gather_facts(home: Home, settings: SiteConfig, run: str, data: Dataset, ledger: Ledger) -> Facts:
    """The facts of this moment for a request that belongs to `run`.

    Raises:
        InputError: the file of approvals is damaged, or others can change it.
    """
    now = dt.datetime.now(dt.UTC)
    return Facts(
        num_images=len(data.train),
        has_persons=data.persons is not None,
        image_size=settings.image_size,
        approved_experiments=read_approved(home).experiments,
        run_plan=ledger.plan_of(run),
        committed_rounds=ledger.num_committed(run),
        rounds_last_day=ledger.num_since(now - dt.timedelta(days=1)),
        own_unit=own_unit(ledger, data.dataset_id),
        spent_unit=ledger.unit_of(data.dataset_id),
        is_clock_behind=ledger.is_clock_behind(now),
    )
