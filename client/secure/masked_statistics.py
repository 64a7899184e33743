"""Feature statistics in a masked sum: one question a run, one roster and one state of the images for each data set.

Statistics do not change from question to question, so that two exact sums over two sets of sites, or before and after
one image came, would give by subtraction what masks hide. The ledger remembers with whom, as it remembers charges.
"""

from typing import Literal

from client.policy.refusals import RefusedError
from client.policy.rules import HIDDEN
from client.records.ledger_history import History
from client.records.spending import Charge
from client.secure.masked_update import Place, mask_values
from client.secure.rosters import check_roster
from client.secure.run_state import RoundState, open_run
from client.settings import SiteConfig
from shared.evaluation.feature_statistics import Statistics
from shared.messages.statistics import StatisticsAnswer
from shared.secure_aggregation.roster import Roster, SecureSumError
from shared.secure_aggregation.summed_statistics import RING, STATISTICS_ROUND, smallest_sum, statistics_values

MASKED_EXACT = "exact feature statistics in a masked sum"
"""Remark of a charge, whose `plan_digest` is then the roster's identity."""


def claim_sum(place: Place, kind: Literal["exact", "dp"], settings: SiteConfig) -> None:
    """Check the roster, and note that this question is the one of its run, before anything is charged.

    Raises:
        RefusedError: sites that the operator does not know.
        SecureSumError: a roster that does not hold, or a second question of the run.
    """
    check_roster(place.roster, place.run, place.home, settings)
    with open_run(place.home, place.run) as state:
        if state.newest is not None:
            raise SecureSumError("this site was asked for its part in this run's sum before, and gives it once")
        fewest = smallest_sum(kind, len(place.roster.members))
        state.remember(
            RoundState(
                server_round=STATISTICS_ROUND, request_digest=place.request_digest, roster=place.roster, fewest=fewest
            )
        )


def check_earlier_sums(history: History, dataset_id: str, fingerprint: str, roster: Roster) -> None:
    """Refuse an exact sum that differs from an earlier one of the same images, or of some of them, in sites or images.

    Raises:
        SecureSumError: this very data set was added up with other sites.
        RefusedError: images have changed since, or other data that share some were added up: the operator's to know.
    """
    own = [charge for _, charge in history.own_charges(dataset_id) if _is_sum(charge)]
    if any(charge.plan_digest != roster.identity for charge in own):
        raise SecureSumError(
            "exact statistics of these images were added up with another roster, and two sums would tell the "
            "difference: ask that roster, or for private statistics"
        )
    every = [charge for _, charge in history.charges_of(dataset_id) if _is_sum(charge)]
    if any((charge.plan_digest, charge.fingerprint) != (roster.identity, fingerprint) for charge in every):
        note = "exact statistics of other images, or of these among others, are in a masked sum: a second tells some"
        raise RefusedError("policy", HIDDEN, note)


def masked_answer(statistics: Statistics, radius: float, place: Place) -> tuple[StatisticsAnswer, bytes]:
    """What leaves in place of the statistics: masked numbers, and the shares of their masks.

    Args:
        statistics: of this site, exact or private.
        radius: of the projection of private ones; 1 for exact ones.
        place: in which sum.

    Raises:
        ValueError: numbers that the sum does not hold.
    """
    values = statistics_values(statistics.n, statistics.total_D, statistics.outer_DD, radius)
    elements, dealing = mask_values(values, 1.0, RING, place)
    told = {"epsilon": statistics.epsilon, "delta": statistics.delta} if statistics.release == "dp" else {}
    return StatisticsAnswer.model_validate({"status": "released", "dealing": dealing, **told}), elements.tobytes()


def _is_sum(charge: Charge) -> bool:
    return charge.task == "statistics" and charge.remarks == MASKED_EXACT
