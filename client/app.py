"""Flower's entry points: each opens the site's home and log, and hands the message to its handler."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.answers.audit_request import answer_audit
from client.answers.signed_answer import answer_signed
from client.answers.statistics.mean_image import answer_mean_image
from client.answers.statistics.request import answer_query
from client.home import Home, find_home
from client.offers.answer import answer_offer
from client.records.site_log import site_log
from client.secure.rosters import answer_keys
from client.secure.unmask import answer_unmask
from client.training_request import handle
from shared.messages.agreement.offer import OFFER_ACTION
from shared.messages.audit import AUDIT_ACTION
from shared.messages.secure_sum.keys import KEYS_ACTION
from shared.messages.secure_sum.unmask import UNMASK_ACTION
from shared.messages.statistics import MEAN_IMAGE_ACTION

app = ClientApp()


@app.train()
def train(message: Message, _context: Context) -> Message:
    """Requests for a round; the coordinator's run configuration, in the context, is not read."""
    home = find_home()
    with site_log(home):
        return answer_signed(message, home, "train", _trained)


@app.query()
def query(message: Message, _context: Context) -> Message:
    """Questions for feature statistics."""
    home = find_home()
    with site_log(home):
        return answer_signed(message, home, "statistics", answer_query)


@app.query(OFFER_ACTION)
def query_offer(message: Message, _context: Context) -> Message:
    """Offers of a plan: what would be trained, before it is asked for."""
    home = find_home()
    with site_log(home):
        return answer_signed(message, home, "offer", answer_offer)


@app.query(MEAN_IMAGE_ACTION)
def query_mean_image(message: Message, _context: Context) -> Message:
    """Questions for the mean image."""
    home = find_home()
    with site_log(home):
        return answer_signed(message, home, "mean_image", answer_mean_image)


@app.query(AUDIT_ACTION)
def query_audit(message: Message, _context: Context) -> Message:
    """Questions for audits of a model."""
    home = find_home()
    with site_log(home):
        return answer_signed(message, home, "audit", answer_audit)


@app.query(KEYS_ACTION)
def query_secure_keys(message: Message, _context: Context) -> Message:
    """Questions for this site's key in a run with masked updates."""
    home = find_home()
    with site_log(home):
        return answer_signed(message, home, "secure_keys", answer_keys)


@app.query(UNMASK_ACTION)
def query_unmask(message: Message, _context: Context) -> Message:
    """Questions for what removes the masks of a round's sum."""
    home = find_home()
    with site_log(home):
        return answer_signed(message, home, "unmask", answer_unmask)


def _trained(content: RecordDict, home: Home) -> RecordDict:
    return handle(content, home).to_record()
