import numpy as np
import pytest

from server.federation.acceptance.kept_replies import KeptReplies, Reply, StoredReplies
from server.federation.updates.aggregation import FixedPointSum
from shared.messages.packing import encode


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_stored_sum_is_that_of_the_round_and_leaving_a_site_out_leaves_no_trace(tmp_path, dtype):
    random = np.random.default_rng(3)
    wires = {f"site-{k}": encode(random.normal(size=50).astype(np.float32), dtype) for k in range(4)}
    replies = [Reply(site, weight=k + 1, factor=1 / (k + 1)) for k, site in enumerate(wires)]
    kept, total = KeptReplies(tmp_path / "replies"), FixedPointSum(50)
    for reply in replies:
        kept.keep(reply, wires[reply.site])
        total.fold(wires[reply.site], dtype, reply.weight, reply.factor)
    kept.close()
    stored = StoredReplies(tmp_path / "replies", dtype)
    again = stored.total(50)
    assert stored.replies == replies
    assert np.array_equal(again.mean(7), total.mean(7)) and again.total_weight == 10
    others = FixedPointSum(50)
    for reply in (replies[0], replies[3]):
        others.fold(wires[reply.site], dtype, reply.weight, reply.factor)
    stored.take_out(again, replies[1])
    with stored.without(again, replies[2]):
        assert (again.total_weight, again.count) == (5, 2)
        assert again.mean(5).tobytes() == others.mean(5).tobytes()
    assert (again.total_weight, again.count) == (8, 3)


def test_clear_deletes_everything_and_the_next_round_begins_anew(tmp_path):
    kept = KeptReplies(tmp_path / "replies")
    kept.keep(Reply("site-0", 1, 1.0), np.zeros(3, np.float32))
    kept.close()
    kept.clear()
    assert not (tmp_path / "replies").exists()
    kept.keep(Reply("site-1", 1, 1.0), np.ones(3, np.float32))
    kept.close()
    assert [reply.site for reply in StoredReplies(tmp_path / "replies", "float32").replies] == ["site-1"]
