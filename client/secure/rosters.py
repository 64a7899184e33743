"""With whom this site's updates are added up: the question before a run, and the check of each round's roster."""

import json
from collections.abc import Collection
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict

from client.home import Home
from client.limits import SecurePolicy
from client.policy.approval import MOST_PENDING, read_approved
from client.policy.refusals import UNKNOWN_REQUEST, RefusedError, note_refusal, refusal_of
from client.private_files import write_private
from client.records.journal import Journal
from client.secure.run_state import RoundState, forget_old_runs, open_run
from client.settings import CURE_SIGNING_KEY, SiteConfig, load_settings
from shared.errors import InputError
from shared.messages.secure_sum.key_question import KeysAnswer, KeysQuery, keys_record, read_keys_query
from shared.messages.signature import public_text, read_key
from shared.messages.text import one_line
from shared.messages.training import RequestHeader
from shared.secure_aggregation.roster import Member, Peer, Roster, SecureSumError, sign_key, threshold_for
from shared.secure_aggregation.round_keys import public_text as agreement_key

CURE = "its operator decides with `maskfed-client approve roster`"


def answer_keys(content: RecordDict, home: Home) -> RecordDict:
    """This site's key for the secure sums of a run, or why it does not take part. Never raises; nothing is charged."""
    journal = Journal(home.journal)
    try:
        query, settings = read_keys_query(content), load_settings(home)
        journal.write("request", task="secure_keys", run=query.run, peers=[peer.alias for peer in query.peers])
        member = _own_member(query, home, settings)
        answer = KeysAnswer(status="accepted", member=member)
    except Exception as error:  # every failure becomes a typed refusal
        code, reason = refusal_of(error)
        note_refusal(journal, code, reason, UNKNOWN_REQUEST)
        answer = KeysAnswer(status="refused", refusal=code, reason=one_line(reason))
    return keys_record(answer)


def _own_member(query: KeysQuery, home: Home, settings: SiteConfig) -> Member:
    check_task(settings)
    signing_key = read_key(home.signing_key, CURE_SIGNING_KEY)
    own = Peer(alias=settings.alias, signing_key=public_text(signing_key))
    if own not in query.peers:
        raise SecureSumError("the roster does not name this site with its key")
    _check_peers(query.peers, query.run, home, settings)
    return _signed_member(own, query.run, home, signing_key)


def check_task(settings: SiteConfig) -> None:
    """Refuse questions for secure sums where nothing of this site may be in one.

    Raises:
        RefusedError: neither training nor statistics are allowed.
    """
    if not {"train", "statistics"} & set(settings.policy.tasks):
        raise RefusedError("task_not_allowed", "policy.tasks has neither 'train' nor 'statistics': nothing is added up")


def _signed_member(own: Peer, run: str, home: Home, signing_key: Ed25519PrivateKey) -> Member:
    with open_run(home, run, is_new=True) as state:
        _ = state.newest  # Where a backup was put back the run is over, which is said before it begins.
        public_key = agreement_key(state.make_key())
    forget_old_runs(home)
    signature = sign_key(signing_key, run, own.alias, public_key)
    return Member(**own.model_dump(), public_key=public_key, signature=signature)


def _check_peers(peers: Collection[Peer], run: str, home: Home, settings: SiteConfig) -> None:
    """Refuse too few sites, and sites that the operator does not know.

    Raises:
        SecureSumError: fewer than the policy asks for.
        RefusedError: the operator has to approve some of them first; the roster waits for that.
    """
    policy = settings.policy.secure
    if len(peers) < policy.min_peers:
        raise SecureSumError(f"{len(peers)} sites in the sum, this site asks for {policy.min_peers}")
    if policy.rosters == "any":
        return
    approved = read_approved(home).peers
    unknown = [peer.alias for peer in peers if peer.alias != settings.alias and peer.digest not in approved]
    if unknown:
        _keep_pending(home, run, peers)
        names = ", ".join(sorted(unknown))
        raise RefusedError("roster_not_approved", one_line(f"this site does not know {names} yet: {CURE}"))


