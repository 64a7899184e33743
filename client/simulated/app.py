"""Flower's entry points of a virtual site: those of `client/app.py` that rounds need, at the home of its node.

Only the bundle of a simulation names this app. The processes of real sites load `client.app` as it is installed there,
and it knows neither virtual sites nor adversaries.
"""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.answers.signed_answer import answer_signed
from client.home import Home
from client.offers.answer import answer_offer
from client.records.site_log import site_log
from client.secure.rosters import answer_keys
from client.secure.unmask import answer_unmask
from client.simulated.adversary import adversary_of, poisoned_reply
from client.simulated.virtual_site import home_of, simulation_folder
from client.training_request import handle
from shared.messages.agreement.offer import OFFER_ACTION
from shared.messages.secure_sum.keys import KEYS_ACTION
from shared.messages.secure_sum.unmask import UNMASK_ACTION

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Requests for a round."""
    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "train", trained)


@app.query(OFFER_ACTION)
def query_offer(message: Message, context: Context) -> Message:
    """Offers of a plan."""
    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "offer", answer_offer)


@app.query(KEYS_ACTION)
def query_secure_keys(message: Message, context: Context) -> Message:
    """Questions for the site's key in a run with masked updates."""
    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "secure_keys", answer_keys)


@app.query(UNMASK_ACTION)
def query_unmask(message: Message, context: Context) -> Message:
    """Questions for what removes the masks of a round's sum."""
    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "unmask", answer_unmask)


def trained(content: RecordDict, home: Home) -> RecordDict:
    """The reply of a site that keeps to the protocol, or what an adversary makes of it before it signs."""
    reply, adversary = handle(content, home), adversary_of(simulation_folder(), home.path.name)
    return (reply if adversary is None else poisoned_reply(adversary, reply, home.path)).to_record()
