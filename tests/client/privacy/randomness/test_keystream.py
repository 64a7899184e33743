"""ChaCha20 against its RFC, and both ways to compute it against each other."""

import pytest
import torch

from client.privacy.randomness import keystream
from client.privacy.randomness.keystream import Keystream, chacha20_blocks

KEY = bytes(range(32))


@pytest.mark.parametrize(
    ("key", "counter", "nonce", "expected"),
    [
        # RFC 8439, section 2.3.2.
        (
            KEY,
            1,
            "000000090000004a00000000",
            "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
            "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
        ),
        # RFC 8439, appendix A.1, vectors 1 and 2.
        (
            bytes(32),
            0,
            "00" * 12,
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
            "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
        ),
        (
            bytes(32),
            1,
            "00" * 12,
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
            "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
        ),
    ],
)
def test_block_is_that_of_the_rfc(key, counter, nonce, expected):
    blocks = chacha20_blocks(key, counter, 2, bytes.fromhex(nonce))
    assert blocks[0].numpy().tobytes().hex() == expected


def test_counters_beyond_31_bits_are_unsigned():
    whole, one = chacha20_blocks(KEY, 2**31 - 1, 3), chacha20_blocks(KEY, 2**31 + 1, 1)
    assert torch.equal(whole[2], one[0])
    assert len(torch.unique(whole)) == 48


def test_tensor_operations_give_openssls_stream(monkeypatch):
    monkeypatch.setattr(keystream, "GPU_BLOCKS", 3)
    monkeypatch.setattr(keystream, "FEW_BLOCKS", 2)
    counts = []

    def on_cpu(key, counter, count, device):
        counts.append(count)
        return chacha20_blocks(key, counter, count)

    monkeypatch.setattr(keystream, "chacha20_blocks", on_cpu)
    openssl, tensors, to = Keystream(KEY), Keystream(KEY), torch.Tensor.to
    tensors.device = torch.device("meta")  # any that is not the CPU takes the other way
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, at: tensor if at == tensors.device else to(tensor, at))
    for size in (5, 100, 1, 0, 64, 9):  # few blocks and many in turn
        assert torch.equal(openssl.bits(size), tensors.bits(size))
    assert counts == [3, 3, 3, 3, 1, 3, 3, 2]


def test_stream_goes_on_and_ends_before_its_counter_repeats():
    stream = Keystream(KEY)
    assert not torch.isin(stream.bits(800), stream.bits(800)).any()
    stream._counter = 2**32 - 1
    with pytest.raises(AssertionError, match="is over"):
        stream.bits(16)
