"""Flower's entry points of a virtual site: those of `client/app.py` that rounds need, at the home of its node.

Only the bundle of a simulation names this app. The processes of real sites load `client.app` as it is installed there,
and it knows neither virtual sites nor adversaries.
"""

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from client.answers.signed_answer import entry_point
from client.home import Home
from client.offers.answer import answer_offer
from client.secure.rosters import answer_keys
from client.secure.unmask import answer_unmask
from client.simulated.adversary import adversary_of, poisoned_reply
from client.simulated.virtual_site import home_of, simulation_folder
from client.training_request import handle
from shared.messages.agreement.offer import OFFER_ACTION
from shared.messages.secure_sum.key_question import KEYS_ACTION
from shared.messages.secure_sum.unmask import UNMASK_ACTION


def _home(context: Context) -> Home:
    """Of the node that asks Flower for work."""
    return home_of(context.node_config)


def trained(content: RecordDict, home: Home) -> RecordDict:
    """The reply of a site that keeps to the protocol, or what an adversary makes of it before it signs."""
    reply, adversary = handle(content, home), adversary_of(simulation_folder(), home.path.name)
    return (reply if adversary is None else poisoned_reply(adversary, reply, home.path)).to_record()


app = ClientApp()
train = app.train()(entry_point(_home, "train", trained))
query_offer = app.query(OFFER_ACTION)(entry_point(_home, "offer", answer_offer))
query_secure_keys = app.query(KEYS_ACTION)(entry_point(_home, "secure_keys", answer_keys))
query_unmask = app.query(UNMASK_ACTION)(entry_point(_home, "unmask", answer_unmask))
