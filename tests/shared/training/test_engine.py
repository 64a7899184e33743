import sys

import numpy as np
import pytest
import torch

from deploy.processes.process import free_ports
from shared.data.image_set import DataOrder, ImageCache, ResidentImages
from shared.diffusion.losses import Draw, draw_noise, per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.seeding import Streams
from shared.storage.checkpoint import load_group, save_checkpoint
from shared.training.engine import Engine, NonFiniteLossError, flip_half, run_training
from shared.training.finite_check import FiniteCheck
from shared.training.optimizer import make_optimizer
from shared.training.processes import World
from shared.training.weights import empty_model, load_weights, new_model
from tests import forked
from tests.shared.training import two_ranks

TOML = """
[train]
batch = 8
precision = "float32"
[model]
image_size = 16
patch_size = 4
[optim]
lr = 1e-3
warmup_steps = 5
"""
STREAMS = Streams(3, ("train",))
IMAGES = ImageCache(lambda: np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), np.uint8), 20, 16)


def experiment(*overrides):
    return parse_experiment(TOML, list(overrides))


def engine(*overrides, **options):
    chosen = experiment(*overrides)
    return Engine(chosen, new_model(chosen, STREAMS), STREAMS, **options)


def copy(groups):
    return {group: {name: array.copy() for name, array in arrays.items()} for group, arrays in groups.items()}


def assert_same(ours, theirs):
    for group in ("model", "ema", "optimizer"):
        assert ours[group].keys() == theirs[group].keys()
        for name, array in ours[group].items():
            assert array.tobytes() == theirs[group][name].tobytes(), f"{group} {name}"


@pytest.mark.parametrize("overrides", [(), ("train.precision=bfloat16", "train.accumulation=2")])
def test_resumed_training_equals_the_uninterrupted_one_bitwise(overrides):
    whole = engine(*overrides)
    run_training(whole, IMAGES, steps=7)
    first = engine(*overrides)
    run_training(first, IMAGES, steps=4)
    torch.manual_seed(99)
    second = engine(*overrides, "train.seed=5")
    second.load_groups(copy(first.groups()))
    assert second.steps_done == 4
    assert run_training(second, IMAGES, steps=7) == 7
    assert_same(whole.groups(), second.groups())


def test_groups_pass_through_a_checkpoint_unchanged(tmp_path):
    trained = engine()
    run_training(trained, IMAGES, steps=2)
    save_checkpoint(tmp_path / "c", trained.groups(), {"experiment": trained.experiment, "step": 2})
    other = engine()
    other.load_groups({name: load_group(tmp_path / "c", name) for name in ("model", "ema", "optimizer")})
    assert_same(trained.groups(), other.groups())


