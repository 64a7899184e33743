"""What removes the masks of a round's sum: one answer a round, for one list of survivors, remembered before it leaves.

For a survivor its peers give back their shares of its own seed and of what it shares with sites that are not in the
sum; for a site that is not, nothing of its own. Never both of one site, or its update would lie open.
"""

import logging

from flwr.app import RecordDict

from client.home import Home
from client.policy.refusals import UNKNOWN_REQUEST, note_refusal, refusal_of
from client.records.journal import Journal
from client.secure.rosters import check_members, check_task
from client.secure.run_state import RoundState, RunState, open_run
from client.settings import SiteConfig, load_settings
from shared.messages.secure_sum.unmask import UnmaskAnswer, UnmaskQuery, read_unmask_query, unmask_record
from shared.messages.text import one_line
from shared.secure_aggregation.dealing import open_box, revealed_seeds
from shared.secure_aggregation.roster import SecureSumError
from shared.secure_aggregation.round_keys import RoundKeys

log = logging.getLogger("maskfed.client")


def answer_unmask(content: RecordDict, home: Home) -> RecordDict:
    """This site's shares, or why it gives none. Never raises."""
    journal, digest = Journal(home.journal), UNKNOWN_REQUEST
    try:
        query, settings = read_unmask_query(content), load_settings(home)
        digest = query.request_digest
        about = {"run": query.run, "server_round": query.server_round, "request_digest": digest}
        journal.write("request", task="unmask", **about, survivors=list(query.survivors))
        check_task(settings)
        with open_run(home, query.run) as state:
            if state.newest is not None:  # what the operator has taken back since the update left counts
                check_members(state.newest.roster, query.run, home, settings)
            shares = _shares(query, state, settings)
        journal.write("release", request_digest=digest, numbers=["shares of masks"], survivors=list(query.survivors))
        answer = UnmaskAnswer(status="unmasked", request_digest=digest, shares=shares)
    except Exception as error:  # every failure becomes a typed refusal
        code, reason = refusal_of(error)
        note_refusal(journal, code, reason, digest)
        answer = UnmaskAnswer(status="refused", request_digest=digest, refusal=code, reason=one_line(reason))
    return unmask_record(answer)


def _shares(query: UnmaskQuery, state: RunState, settings: SiteConfig) -> tuple[str, ...]:
    """The stored answer to this very list, or a new one that is then stored.

    Raises:
        SecureSumError: what stands against it.
    """
    newest = _asked_round(query, state)
    if newest.survivors:
        if newest.survivors != query.survivors:
            raise SecureSumError("this site has answered another list of survivors in this round, and answers one")
        return newest.shares
    _check_survivors(query, newest, settings)
    keys = RoundKeys(state.key, newest.roster, settings.alias, query.request_digest)
    shares = tuple(_of_dealer(keys, alias, box, query) for alias, box in zip(query.survivors, query.boxes, strict=True))
    state.remember(newest.model_copy(update={"survivors": query.survivors, "shares": shares}))
    return shares


def _asked_round(query: UnmaskQuery, state: RunState) -> RoundState:
    newest = state.newest
    if newest is None:
        raise SecureSumError("this site sent nothing masked in that run")
    if newest.server_round > query.server_round:
        raise SecureSumError(f"round {query.server_round} is over: a newer round has begun")
    if newest.server_round < query.server_round:
        raise SecureSumError(f"this site sent nothing masked in round {query.server_round}")
    if newest.request_digest != query.request_digest:
        raise SecureSumError(f"what this site sent masked in round {query.server_round} went to another request")
    return newest


def _check_survivors(query: UnmaskQuery, newest: RoundState, settings: SiteConfig) -> None:
    roster, count = newest.roster, len(query.survivors)
    for alias in query.survivors:
        roster.number_of(alias)
    if settings.alias not in query.survivors:
        raise SecureSumError("this site's own update is not in the sum, so it gives nothing back")
    needed = max(settings.policy.secure.min_peers, roster.threshold, newest.fewest)
    if count < needed:
        raise SecureSumError(f"{count} updates in the sum, this site asks for {needed}")


def _of_dealer(keys: RoundKeys, alias: str, box: str, query: UnmaskQuery) -> str:
    dealer = keys.roster.number_of(alias)
    shares = open_box(keys, dealer, box)
    return "".join(shares[seed].hex() for seed in revealed_seeds(keys.roster, query.survivors, dealer))
