"""Flower's entry points: each opens the site's home and log, and hands the message to its handler."""

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from client.answers.audit_request import answer_audit
from client.answers.signed_answer import entry_point
from client.answers.statistics.mean_image import answer_mean_image
from client.answers.statistics.statistics_request import answer_query
from client.home import Home, find_home
from client.offers.answer import answer_offer
from client.secure.rosters import answer_keys
from client.secure.unmask import answer_unmask
from client.training_request import handle
from shared.messages.agreement.offer import OFFER_ACTION
from shared.messages.audit import AUDIT_ACTION
from shared.messages.secure_sum.key_question import KEYS_ACTION
from shared.messages.secure_sum.unmask import UNMASK_ACTION
from shared.messages.statistics import MEAN_IMAGE_ACTION


def _home(_context: Context) -> Home:
    """The coordinator's run configuration, in the context, is not read."""
    return find_home()


def _trained(content: RecordDict, home: Home) -> RecordDict:
    return handle(content, home).to_record()


app = ClientApp()
train = app.train()(entry_point(_home, "train", _trained))
query = app.query()(entry_point(_home, "statistics", answer_query))
query_offer = app.query(OFFER_ACTION)(entry_point(_home, "offer", answer_offer))
query_mean_image = app.query(MEAN_IMAGE_ACTION)(entry_point(_home, "mean_image", answer_mean_image))
query_audit = app.query(AUDIT_ACTION)(entry_point(_home, "audit", answer_audit))
query_secure_keys = app.query(KEYS_ACTION)(entry_point(_home, "secure_keys", answer_keys))
query_unmask = app.query(UNMASK_ACTION)(entry_point(_home, "unmask", answer_unmask))
