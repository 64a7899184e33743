import math
from itertools import repeat

import pytest
import torch

from shared.diffusion.samplers import (
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    time_grid,
)
from shared.diffusion.schedule import make_schedule, predict_x_0, training_target
from shared.errors import InputError

SHAPE = (3, 3, 8, 8)
DIFFUSERS_NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
DIFFUSERS_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}


def gaussian_model(schedule, prediction):
    """The exact network for data N(0.2, 0.3^2): E[x_0 | x_t] in closed form, told as eps, v or x_0."""

    def denoise(x_t, t):
        alpha_bar = schedule.alpha_bar[t].item()
        gain = math.sqrt(alpha_bar) * 0.09 / (alpha_bar * 0.09 + 1 - alpha_bar)
        x_0 = 0.2 + gain * (x_t - 0.2 * math.sqrt(alpha_bar))
        time = torch.full((len(x_t),), t)
        eps = (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
        return training_target(schedule, prediction, x_0, time, eps)

    return denoise


def reference(name, schedule, kind, prediction, clip_x_0, **options):
    """A diffusers scheduler on our float64 tables: its own are float32, which alone costs more than 1e-5."""
    import diffusers  # loads for seconds

    scheduler = getattr(diffusers, name)(
        1000, beta_schedule=DIFFUSERS_NAMES[kind], prediction_type=DIFFUSERS_PREDICTIONS[prediction], **options
    )
    if "clip_sample" in scheduler.config:
        scheduler.register_to_config(clip_sample=clip_x_0)
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = schedule.beta, schedule.alpha, schedule.alpha_bar
    return scheduler


@pytest.fixture(scope="module")
def fixed_noise():
    return torch.randn(50, *SHAPE, generator=torch.Generator().manual_seed(7))


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("clip_x_0", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ddpm_agrees_with_diffusers_on_the_same_noise(kind, prediction, clip_x_0, fixed_noise, monkeypatch):
    schedule = make_schedule(kind, 1000)
    denoise = gaussian_model(schedule, prediction)
    scheduler = reference("DDPMScheduler", schedule, kind, prediction, clip_x_0, timestep_spacing="trailing")
    scheduler.set_timesteps(40)
    noise = iter(fixed_noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noise))
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, int(t)), int(t), x).prev_sample
    ours = ddpm(denoise, schedule, start(), iter(fixed_noise), num_steps=40, prediction=prediction, clip_x_0=clip_x_0)
    assert time_grid(schedule, "ddpm", 40) == scheduler.timesteps.tolist()
    torch.testing.assert_close(ours, x.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip_x_0", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ddim_agrees_with_diffusers_on_the_same_noise(kind, prediction, eta, clip_x_0, fixed_noise):
    schedule = make_schedule(kind, 1000)
    denoise = gaussian_model(schedule, prediction)
    scheduler = reference("DDIMScheduler", schedule, kind, prediction, clip_x_0, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x = start()
    for t, z in zip(scheduler.timesteps, fixed_noise, strict=False):
        options = {"eta": eta, "use_clipped_model_output": clip_x_0, "variance_noise": z if eta else None}
        x = scheduler.step(denoise(x, int(t)), int(t), x, **options).prev_sample
    ours = ddim(
        denoise, schedule, start(), iter(fixed_noise), num_steps=20, eta=eta, prediction=prediction, clip_x_0=clip_x_0
    )
    torch.testing.assert_close(ours, x.float(), rtol=0, atol=1e-5)


def authors_ddim(schedule, predict, num_steps, eta, prediction, noise, low, high):
    """The update of the authors' `ddim_sample` and `model_predictions`, from their description, in float64."""
    grid = [math.floor(step * 1000 / num_steps - 1) for step in range(num_steps, 0, -1)]
    alpha_bar, x = schedule.alpha_bar, start().double()
    for t, after in zip(grid, [*grid[1:], None], strict=True):
        output, one = predict(x, t), alpha_bar[t]
        by_kind = {
            "eps": x / one.sqrt() - (1 / one - 1).sqrt() * output,
            "v": one.sqrt() * x - (1 - one).sqrt() * output,
            "x_0": output,
        }
        x_0 = torch.maximum(torch.minimum(by_kind[prediction], high), low)
        # Only a network that predicts the noise is believed after its image was clipped.
        eps = output if prediction == "eps" else (x / one.sqrt() - x_0) / (1 / one - 1).sqrt()
        if after is None:
            break
        two = alpha_bar[after]
        sigma = eta * ((1 - one / two) * (1 - two) / (1 - one)).sqrt()
        x = two.sqrt() * x_0 + (1 - two - sigma**2).sqrt() * eps + sigma * next(noise)
    return x_0


@pytest.mark.parametrize("num_steps", [50, 300, 7])
@pytest.mark.parametrize(("prediction", "eta"), [("eps", 1.0), ("eps", 0.0), ("v", 1.0), ("x_0", 0.5)])
def test_ddim_without_new_eps_on_a_truncated_grid_is_the_authors(prediction, eta, num_steps):
    schedule = make_schedule("cosine", 1000)
    exact = gaussian_model(schedule, prediction)

    def denoise(x, t):
        return 0.6 * exact(x, t)  # so wrong that much of x_0 is clipped

    low, high = torch.full((3, 1, 1), -1.0), torch.tensor([3.0, 1.0, 1.0])[:, None, None]
    noise = torch.randn(num_steps, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = authors_ddim(schedule, denoise, num_steps, eta, prediction, iter(noise), low, high)
    options = {"num_steps": num_steps, "eta": eta, "prediction": prediction, "clip_x_0": True, "highest": high}
    ours = ddim(denoise, schedule, start().double(), iter(noise), **options, rederive_eps=False, is_truncated=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    rederived = ddim(denoise, schedule, start().double(), iter(noise), **options, is_truncated=True)
    assert ((rederived - theirs).abs().max() > 0.01) == (prediction == "eps")


def test_truncated_and_rounded_grids_differ_where_the_steps_do_not_divide_t():
    schedule = make_schedule("linear", 1000)
    for num_steps in (1, 8, 50, 250, 500, 1000):
        rounded, truncated = (time_grid(schedule, "ddim", num_steps, is_truncated=each) for each in (False, True))
        assert rounded == truncated
    rounded, truncated = (time_grid(schedule, "ddim", 300, is_truncated=each) for each in (False, True))
    assert sum(a == b + 1 for a, b in zip(rounded, truncated, strict=True)) == 100
    assert sum(a == b for a, b in zip(rounded, truncated, strict=True)) == 200
    assert time_grid(schedule, "ddpm", 300, is_truncated=True) == time_grid(schedule, "ddpm", 300)


# diffusers calls np.array on a tensor, which numpy 2 deprecates; it is their code and only in this scheduler.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("num_steps", [1, 2, 10, 20])
@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_dpm_solver_agrees_with_diffusers_on_the_same_grid(kind, prediction, num_steps):
    schedule = make_schedule(kind, 1000)
    denoise = gaussian_model(schedule, prediction)
    scheduler = reference(
        "DPMSolverMultistepScheduler", schedule, kind, prediction, False, algorithm_type="dpmsolver++",
        solver_order=2, solver_type="midpoint", final_sigmas_type="zero", lower_order_final=False,
    )  # fmt: skip
    grid = time_grid(schedule, "dpm++", num_steps)
    scheduler.set_timesteps(timesteps=grid)
    sigmas = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt()[grid]
    scheduler.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    x = start()
    for t in grid:
        x = scheduler.step(denoise(x, t), t, x).prev_sample
    ours = dpm_solver_pp_2m(denoise, schedule, start(), num_steps=num_steps, prediction=prediction, clip_x_0=False)
    torch.testing.assert_close(ours, x.float(), rtol=0, atol=1e-5)


def test_ddpm_with_all_steps_is_equation_2():
    schedule = make_schedule("linear", 20)
    denoise = gaussian_model(schedule, "eps")
    torch.manual_seed(0)
    noise = torch.randn(20, *SHAPE, dtype=torch.float64)
    x = x_T = start().double()
    for t, z in zip(range(19, -1, -1), noise, strict=True):
        beta, alpha = schedule.beta[t], schedule.alpha[t]
        mean = (x - beta / (1 - schedule.alpha_bar[t]).sqrt() * denoise(x, t)) / alpha.sqrt()
        x = mean + schedule.posterior_sigma[t] * z
    ours = ddpm(denoise, schedule, x_T, iter(noise), num_steps=20, prediction="eps", clip_x_0=False)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_every_sampler_recovers_the_moments_of_gaussian_data(kind):
    schedule = make_schedule(kind, 1000)
    denoise = gaussian_model(schedule, "eps")
    x_T = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    noise = (torch.randn(20_000, generator=generator) for _ in repeat(None))
    common = {"prediction": "eps", "clip_x_0": False}
    samples = {
        "ddpm": ddpm(denoise, schedule, x_T, noise, num_steps=1000, **common),
        "ddim": ddim(denoise, schedule, x_T, noise, num_steps=250, eta=0.0, **common),
        "ddim eta 1": ddim(denoise, schedule, x_T, noise, num_steps=250, eta=1.0, **common),
        "dpm++": dpm_solver_pp_2m(denoise, schedule, x_T, num_steps=20, **common),
    }
    for name, x_0 in samples.items():
        assert abs(x_0.mean() - 0.2) < 0.01, name
        assert abs(x_0.std() - 0.3) < 0.015, name


def test_the_log_snr_grid_of_the_cosine_schedule_starts_at_the_floor():
    schedule = make_schedule("cosine", 1000)
    grid = time_grid(schedule, "dpm++", 20)
    assert len(grid) == 20
    assert grid[-1] == 0
    assert abs(schedule.half_log_snr[grid[0]] + 5.1) < 0.1
    gaps = schedule.half_log_snr[grid].diff()
    assert gaps.max() < 2 * gaps.mean()


def test_grids_visit_no_index_twice_and_end_below_the_first_step():
    schedule = make_schedule("linear", 1000)
    for num_steps in (1, 7, 250, 333, 500, 1000):
        grid = time_grid(schedule, "ddim", num_steps)
        assert len(set(grid)) == num_steps
        assert grid[0] == 999
        assert grid == sorted(grid, reverse=True)
    assert time_grid(schedule, "ddpm", 1000) == list(range(999, -1, -1))
    assert time_grid(schedule, "dpm++", 500) == sorted(set(time_grid(schedule, "dpm++", 500)), reverse=True)


@pytest.mark.parametrize("num_steps", [0, 1001])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_steps_outside_1_to_T_are_refused(sampler, num_steps):
    with pytest.raises(InputError, match=rf"evaluation.steps {num_steps} is not in 1..1000"):
        time_grid(make_schedule("linear", 1000), sampler, num_steps)


def test_solver_state_is_float32_around_a_bfloat16_network():
    schedule, seen = make_schedule("linear", 1000), []

    def denoise(x_t, _):
        seen.append(x_t.dtype)
        return x_t.bfloat16()

    x_0 = ddim(denoise, schedule, start(), repeat(start()), num_steps=5, eta=1.0, prediction="eps", clip_x_0=True)
    assert x_0.dtype == torch.float32
    assert set(seen) == {torch.float32}


def test_predict_x_0_and_the_samplers_agree_on_what_an_output_means():
    schedule = make_schedule("cosine", 1000)
    for prediction in ("eps", "v", "x_0"):
        output, x_t = torch.randn(SHAPE), torch.randn(SHAPE)
        t = time_grid(schedule, "ddim", 1)[0]
        one = ddim(
            lambda *_, output=output: output, schedule, x_t, repeat(x_t), num_steps=1, eta=0.0, prediction=prediction,
            clip_x_0=True,
        )  # fmt: skip
        expected = predict_x_0(schedule, prediction, output, x_t, torch.full((3,), t)).clamp(-1, 1)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


def test_grid_with_steps_that_do_not_divide_t_is_rounded_to_the_nearest_step():
    grid = time_grid(make_schedule("linear", 1000), "ddim", 300)
    # 1000 - k 10 / 3 for k = 1, 2, 3: 996.67, 993.33, 990, so the steps 997, 993 and 990, counted from 0.
    assert grid[:4] == [999, 996, 992, 989] and len(set(grid)) == 300
