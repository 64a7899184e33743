import json
from pathlib import Path

import numpy as np
import pytest

from server.evaluation.held_out import measure
from server.evaluation.held_out.measure import main, weights_after
from server.evaluation.held_out.round_losses import HeldOut
from server.federation.acceptance.check import QUESTION_FILE, CheckQuestion
from server.federation.acceptance.kept_replies import KeptReplies, Reply
from server.federation.starting_point import initial_model
from server.federation.updates.aggregation import FixedPointSum
from server.federation.updates.global_model import save_candidate, save_global
from server.federation.updates.server_optimizer import ServerState
from shared.data.image_set import synthetic_images
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment
from shared.seeding import Streams
from shared.storage.checkpoint import load_group, save_checkpoint
from shared.training.weights import load_weights, new_model, to_numpy

EXPERIMENT = Experiment.model_validate(
    {"model": {"image_size": 8}, "federation": {"server_optimizer": "fedavgm", "server_lr": 1.0}}
)
IMAGES = "synthetic:public:12"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The global model before a round, and its folder."""
    folder = tmp_path_factory.mktemp("start")
    tensors = {name: to_numpy(tensor) for name, tensor in new_model(EXPERIMENT, Streams(0)).state_dict().items()}
    save_checkpoint(folder / "source", {"model": tensors, "ema": tensors}, {"experiment": EXPERIMENT, "step": 1})
    model = initial_model(folder / "source", EXPERIMENT)
    model.optimizer = ServerState(3, {"momentum": np.full(len(model.weights), 1e-4, np.float32)})
    save_global(folder / "before", model, EXPERIMENT)
    return model, folder / "before"


def ask(folder: Path, question: CheckQuestion) -> tuple[int, dict]:
    (folder / QUESTION_FILE).write_text(json.dumps(vars(question)))
    status = main([str(folder)])
    answer = folder / "answer.json"
    return status, json.loads(answer.read_text()) if answer.exists() else {}


def test_the_losses_are_those_of_the_candidates_raw_weights(start, tmp_path):
    model, before = start
    save_candidate(tmp_path / "candidate", model, EXPERIMENT)
    status, answer = ask(tmp_path, CheckQuestion(str(tmp_path / "candidate"), IMAGES))
    network = build_model(EXPERIMENT)
    load_weights(network, load_group(before, "model"))
    expected = HeldOut(EXPERIMENT, synthetic_images(IMAGES, 8)).losses(network.eval())
    assert status == 0 and answer == {"losses": pytest.approx(expected), "suspects": []}


def test_the_site_behind_a_jump_is_named_unless_the_search_takes_too_long(start, tmp_path, monkeypatch):
    model, before = start
    kept, total = KeptReplies(tmp_path / "replies"), FixedPointSum(len(model.weights))
    random = np.random.default_rng(0)
    for number in range(3):
        update = random.normal(scale=1.0 if number == 1 else 1e-5, size=len(model.weights)).astype(np.float32)
        update = update.clip(-4, 4)
        total.fold(update, "float32", 1)
        kept.keep(Reply(f"site-{number}", 1, 1.0), update)
    kept.close()
    after = weights_after(model, total, EXPERIMENT)
    save_checkpoint(tmp_path / "candidate", {"model": after}, {"experiment": EXPERIMENT, "round": 1})
    _, losses = ask(tmp_path, CheckQuestion(str(before), IMAGES))
    question = CheckQuestion(str(tmp_path / "candidate"), IMAGES, str(before), losses["losses"], 0.2, str(kept.folder))
    assert ask(tmp_path, question)[1]["suspects"] == ["site-1"]
    monkeypatch.setattr(measure, "SEARCH_SECONDS", -1.0)
    assert ask(tmp_path, question)[1]["suspects"] == []


def test_weights_after_a_round_are_the_server_optimizers_and_change_nothing_that_is_there(start):
    model, _ = start
    kept = model.weights.copy(), model.optimizer.buffers["momentum"].copy()
    total = FixedPointSum(len(model.weights))
    update = np.linspace(-0.01, 0.02, len(model.weights)).astype(np.float32)
    total.fold(update, "float32", 2)
    total.fold(np.zeros_like(update), "float32", 1)
    after = weights_after(model, total, EXPERIMENT)
    flat = np.concatenate([after[spec.name].ravel() for spec in model.manifest.tensors])
    assert np.allclose(flat, kept[0] + 0.9 * kept[1] + update * 2 / 3, rtol=0, atol=1e-6)
    assert np.array_equal(model.weights, kept[0]) and np.array_equal(model.optimizer.buffers["momentum"], kept[1])


def test_images_that_are_not_there_end_with_one_line_and_exit_code_2(start, tmp_path, capsys):
    _, before = start
    status, answer = ask(tmp_path, CheckQuestion(str(before), str(tmp_path / "nowhere.zip")))
    assert (status, answer) == (2, {})
    error = capsys.readouterr().err
    assert error.startswith("error: images") and error.count("\n") == 1
