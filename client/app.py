"""Flower's entry points: each opens the site's home and log, and hands the message to its handler."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.answers.audit_request import answer_audit
from client.answers.signed_answer import answer_signed
from client.answers.statistics.mean_image import answer_mean_image
from client.answers.statistics.request import answer_query
from client.data.virtual_site import home_of
from client.offers.answer import answer_offer
from client.records.site_log import site_log
from client.settings import Home
from client.training_request import handle
from shared.messages.agreement.offer import OFFER_ACTION
from shared.messages.audit import AUDIT_ACTION
from shared.messages.statistics import MEAN_IMAGE_ACTION

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Requests for a round; the coordinator's run configuration in `context` is not read."""
    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "train", _trained)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Questions for feature statistics."""
    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "statistics", answer_query)


@app.query(OFFER_ACTION)
def query_offer(message: Message, context: Context) -> Message:
    """Offers of a plan: what would be trained, before it is asked for."""
    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "offer", answer_offer)


@app.query(MEAN_IMAGE_ACTION)
def query_mean_image(message: Message, context: Context) -> Message:
    """Questions for the mean image."""
    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "mean_image", answer_mean_image)


@app.query(AUDIT_ACTION)
def query_audit(message: Message, context: Context) -> Message:
    """Questions for audits of a model."""
    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "audit", answer_audit)


def _trained(content: RecordDict, home: Home) -> RecordDict:
    return handle(content, home).to_record()
