import ast
import hashlib
import hmac
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.seeding import Streams, derive_key, derive_seed, generator


def test_seed_is_the_first_63_bits_of_a_digest_over_typed_and_length_prefixed_names():
    path = b"s" + (5).to_bytes(8, "big") + b"noise" + b"i" + (1).to_bytes(8, "big") + b"7"
    public = hashlib.sha256(b"i" + (1).to_bytes(8, "big") + b"3" + path).digest()
    secret = hmac.new(b"key", path, "sha256").digest()
    assert derive_seed(3, "noise", 7) == int.from_bytes(public[:8], "big") // 2
    assert derive_seed(b"key", "noise", 7) == int.from_bytes(secret[:8], "big") // 2
    assert (derive_key(3, "noise", 7), derive_key(b"key", "noise", 7)) == (public, secret)


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
    assert torch.equal(Streams(1).generator("x").get_state(), generator(derive_key(1, "x")).get_state())


@pytest.mark.parametrize("bit", [0, 5, 31, 32, 40, 62])
def test_every_bit_of_a_seed_changes_the_stream(bit):
    # torch keeps the lower 32 bits of a seed: the streams of 7 and 7 + 2^40 are equal there.
    assert torch.equal(*(torch.rand(4, generator=torch.Generator().manual_seed(7 + high)) for high in (0, 2**40)))
    one, other = (torch.rand(1000, generator=generator(seed)) for seed in (7, 7 ^ 2**bit))
    assert not torch.isin(one, other).all()
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.15


def test_no_seed_but_a_constant_enters_a_generator_of_torch_elsewhere():
    root, found = Path(__file__).parents[2], []
    for path in [each for name in ("client", "server", "shared") for each in (root / name).rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "manual_seed" in text else ():
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if name in ("manual_seed", "manual_seed_all"):
                is_constant = isinstance(node.args[0], ast.Constant) or ast.unparse(node.args[0]).isupper()
                found += [] if is_constant else [path.relative_to(root).as_posix()]
    assert found == ["shared/seeding.py"]


def test_every_bit_of_a_secret_key_changes_the_stream():
    keys = [bytes(32), bytes(31) + b"\1", b"\x80" + bytes(31)]
    numbers = [torch.rand(4, generator=Streams(key).generator("noise")) for key in keys]
    assert not torch.equal(numbers[0], numbers[1]) and not torch.equal(numbers[0], numbers[2])


def test_the_whole_state_comes_from_the_hash_and_draws_as_numpys_twister_does():
    words = np.frombuffer(hashlib.shake_256(b"key").digest(8 + 4 * 624)[8:], "<u4")
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    expected = twister.random_raw(2000) % 2**24 / 2**24
    assert np.array_equal(torch.rand(2000, generator=generator(b"key")).numpy(), expected)


def test_uniform_and_normal_numbers_of_a_full_state_are_uniform_and_normal():
    uniform, normal = (
        torch.rand(10**6, generator=generator(3)).double(),
        torch.randn(10**6, generator=generator(4)).double(),
    )
    assert abs(uniform.mean() - 0.5) < 5 / 12**0.5 / 1000 and abs(uniform.var() - 1 / 12) < 1e-3
    assert abs(normal.mean()) < 5e-3 and abs(normal.var() - 1) < 1e-2 and abs((normal**4).mean() - 3) < 0.05


WITHOUT_TORCH = [
    "seeding",
    "storage.runlog",
    "storage.checkpoint",
    "experiment.config",
    "errors",
    "data.images",
    "data.image_cache",
    "storage.versions",
    "storage.files",
    "updates.trainable",
]


def test_modules_do_not_import_torch():
    code = (
        "import importlib, sys\n"
        f"for name in {WITHOUT_TORCH}:\n"
        "    importlib.import_module(f'shared.{name}')\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
