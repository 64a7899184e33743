"""Sites with masked updates for tests of whole rounds: the site's own code for keys, masks and shares, no training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict

from client.home import Home
from client.limits import SecurePolicy
from client.policy.refusals import RefusedError
from client.private_files import write_private
from client.secure.masked_update import mask_update, remember_leaving
from client.secure.rosters import answer_keys, check_request
from client.secure.unmask import answer_unmask
from client.settings import SiteConfig, SitePolicy, load_settings, save_settings
from shared.messages.secure_sum.key_question import KEYS_ACTION
from shared.messages.secure_sum.unmask import UNMASK_ACTION
from shared.messages.training import ReplyHeader, TrainReply, TrainRequest
from shared.secure_aggregation.roster import SecureSumError
from shared.seeding import derive_seed
from tests.server.fake_grid import FakeGrid, Site
from tests.signing import key_of, pem_of

SECURE: dict[str, Any] = {"secure": True, "min_replies": 3, "min_available": 3}
Change = Callable[[TrainReply], TrainReply]


def make_site(folder: Path, alias: str, **secure: Any) -> Home:
    """The home of a site that takes up any roster, unless `secure` says otherwise."""
    home = Home(folder / alias)
    policy = SitePolicy(tasks=("train",), secure=SecurePolicy(**{"rosters": "any", **secure}))
    settings = SiteConfig(
        alias=alias, address="h:1", data="/d", image_size=16, head_file=str(folder / f"{alias}.head"), policy=policy
    )
    save_settings(home, settings)
    write_private(home.signing_key, pem_of(key_of(alias)))
    return home


def update_of(alias: str, request: TrainRequest) -> np.ndarray:
    """The honest update: `fake_federation.trained` sends the same one openly."""
    seed = derive_seed(7, alias, request.header.run, request.header.server_round)
    return np.random.default_rng(seed).normal(scale=0.1, size=request.weights.shape).astype(np.float32)


def masked_reply(request: TrainRequest, update: np.ndarray, home: Home, alias: str) -> TrainReply:
    """As `client.training_request` makes it of a trained update."""
    roster = request.header.roster
    assert roster is not None
    wire, dealing = mask_update(update, request.header, roster, request.digest, home, alias)
    header = ReplyHeader(request_digest=request.digest, status="trained", dealing=dealing)
    return TrainReply(header, wire)


class SecureSite:
    """One site; `change` makes something else of its honest reply."""

    def __init__(self, folder: Path, alias: str, change: Change = lambda reply: reply, **secure: Any) -> None:
        self.home, self.alias, self.change = make_site(folder, alias, **secure), alias, change
        self.stored: dict[str, TrainReply] = {}

    def train(self, content: RecordDict, _asked: int) -> RecordDict:
        request = TrainRequest.from_record(content)
        if request.digest not in self.stored:
            try:
                check_request(request.header, request.digest, self.home, load_settings(self.home))
            except (RefusedError, SecureSumError) as error:
                code = error.code if isinstance(error, RefusedError) else "secure_sum"
                facts = {"request_digest": request.digest, "status": "refused", "refusal": code, "reason": str(error)}
                return TrainReply(ReplyHeader.model_validate(facts)).to_record()
            reply = self.change(masked_reply(request, update_of(self.alias, request), self.home, self.alias))
            remember_leaving(request.header, request.digest, self.home)
            self.stored = {request.digest: reply}
        return self.stored[request.digest].to_record()

    def site(self) -> Site:
        """For a `FakeGrid`."""
        queries = {KEYS_ACTION: self.keys, UNMASK_ACTION: self.unmask}
        return Site(self.train, queries={f"query.{name}": answer for name, answer in queries.items()})

    def keys(self, content: RecordDict) -> RecordDict | None:
        return answer_keys(content, self.home)

    def unmask(self, content: RecordDict) -> RecordDict | None:
        return answer_unmask(content, self.home)


def secure_sites(folder: Path, count: int = 5, **secure: Any) -> list[SecureSite]:
    return [SecureSite(folder, f"site-{number}", **secure) for number in range(count)]


def grid_of(sites: list[SecureSite]) -> FakeGrid:
    return FakeGrid({100 + number: site.site() for number, site in enumerate(sites)})