def test_first_step_is_adamw_on_the_loss_of_its_stream():
    chosen = experiment("data.horizontal_flip=false", "optim.grad_clip=0", "optim.warmup_steps=4")
    model = new_model(chosen, STREAMS)
    trained = Engine(chosen, model, STREAMS)
    reference = new_model(chosen, STREAMS)
    batch = IMAGES.batch(range(8))
    result = trained.step(batch)

    draw = draw_noise(chosen, 8, STREAMS.generator("noise", 0, 0, 0))
    optimizer = make_optimizer(reference, chosen.optim)
    for group in optimizer.param_groups:
        group["lr"] = chosen.optim.lr / 4
    loss = per_image_loss(reference, make_schedule("cosine", 1000), chosen, batch, *draw).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).double().norm()
    optimizer.step()
    assert result.loss == float(loss.detach())
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
    for ours, theirs in zip(trained.model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch():
    chosen = experiment("train.accumulation=4", "optim.grad_clip=0", "data.horizontal_flip=false")
    parts = Engine(chosen, new_model(chosen, STREAMS), STREAMS)
    batch = IMAGES.batch(range(8))

    draws = [draw_noise(chosen, 2, STREAMS.generator("noise", 0, 0, number)) for number in range(4)]
    draw = Draw(*(torch.cat(parts) for parts in zip(*draws, strict=True)))
    reference = new_model(chosen, STREAMS)
    loss = per_image_loss(reference, make_schedule("cosine", 1000), chosen, batch, *draw).mean()
    loss.backward()
    result = parts.step(batch)
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    for ours, theirs in zip(parts.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_gradient_is_clipped_to_the_limit():
    clipped = engine("optim.grad_clip=0.01")
    result = clipped.step(IMAGES.batch(range(8)))
    norm = torch.cat([p.grad.flatten() for p in clipped.model.parameters()]).norm()
    assert result.grad_norm > 0.1
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_learning_rate_warms_up():
    trained = engine("optim.warmup_steps=4")
    rates = []
    run_training(
        trained, IMAGES, steps=6, on_step=lambda *_: rates.append(trained.optimizer.param_groups[0]["lr"]) or False
    )
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_raises_before_anything_is_applied(value):
    trained = engine()
    run_training(trained, IMAGES, steps=2)
    before = copy(trained.groups())
    trained.model.output.register_forward_hook(lambda module, inputs, output: output * value)
    with pytest.raises(NonFiniteLossError, match=r"step 3: loss (nan|inf).*lower optim\.lr"):
        trained.step(IMAGES.batch(range(8)))
    assert_same(before, trained.groups())
    assert trained.steps_done == 2


def test_deferred_check_skips_the_step_and_those_after_it_on_the_device():
    trained, plain = engine(), engine()
    trained.finite_check = FiniteCheck(torch.device("cpu"), defer=True)
    run_training(trained, IMAGES, steps=2)
    run_training(plain, IMAGES, steps=2)
    assert_same(plain.groups(), trained.groups())
    before = copy(trained.groups())["model"]
    hook = trained.model.output.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    trained.step(IMAGES.batch(range(8)))
    hook.remove()
    with pytest.raises(NonFiniteLossError, match="step 3: loss nan"):
        run_training(trained, IMAGES, steps=20)
    assert trained.steps_done <= 5
    for name, tensor in trained.model.state_dict().items():
        assert tensor.numpy().tobytes() == before[name].tobytes()


def test_deferred_check_is_settled_before_weights_leave():
    trained = engine()
    trained.finite_check = FiniteCheck(torch.device("cpu"), defer=True)
    trained.model.output.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    trained.step(IMAGES.batch(range(8)))
    with pytest.raises(NonFiniteLossError, match="step 1"):
        trained.groups()


def test_non_finite_gradient_of_a_finite_loss_raises_too():
    trained = engine()
    before = copy(trained.groups())
    next(trained.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteLossError, match="gradient norm nan"):
        trained.step(IMAGES.batch(range(8)))
    assert_same(before, trained.groups())


def test_proximal_term_adds_mu_times_the_distance_to_the_start():
    mu, options = 0.7, ("optim.grad_clip=0", "data.horizontal_flip=false")
    pulled = engine(*options, proximal_mu=mu)
    start = {name: tensor.clone() for name, tensor in pulled.model.state_dict().items()}
    pulled.step(IMAGES.batch(range(8)))
    batch = IMAGES.batch(range(8, 16))

    reference = new_model(pulled.experiment, STREAMS)
    reference.load_state_dict(pulled.model.state_dict())
    draw = draw_noise(pulled.experiment, 8, STREAMS.generator("noise", 1, 0, 0))
    loss = per_image_loss(reference, make_schedule("cosine", 1000), pulled.experiment, batch, *draw).mean()
    distance = sum((p - start[name]).square().sum() for name, p in reference.named_parameters())
    (loss + mu / 2 * distance).backward()
    result = pulled.step(batch)
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    for ours, theirs in zip(pulled.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_only_trainable_tensors_move_and_hold_optimizer_state():
    trained = engine(trainable=("attention", "output.*"))
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    run_training(trained, IMAGES, steps=2)
    moved = {name for name, tensor in trained.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "attention" in name or name.startswith("output.")}
    moments = {name.removesuffix(".exp_avg") for name in trained.groups()["optimizer"] if name.endswith(".exp_avg")}
    assert moments == moved
    with pytest.raises(InputError, match="matches none"):
        engine(trainable=("no.such.*",))


def test_streams_decide_the_noise_and_nothing_else_does():
    chosen = experiment()
    losses = []
    for streams in (STREAMS, STREAMS, Streams(b"secret")):
        torch.manual_seed(len(losses))
        losses.append(Engine(chosen, new_model(chosen, STREAMS), streams).step(IMAGES.batch(range(8))).loss)
    assert losses[0] == losses[1] != losses[2]


def test_new_model_depends_on_its_stream_only_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = new_model(experiment(), STREAMS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = new_model(experiment(), STREAMS)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.qkv_bias=true", "model.patch_init=uniform"),
        ("data.wavelet=haar", "data.wavelet_tokens=split", "model.patch_size=2"),
    ],
)
def test_a_network_that_is_filled_afterwards_trains_like_one_that_was_drawn(overrides):
    chosen = experiment(*overrides)
    drawn, state = new_model(chosen, STREAMS), torch.get_rng_state()
    filled = empty_model(chosen)
    assert torch.equal(torch.get_rng_state(), state)
    load_weights(filled, {name: tensor.numpy() for name, tensor in drawn.state_dict().items()})
    steps = [Engine(chosen, model, STREAMS) for model in (drawn, filled)]
    results = [each.step(IMAGES.batch(range(8))) for each in steps]
    assert results[0].loss == results[1].loss
    assert_same(steps[0].groups(), steps[1].groups())


def test_a_network_without_an_average_trains_the_same_and_gives_none():
    with_one, without = engine(), engine(is_averaged=False)
    for each in (with_one, without):
        run_training(each, IMAGES, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(with_one.model.parameters(), without.model.parameters(), strict=True))
    with pytest.raises(AssertionError, match="without a moving average"):
        without.groups()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_does_not_load_torchs_compiler(optimizer, monkeypatch):
    """It takes seconds and 140 MB, in the process of each message of a site."""
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # whoever imports it fails
    trained = engine(f"optim.optimizer={optimizer}", is_averaged=False)
    assert run_training(trained, IMAGES, steps=2) == 2


def test_foreign_weights_are_refused_by_tensor_name():
    arrays = {name: tensor.numpy() for name, tensor in new_model(experiment(), STREAMS).state_dict().items()}
    other = new_model(experiment("model.image_size=24"), STREAMS)
    with pytest.raises(InputError, match=r"'positions.weight' is \(17, 48\) in the checkpoint, \(37, 48\) in"):
        load_weights(other, arrays)
    with pytest.raises(InputError, match=r"'norm.bias' is missing in the checkpoint"):
        load_weights(other, {"norm.weight": arrays["norm.weight"], **{k: v for k, v in arrays.items() if k < "norm.b"}})


def test_on_step_can_end_the_training():
    trained = engine()
    assert run_training(trained, IMAGES, steps=20, on_step=lambda step, result: step == 3) == 3
    assert trained.steps_done == 3


def test_flip_mirrors_about_half_of_the_images():
    images = torch.arange(400 * 3 * 2 * 4).reshape(400, 3, 2, 4)
    flipped = flip_half(images, torch.Generator().manual_seed(0))
    is_same = (flipped == images).flatten(1).all(1)
    is_mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(is_same, ~is_mirrored)
    assert 150 < int(is_mirrored.sum()) < 250


def test_flipping_can_be_switched_off():
    losses = {engine(f"data.horizontal_flip={flag}").step(IMAGES.batch(range(8))).loss for flag in ("true", "false")}
    assert len(losses) == 2


def test_every_epoch_shows_every_image_once_in_another_order():
    order = DataOrder(20, 8, STREAMS)
    stream = np.concatenate([order.ids(step) for step in range(5)])
    first, second = stream[:20], stream[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert not np.array_equal(first, second)


def test_shares_of_the_processes_make_up_the_step():
    order = DataOrder(20, 8, STREAMS)
    shares = [DataOrder(20, 8, STREAMS).ids(4, part, 2) for part in range(2)]
    assert np.array_equal(np.concatenate(shares), order.ids(4))


def test_fewer_images_than_a_batch_repeat():
    assert sorted(DataOrder(3, 7, STREAMS).ids(0))[:2] == [0, 0]
    assert set(DataOrder(3, 7, STREAMS).ids(5).tolist()) == {0, 1, 2}


def test_batch_that_cannot_be_split_is_refused_with_a_batch_that_can():
    with pytest.raises(InputError, match=r"train\.batch 8 is not a multiple of 1 processes x 3 micro-batches: give 9"):
        engine("train.accumulation=3")
    assert World(size=2).split(8, 2) == 4


def test_resident_images_give_the_same_batches():
    resident = ResidentImages(IMAGES, "cpu")
    assert len(resident) == 20
    assert torch.equal(resident.batch([3, 1]), IMAGES.batch([3, 1]))


def test_two_ranks_resume_bitwise_and_stay_equal(tmp_path):
    (port,) = free_ports(1)
    forked.spawn(two_ranks.main, (port, tmp_path), nprocs=2)
    groups = [np.load(path) for path in sorted(tmp_path.glob("*.npz"))]
    names = {path.stem for path in tmp_path.glob("*.npz")}
    assert names == {"whole-0", "whole-1", "resumed-0", "resumed-1"}
    for other in groups[1:]:
        assert groups[0].files == other.files
        for name in other.files:
            assert groups[0][name].tobytes() == other[name].tobytes(), name
