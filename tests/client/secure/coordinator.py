"""A coordinator's side of a secure sum for tests of sites: keys, masked updates, questions of its own making."""

from pathlib import Path
from typing import Any

import numpy as np

from client.secure.masked_update import remember_leaving
from client.secure.rosters import answer_keys, check_request
from client.secure.unmask import answer_unmask
from client.settings import load_settings
from shared.experiment.config import Experiment
from shared.messages.packing import Manifest, TensorSpec
from shared.messages.secure_sum.key_question import KeysAnswer, KeysQuery, keys_record, read_keys_answer
from shared.messages.secure_sum.unmask import UnmaskAnswer, UnmaskQuery, read_unmask_answer, unmask_record
from shared.messages.training import RequestHeader, TrainReply, TrainRequest
from shared.secure_aggregation.roster import Peer, Roster, threshold_for
from tests.server.secure_sites import SECURE, SecureSite, masked_reply, secure_sites, update_of
from tests.signing import public_of

NUM_ELEMENTS = 9


def peer(alias: str) -> Peer:
    return Peer(alias=alias, signing_key=public_of(alias))


class Coordinator:
    """Asks real sites of one run; nothing keeps it from asking what it must not."""

    def __init__(
        self, folder: Path, count: int = 5, run: str = "run", num_elements: int = NUM_ELEMENTS, **secure: Any
    ) -> None:
        self.num_elements = num_elements
        self.run, self.experiment = run, Experiment.model_validate({"federation": {**SECURE, "max_update_norm": 0.0}})
        self.sites = {site.alias: site for site in secure_sites(folder, count, **secure)}
        self.replies: dict[str, TrainReply] = {}
        self.roster = self.make_roster()
        self.request = self.training(1)

    def ask_keys(self, site: SecureSite, peers: tuple[Peer, ...], run: str = "") -> KeysAnswer:
        return read_keys_answer(answer_keys(keys_record(KeysQuery(run=run or self.run, peers=peers)), site.home))

    def make_roster(self) -> Roster:
        peers = tuple(peer(alias) for alias in self.sites)
        members = tuple(self.ask_keys(site, peers).member for site in self.sites.values())
        return Roster.model_validate({"members": members, "threshold": threshold_for(len(members), 0)})

    def training(self, server_round: int, roster: Roster | None = None, shift: float = 0.0) -> TrainRequest:
        header = RequestHeader(
            run=self.run,
            server_round=server_round,
            experiment=self.experiment,
            precision="float32",
            manifest=Manifest(tensors=(TensorSpec(name="a", shape=(self.num_elements,)),)),
            roster=roster or self.roster,
        )
        return TrainRequest(header, np.full(self.num_elements, shift, np.float32))

    def train(self, site: SecureSite, request: TrainRequest | None = None) -> TrainReply:
        """The site's checks, then its masked update.

        Raises:
            RefusedError: what the site has against it.
            SecureSumError: likewise.
        """
        request = request or self.request
        check_request(request.header, request.digest, site.home, load_settings(site.home))
        reply = masked_reply(request, update_of(site.alias, request), site.home, site.alias)
        remember_leaving(request.header, request.digest, site.home)
        self.replies[site.alias] = reply
        return reply

    def train_all(self) -> None:
        for site in self.sites.values():
            self.train(site)

    def question(self, site: SecureSite, survivors: tuple[str, ...], **changed: Any) -> UnmaskQuery:
        number = self.roster.number_of(site.alias)
        dealings = [self.replies[alias].header.dealing for alias in survivors if alias in self.replies]
        boxes = tuple(dealing.boxes[number] for dealing in dealings if dealing is not None)
        fields = {
            "run": self.run,
            "server_round": self.request.header.server_round,
            "request_digest": self.request.digest,
            "survivors": survivors,
            "boxes": boxes,
        }
        return UnmaskQuery.model_validate({**fields, **changed})

    def unmask(self, site: SecureSite, survivors: tuple[str, ...], **changed: Any) -> UnmaskAnswer:
        question = self.question(site, survivors, **changed)
        return read_unmask_answer(answer_unmask(unmask_record(question), site.home))
