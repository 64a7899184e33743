import hashlib
import hmac
import os
import subprocess
import sys

import pytest
import torch

from shared.seeding import Streams, derive_seed, generator


def test_seed_is_the_first_63_bits_of_a_digest_over_typed_and_length_prefixed_names():
    path = b"s" + (5).to_bytes(8, "big") + b"noise" + b"i" + (1).to_bytes(8, "big") + b"7"
    public = hashlib.sha256(b"i" + (1).to_bytes(8, "big") + b"3" + path).digest()
    secret = hmac.new(b"key", path, "sha256").digest()
    assert derive_seed(3, "noise", 7) == int.from_bytes(public[:8], "big") // 2
    assert derive_seed(b"key", "noise", 7) == int.from_bytes(secret[:8], "big") // 2


def test_names_that_read_alike_are_different_streams():
    paths = [(), ("a",), ("a", "bc"), ("ab", "c"), ("abc",), ("1",), (1,), (1, 1), (11,)]
    seeds = [derive_seed(0, *names) for names in paths]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seed_does_not_depend_on_pythons_hash_seed():
    code = "from shared.seeding import derive_seed; print(derive_seed(5, 'order', 2))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{derive_seed(5, 'order', 2)}\n".encode()}


def test_streams_prefix_their_names_and_hide_a_secret_root():
    streams = Streams(b"secret", ("run", 3))
    assert streams.seed("noise") == derive_seed(b"secret", "run", 3, "noise")
    assert streams.child("noise").seed(1) == streams.seed("noise", 1)
    assert "secret" not in repr(streams)


def test_generators_of_one_seed_draw_the_same_numbers():
    draws = [torch.randn(4, generator=generator(2**63 - 1)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(Streams(1).generator("x").get_state(), generator(derive_seed(1, "x")).get_state())


@pytest.mark.parametrize(
    "module",
    [
        "seeding",
        "storage.runlog",
        "storage.checkpoint",
        "experiment.config",
        "errors",
        "data.images",
        "data.image_cache",
        "storage.versions",
        "storage.files",
        "experiment.trainable",
    ],
)
def test_module_does_not_import_torch(module):
    code = f"import shared.{module}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
