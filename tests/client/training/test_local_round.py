"""Local rounds: what is trained, on what, and where the randomness comes from."""

import numpy as np
import pytest
import torch

from client.data.dataset import open_dataset
from client.training import parallel
from client.training.local_round import Round, choose_device, load_model, streams, train_share
from client.training.parallel import num_processes, run_in_processes
from shared.diffusion.uvit import build_model
from shared.messages.packing import MessageError, unpack
from tests import forked
from tests.client.conftest import DP, SIZE, MakeSite, experiment, request_for, weights_of


def run(make: tuple, plan, **request) -> np.ndarray:
    home, settings = make
    return Round(request_for(plan, **request), None, open_dataset(home, SIZE), home, settings).run()[0]


def test_update_is_the_difference_of_the_weights(make_site: MakeSite):
    home, settings = make_site()
    request = request_for(experiment())
    training = Round(request, None, open_dataset(home, SIZE), home, settings)
    update, scalars = training.run()
    after = {name: parameter.detach().numpy() for name, parameter in training.model.named_parameters()}
    for name, change in unpack(update, request.header.manifest).items():
        np.testing.assert_array_equal(change, after[name] - weights_of(experiment())[name])
    assert set(scalars) == {"loss", "grad_norm"}


def test_rounds_and_runs_have_streams_of_their_own(make_site: MakeSite):
    site = make_site()
    first, second = run(site, experiment()), run(site, experiment(), server_round=2)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, run(site, experiment(), run="other"))


def test_other_weights_under_the_same_run_and_round_meet_other_draws(make_site: MakeSite):
    home, _ = make_site()
    first, second = request_for(experiment()), request_for(experiment())
    second.weights[0] += 1e-3
    seeds = {streams(home, request.digest).seed("noise") for request in (first, second, request_for(experiment()))}
    assert len(seeds) == 2


def test_streams_depend_on_the_sites_key(make_site: MakeSite):
    home, _ = make_site()
    before = streams(home, "ab" * 32).seed("noise")
    home.data_key.write_bytes(b"y" * 32)
    assert streams(home, "ab" * 32).seed("noise") != before


def test_held_out_images_are_never_read(make_site: MakeSite):
    home, settings = make_site(held_out_ratio=0.5)
    data = open_dataset(home, SIZE)
    read: list[int] = []
    batch = data.images.batch
    data.images.batch = lambda ids: (read.extend(np.asarray(ids).tolist()), batch(ids))[1]
    for plan in (experiment(federation={"local_steps": 20}), experiment(privacy={**DP, "sample_rate": 0.9})):
        Round(request_for(plan), None, data, home, settings).run()
    assert set(read) == set(data.train.tolist())


def test_proximal_term_holds_plain_rounds_back(make_site: MakeSite):
    site = make_site()
    free, held = (run(site, experiment(federation={"local_steps": 6, "proximal_mu": mu})) for mu in (0.0, 1000.0))
    assert np.linalg.norm(held) < np.linalg.norm(free)


def test_masked_rounds_train_too(make_site: MakeSite):
    plan = experiment(train={"objective": "msm"}, mask={"kind": "patch", "ratio": 0.5})
    private = experiment(train={"objective": "msm"}, mask={"kind": "patch", "ratio": 0.5}, privacy=DP)
    for each in (plan, private):
        assert np.abs(run(make_site(), each)).max() > 0


def test_bfloat16_rounds_train(make_site: MakeSite):
    site = make_site()
    plain = run(site, experiment())
    assert not np.array_equal(run(site, experiment(), precision="bfloat16"), plain)
    for clipping in ("fast", "hooks"):
        assert np.isfinite(run(site, experiment(privacy={**DP, "clipping": clipping}), precision="bfloat16")).all()


def test_tensors_must_be_the_models():
    plan, tensors = experiment(), weights_of(experiment())
    load_model(build_model(plan), tensors, {})
    first = sorted(tensors)[0]
    for changed in (
        {name: value for name, value in tensors.items() if name != first},
        {**tensors, "more": np.zeros(1, np.float32)},
        {**tensors, first: np.zeros(3, np.float32)},
    ):
        with pytest.raises(MessageError):
            load_model(build_model(plan), changed, {})
    with pytest.raises(MessageError):
        load_model(build_model(plan), tensors, {first: tensors[first]})


def test_device_is_a_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    assert choose_device("cpu").type == "cpu"


def test_gpus_share_plain_rounds_when_the_batch_divides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    gpu = torch.device("cuda")
    assert num_processes(request_for(experiment(train={"batch": 6})), gpu) == 3
    assert num_processes(request_for(experiment(train={"batch": 4})), gpu) == 2
    assert num_processes(request_for(experiment(train={"batch": 6}, privacy=DP)), gpu) == 1
    assert num_processes(request_for(experiment(train={"batch": 6})), torch.device("cpu")) == 1


@pytest.mark.full_size  # as the processes have it
def test_processes_train_one_model_together(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel.multiprocessing, "spawn", forked.spawn)
    home, settings = make_site()
    plan = experiment(train={"batch": 4}, federation={"local_steps": 2})
    update, scalars = run_in_processes(train_share, (request_for(plan), None, home, settings), home, 2)
    assert np.isfinite(update).all()
    assert np.abs(update).max() > 0
    assert scalars["loss"] > 0
    assert not list(home.path.glob("round-*"))


def test_private_update_is_finite_however_long_the_steps(make_site: MakeSite):
    plan = experiment(privacy=DP, optim={"lr": 3e38, "warmup_steps": 0}, federation={"local_steps": 3})
    assert np.isfinite(run(make_site(), plan)).all()