def check_request(header: RequestHeader, request_digest: str, home: Home, settings: SiteConfig) -> None:
    """Refuse a round whose roster does not keep this site's update hidden; nothing where updates are not masked.

    Args:
        header: of the training request.
        request_digest: of it.
        home: the site.
        settings: its settings.

    Raises:
        RefusedError: not the roster that the experiment asks for, or sites that the operator does not know.
        SecureSumError: a key that its site has not signed, a threshold too low, or a second request of one round.
    """
    roster = header.roster
    if (roster is not None) != header.experiment.federation.secure:
        raise RefusedError("malformed", "a roster goes with federation.secure, and only with it")
    if roster is None:
        return
    check_roster(roster, header.run, home, settings)
    with open_run(home, header.run) as state:
        newest = state.newest
    if newest is not None:
        _check_place(newest, header, roster, request_digest)


def check_roster(roster: Roster, run: str, home: Home, settings: SiteConfig) -> None:
    """Refuse a roster of the run `run` among whose sites this one would not be hidden.

    Raises:
        RefusedError: sites that the operator does not know.
        SecureSumError: a key that its site has not signed, another own one, too few sites, or a threshold too low.
    """
    _check_keys(roster, run, home, settings)
    _check_threshold(roster, settings.policy.secure)
    check_members(roster, run, home, settings)


def check_members(roster: Roster, run: str, home: Home, settings: SiteConfig) -> None:
    """Refuse what goes to a roster among whose sites are some that the operator does not know, or not any more.

    Raises:
        RefusedError, SecureSumError: sites that are not approved, or too few.
    """
    peers = [Peer(alias=each.alias, signing_key=each.signing_key) for each in roster.members]
    _check_peers(peers, run, home, settings)


def _check_keys(roster: Roster, run: str, home: Home, settings: SiteConfig) -> None:
    own = roster.members[roster.number_of(settings.alias)]
    with open_run(home, run) as state:
        public_key = agreement_key(state.key)
    signing_key = public_text(read_key(home.signing_key, CURE_SIGNING_KEY))
    if (own.public_key, own.signing_key) != (public_key, signing_key):
        raise SecureSumError("the roster has other keys of this site than its own")
    for member in roster.members:
        member.check(run)


def _check_threshold(roster: Roster, policy: SecurePolicy) -> None:
    needed = threshold_for(len(roster.members), policy.max_colluding)
    if roster.threshold < needed:
        raise SecureSumError(
            f"{roster.threshold} answers of {len(roster.members)} sites read the sum, this site asks for {needed}: "
            f"it counts with {policy.max_colluding} sites that work together with the coordinator"
        )


def _check_place(newest: RoundState, header: RequestHeader, roster: Roster, request_digest: str) -> None:
    if newest.roster != roster:
        raise SecureSumError("the roster of this run has changed: who joins or leaves waits for the next run")
    if newest.server_round > header.server_round:
        raise SecureSumError(f"round {header.server_round} is over: this site has answered round {newest.server_round}")
    if newest.server_round == header.server_round and newest.request_digest != request_digest:
        raise SecureSumError(f"this site has sent its masked update of round {header.server_round} to another request")
    if newest.server_round == header.server_round:
        raise SecureSumError(f"this site's masked update of round {header.server_round} is gone and not made twice")


def _keep_pending(home: Home, run: str, peers: Collection[Peer]) -> None:
    names = {peer.alias: peer.signing_key for peer in peers}
    write_private(home.rosters / f"{run}.json", json.dumps(names).encode())
    for old in pending_rosters(home)[MOST_PENDING:]:
        old.unlink(missing_ok=True)


def pending_rosters(home: Home) -> list[Path]:
    """Rosters that wait for the operator, one file a run, newest first."""
    found = home.rosters.glob("*.json") if home.rosters.exists() else iter(())
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def find_pending(home: Home, run: str) -> list[Peer]:
    """The sites of the roster that waits for a run.

    Raises:
        InputError: there is none.
    """
    found = {path.stem: path for path in pending_rosters(home)}
    if run not in found:
        known = ", ".join(found) or "none"
        raise InputError(f"no roster of run {run[:100]!r} waits: waiting are {known}")
    names = json.loads(found[run].read_text(encoding="utf-8"))
    return [Peer(alias=alias, signing_key=key) for alias, key in names.items()]
