"""A round begins with those that have accepted its plan, and with nobody else."""

from types import SimpleNamespace

import pytest

from server.federation.rounds.presence import Presence, TooFewSitesError
from server.federation.rounds.site_record import SiteRecord
from shared.experiment.federation import FederationConfig


class Agreement:
    """Sites that have accepted, whatever they are asked."""

    is_refused = False

    def __init__(self, accepted: list[str]) -> None:
        self._accepted, self.asked = accepted, {}

    def ask(self, _header: object, nodes: dict[str, int], _attend: object) -> None:
        self.asked = nodes

    def accepted(self, here: dict[str, SiteRecord]) -> list[str]:
        return [site for site in here if site in self._accepted]

    def explain(self) -> str:
        return "ben refused"


def agreeing(accepted: list[str], config: FederationConfig) -> tuple[dict[str, SimpleNamespace], Agreement]:
    agreement = Agreement(accepted)
    here = {site: SimpleNamespace(node_id=number) for number, site in enumerate(("ann", "ben", "eva"), 7)}
    presence = Presence(None, None, config, agreement)
    found = presence.agreeing(SimpleNamespace(server_round=4), here, lambda: None)
    assert all(found[site] is here[site] for site in found)
    return found, agreement


def test_only_those_that_accept_are_sent_weights():
    found, agreement = agreeing(["eva", "ann"], FederationConfig(min_replies=2))
    assert agreement.asked == {"ann": 7, "ben": 8, "eva": 9}, "all are asked"
    assert found.keys() == {"ann", "eva"}


def test_too_few_begin_no_round():
    with pytest.raises(TooFewSitesError, match=r"round 4 was not begun .*: 1 of the 2 sites .*; ben refused"):
        agreeing(["eva"], FederationConfig(min_replies=2))


def test_under_client_level_dp_it_begins_with_those_that_there_are():
    noise = {"central_noise_multiplier": 1.0, "max_update_norm": 1.0, "update_norm_action": "clip"}
    config = FederationConfig(min_replies=2, sites_per_round=3, **noise)
    assert agreeing(["eva"], config)[0].keys() == {"eva"}
