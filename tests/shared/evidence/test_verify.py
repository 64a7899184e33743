"""A bundle is believed only byte for byte as its signer made it."""

import io
import json
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.evidence import verify as module
from shared.evidence.bundle import write_bundle
from shared.evidence.verify import DOMAIN, EvidenceError, verify
from shared.messages.signature import public_text

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
FILES = {"card.md": b"# a model\n", "rounds.json": b'{"rounds": 3}'}


@pytest.fixture
def bundle(tmp_path):
    file = tmp_path / "evidence.zip"
    write_bundle(file, KEY, {"kind": "release", "run": "first"}, FILES)
    return file


def rewritten(bundle, change, *, compression=zipfile.ZIP_STORED):
    """The bundle with its files changed by `change`, which gets and gives them by name."""
    with zipfile.ZipFile(bundle) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(bundle, "w", compression) as archive:
        for name, data in change(files).items():
            archive.writestr(name, data)


def test_what_was_written_is_verified_with_its_facts(bundle):
    manifest = verify(bundle, public_text(KEY))
    assert (manifest["kind"], manifest["run"]) == ("release", "first")
    assert manifest["files"].keys() == FILES.keys()
    assert len(manifest["code_digest"]) == 64 and manifest["versions"]["maskfed"]
    spoken = " ".join(public_text(KEY)[start : start + 4] for start in range(0, 64, 4)).upper()
    assert verify(bundle, spoken) == manifest


def test_another_key_is_named(bundle):
    with pytest.raises(EvidenceError, match=f"signed with the key {public_text(KEY)}, not with {public_text(OTHER)}"):
        verify(bundle, public_text(OTHER))
    with pytest.raises(EvidenceError, match="64 hexadecimal digits"):
        verify(bundle, "abc")


def manifest_of(files):
    return json.loads(files["manifest.json"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: files | {"card.md": b"# a better model\n"}, "card.md"),
        (lambda files: files | {"more.txt": b""}, "more.txt"),
        (lambda files: {name: data for name, data in files.items() if name != "card.md"}, "card.md"),
        (lambda files: {name: data for name, data in files.items() if name != "signature.json"}, "signature.json"),
        (lambda files: files | {"manifest.json": json.dumps(manifest_of(files) | {"run": "second"})}, "was changed"),
        (lambda files: files | {"manifest.json": "[" * 10_000}, "manifest.json is missing or damaged"),
        (lambda files: files | {"signature.json": "7"}, "signature.json is damaged"),
        (lambda files: files | {"signature.json": json.dumps({"key": public_text(KEY), "signature": "zz"})}, "changed"),
        (lambda files: files | {"../card.md": b""}, "a name that no bundle has"),
    ],
)
def test_every_change_is_noticed(bundle, change, words):
    rewritten(bundle, change)
    with pytest.raises(EvidenceError, match=words):
        verify(bundle, public_text(KEY))


def test_a_forger_who_signs_with_his_own_key_is_told_from_the_signer(bundle):
    def forge(files):
        manifest = json.dumps(manifest_of(files) | {"run": "second"}).encode()
        own = {"key": public_text(OTHER), "signature": OTHER.sign(DOMAIN + manifest).hex()}
        claimed = own | {"key": public_text(KEY)}
        return files | {"manifest.json": manifest, "signature.json": json.dumps(claimed)}

    rewritten(bundle, forge)
    with pytest.raises(EvidenceError, match="was changed"):
        verify(bundle, public_text(KEY))


@pytest.mark.parametrize("add", [lambda data: b"MZ" + data, lambda data: data + b"\0" * 9, lambda data: data[:-5]])
def test_bytes_around_the_files_are_refused(bundle, add):
    bundle.write_bytes(add(bundle.read_bytes()))
    with pytest.raises(EvidenceError):
        verify(bundle, public_text(KEY))


def test_what_a_viewer_could_see_otherwise_is_refused(bundle):
    original = bundle.read_bytes()
    rewritten(bundle, lambda files: files, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(EvidenceError, match="not stored as bundles store"):
        verify(bundle, public_text(KEY))
    twice = io.BytesIO(original)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("card.md", b"# another\n")
    bundle.write_bytes(twice.getvalue())
    with pytest.raises(EvidenceError, match="two of one name"):
        verify(bundle, public_text(KEY))


def test_a_record_before_a_file_that_says_something_else_is_refused(bundle):
    data = bytearray(bundle.read_bytes())
    data[18:26] = struct.pack("<II", 3, 3)  # sizes in the first file's own record
    bundle.write_bytes(bytes(data))
    with pytest.raises(EvidenceError, match="described in two ways"):
        verify(bundle, public_text(KEY))


def test_a_size_that_is_only_claimed_is_not_allocated(bundle):
    data = bytearray(bundle.read_bytes())
    central = data.index(b"PK\1\2")
    data[central + 20 : central + 28] = struct.pack("<II", 2**31, 2**31)
    bundle.write_bytes(bytes(data))
    with pytest.raises(EvidenceError):
        verify(bundle, public_text(KEY))


def test_too_large_a_file_is_refused_unread(bundle, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    with pytest.raises(EvidenceError, match="at most 100"):
        verify(bundle, public_text(KEY))


def test_the_one_file_checks_a_bundle_without_the_project(bundle, tmp_path):
    alone = tmp_path / "elsewhere" / "verify.py"
    alone.parent.mkdir()
    shutil.copy(Path(module.__file__), alone)
    command = [
        sys.executable,
        "-I",
        "-c",
        "import runpy, sys; sys.path[:] = [p for p in sys.path if 'maskfed' not in p]",
    ]
    command[-1] += "; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    good = subprocess.run(
        [*command, alone, bundle, "--key", public_text(KEY)], capture_output=True, text=True, check=False
    )
    assert (good.returncode, good.stdout.splitlines()[-1]) == (0, "VERIFIED"), good.stderr
    bad = subprocess.run(
        [*command, alone, bundle, "--key", public_text(OTHER)], capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1 and bad.stderr.startswith("error: signed with") and bad.stderr.count("\n") == 1
