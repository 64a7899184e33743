import json
import logging

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.storage import checkpoint as module
from shared.storage.checkpoint import (
    check_files,
    latest_checkpoint,
    list_checkpoints,
    load_group,
    load_meta,
    prune_checkpoints,
    resolve_checkpoint,
    save_checkpoint,
)
from shared.storage.files import write_atomically

EXPERIMENT = Experiment()


def save(folder, value=1.0, **meta):
    groups = {"model": {"a": np.full((2, 3), value, np.float32), "count": np.array(7, np.int64)}}
    return save_checkpoint(folder, groups, {"experiment": EXPERIMENT.model_dump(), "step": 3, **meta})


def test_groups_and_meta_come_back(tmp_path):
    written = save(tmp_path / "c", parents=["x"], provenance={"command": "train"})
    tensors = load_group(tmp_path / "c", "model")
    assert tensors["a"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert tensors["count"].shape == () and tensors["count"] == 7
    meta = load_meta(tmp_path / "c")
    assert meta == written
    assert meta.experiment == EXPERIMENT and meta.step == 3 and meta.parents == ("x",)
    assert set(meta.versions) >= {"python", "numpy"}


def test_files_are_plain_safetensors(tmp_path):
    save(tmp_path / "c")
    assert load_file(tmp_path / "c" / "model.safetensors")["a"].shape == (2, 3)


def test_non_contiguous_tensors_are_saved_as_they_look(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    save_checkpoint(tmp_path / "c", {"model": {"a": array}}, {"experiment": EXPERIMENT.model_dump(), "round": 1})
    assert np.array_equal(load_group(tmp_path / "c", "model")["a"], array)


def test_digest_follows_weights_and_meta(tmp_path):
    digests = {save(tmp_path / "c", value, step=step).digest for value, step in [(1, 3), (2, 3), (1, 4), (1, 3)]}
    assert len(digests) == 3


def test_changed_file_is_refused_by_name(tmp_path):
    save(tmp_path / "c")
    path = tmp_path / "c" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"model\.safetensors has digest .* restore it"):
        load_group(tmp_path / "c", "model")
    with pytest.raises(InputError, match="does not have the digest"):
        check_files(tmp_path / "c")


def test_other_schema_is_refused(tmp_path):
    save(tmp_path / "c")
    path = tmp_path / "c" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))
    with pytest.raises(InputError, match="schema 2, this version reads 1"):
        load_meta(tmp_path / "c")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1}', '{"schema": 1, "experiment": {"new": 1}}'])
def test_damaged_meta_is_one_line(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(InputError) as caught:
        load_meta(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_group_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no readable meta\.json"):
        load_meta(tmp_path / "none")
    save(tmp_path / "c")
    with pytest.raises(InputError, match="no group 'ema', it holds model"):
        load_group(tmp_path / "c", "ema")


def test_crash_while_writing_leaves_nothing_a_reader_sees(tmp_path, monkeypatch):
    save(tmp_path / "checkpoints" / "step-1")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_group", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "checkpoints" / "step-2")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def test_unknown_meta_field_is_refused_before_the_folder_appears(tmp_path):
    with pytest.raises(ValidationError):
        save(tmp_path / "c", stpe=1)
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces(tmp_path):
    save(tmp_path / "c", 1)
    save(tmp_path / "c", 2)
    assert load_group(tmp_path / "c", "model")["a"][0, 0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_latest_skips_damaged_ones_with_a_warning(tmp_path, caplog):
    for number in (2, 10, 9):
        save(tmp_path / f"round-{number:06d}")
    (tmp_path / "round-000010" / "model.safetensors").unlink()
    (tmp_path / ".incomplete-round-000011-1").mkdir()
    (tmp_path / "notes").mkdir()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == tmp_path / "round-000009"
    assert "model.safetensors is missing" in caplog.text
    assert latest_checkpoint(tmp_path / "none") is None


def test_prune_keeps_the_newest_and_the_multiples(tmp_path):
    for number in range(1, 9):
        save(tmp_path / f"step-{number:09d}")
    (tmp_path / ".incomplete-step-000000009-1").mkdir()
    prune_checkpoints(tmp_path, keep_last=2, keep_every=3)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [3, 6, 7, 8]
    assert list_checkpoints(tmp_path)[-1].name == "step-000000008"


def test_prune_keeps_no_more_than_asked(tmp_path):
    for number in range(1, 9):
        save(tmp_path / f"step-{number:09d}")
    prune_checkpoints(tmp_path, keep_last=2, keep_every=5)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [5, 7, 8]


def test_a_run_directory_means_its_newest_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints" / "step-000000004"
    save(folder)
    assert resolve_checkpoint(tmp_path) == folder
    assert resolve_checkpoint(folder) == folder
    with pytest.raises(InputError, match="neither a checkpoint folder nor a run"):
        resolve_checkpoint(tmp_path / "checkpoints")


def test_atomic_write_replaces_and_sets_the_mode(tmp_path):
    path = tmp_path / "secret"
    write_atomically(path, "old")
    write_atomically(path, b"new", mode=0o600)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
