"""The outermost step of every answer: is the question signed by this federation, for this site? Then the answer is.

Nothing of an unsigned question is parsed, and neither images nor ledger are touched for it; the refusal is fixed text.
"""

from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message, RecordDict

from client.home import Home
from client.policy.freshness import check_fresh
from client.policy.refusals import UNKNOWN_REQUEST, note_refusal, refusal_of
from client.private_files import one_at_a_time, patient_writes, write_private
from client.records.journal import Journal
from client.records.site_log import site_log
from client.settings import CURE_SIGNING_KEY, load_settings
from shared.errors import InputError
from shared.experiment.config import Section
from shared.messages.agreement.offer import OfferAnswer, Reason
from shared.messages.audit import AuditAnswer
from shared.messages.envelope import header_record, read_header
from shared.messages.packing import MessageError
from shared.messages.request_key import check_certificate, serial_of
from shared.messages.sealing import Seal, digests_of, read_seal, seal_reply
from shared.messages.secure_sum.key_question import KeysAnswer
from shared.messages.secure_sum.unmask import UnmaskAnswer
from shared.messages.signature import Purpose, SignatureError, Statement, check_signature, read_key
from shared.messages.statistics import MeanImageAnswer, StatisticsAnswer
from shared.messages.training import RefusalCode, ReplyHeader

CA_CERTIFICATE = "ca.crt"
"""Of the coordinator, pinned by `join`."""


Work = Callable[[RecordDict, Home], RecordDict]
"""Makes the content of an answer; it never sees a question that is not the coordinator's."""


def entry_point(
    find_home: Callable[[Context], Home], purpose: Purpose, work: Work
) -> Callable[[Message, Context], Message]:
    """What Flower calls for one kind of question: it answers with the site's log open.

    Args:
        find_home: of the site whose process this is.
        purpose: see `answer_signed`.
        work: see `answer_signed`.
    """

    def answer(message: Message, context: Context) -> Message:
        home = find_home(context)
        with site_log(home):
            return answer_signed(message, home, purpose, work)

    return answer


def answer_signed(message: Message, home: Home, purpose: Purpose, work: Work) -> Message:
    """Answer a question with `work`, or refuse it; the reply is signed either way. A full disk is waited for.

    Args:
        message: from the coordinator, or from whoever says so.
        home: the site's.
        purpose: what the handler is for; a question for another purpose is refused.
        work: makes the content of the answer.

    Raises:
        InputError: this site has no settings or no signing key, so that it cannot answer anybody.
    """
    alias, key = load_settings(home).alias, read_key(home.signing_key, CURE_SIGNING_KEY)
    with patient_writes():
        answer, asked = _answer(message.content, home, purpose, alias, work)
    return Message(seal_reply(answer, asked, key), reply_to=message)


def _answer(content: RecordDict, home: Home, purpose: Purpose, alias: str, work: Work) -> tuple[RecordDict, Statement]:
    """The answer, and what it answers."""
    try:
        asked = open_request(content, home, purpose, alias)
    except (SignatureError, OSError) as error:
        code, reason = refusal_of(error)
        note_refusal(Journal(home.journal), code, reason, UNKNOWN_REQUEST)
        return _refusal(purpose, code, reason), _claimed(content, purpose, alias)
    return work(content, home), asked


def open_request(content: RecordDict, home: Home, purpose: Purpose, alias: str) -> Statement:
    """What the coordinator has signed: the content is its own, for this site, run and round.

    Raises:
        SignatureError: it is not, its header speaks of another run or round than the signature, or it is an old one.
    """
    seal, digests = read_seal(content, "request"), digests_of(content)
    if seal.alias != alias:
        raise SignatureError("the request is addressed to another site")
    newest, statement = home.request_certificate, seal.statement(purpose, alias, digests)
    with one_at_a_time(home.asked):
        stored = newest.read_bytes() if newest.exists() else None
        check_signature(check_certificate(seal.certificate, _authority(home), stored), statement, seal.signature)
        if stored is None or serial_of(seal.certificate) > serial_of(stored):
            write_private(newest, seal.certificate)
        _check_place(content, seal)
        check_fresh(home.asked, statement)
    return statement


def _authority(home: Home) -> bytes:
    path = home.path / CA_CERTIFICATE
    try:
        pinned: bytes = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run `maskfed-client join` first") from error
    return pinned


def _check_place(content: RecordDict, seal: Seal) -> None:
    """The header must not name another place than the seal does; both are the coordinator's own by now."""
    try:
        header = read_header(content)
    except MessageError:
        return  # refused as malformed by whoever reads it next
    if (header.get("run"), header.get("server_round", 0)) != (seal.run, seal.server_round):
        raise SignatureError("the request's header names another run or round than its signature")


def _claimed(content: RecordDict, purpose: Purpose, alias: str) -> Statement:
    """The place that an unsigned question names, if it can be read, so that the refusal reaches whoever asked."""
    try:
        seal, digests = read_seal(content, "request"), digests_of(content)
    except SignatureError:
        return Statement(purpose, "request", "", 0, alias, UNKNOWN_REQUEST, UNKNOWN_REQUEST, UNKNOWN_REQUEST, 0, 0)
    return seal.statement(purpose, alias, digests)


def _refusal(purpose: Purpose, code: RefusalCode, reason: str) -> RecordDict:
    headers: dict[Purpose, Section] = {
        "train": ReplyHeader(request_digest=UNKNOWN_REQUEST, status="refused", refusal=code, reason=reason),
        "offer": OfferAnswer(status="refused", reasons=(Reason(code=code, text=reason),)),
        "audit": AuditAnswer(status="refused", refusal=code, reason=reason),
        "mean_image": MeanImageAnswer(request_digest=UNKNOWN_REQUEST, status="refused", refusal=code, reason=reason),
        "statistics": StatisticsAnswer(status="refused", reason=reason),
        "secure_keys": KeysAnswer(status="refused", refusal=code, reason=reason),
        "unmask": UnmaskAnswer(status="refused", request_digest=UNKNOWN_REQUEST, refusal=code, reason=reason),
    }
    return RecordDict({"arrays": ArrayRecord(), "header": header_record(headers[purpose])})
