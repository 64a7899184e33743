import math

import pytest
import torch

from shared.diffusion.schedule import make_schedule, predict_x_0, q_sample, training_target
from shared.errors import InputError


def test_linear_betas_are_those_of_ddpm():
    beta = make_schedule("linear", 1000).beta
    assert beta.dtype == torch.float64
    assert beta[0] == 1e-4
    assert beta[-1] == 0.02
    assert torch.allclose(beta.diff(), torch.full((999,), (0.02 - 1e-4) / 999, dtype=torch.float64), atol=1e-15)


def test_cosine_alpha_bar_follows_its_formula_and_ends_clipped():
    schedule = make_schedule("cosine", 1000)

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 499, 990):
        assert math.isclose(schedule.alpha_bar[t].item(), f((t + 1) / 1000) / f(0), rel_tol=1e-9)
    assert schedule.beta.max() == 0.999


@pytest.mark.parametrize(("kind", "name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_tables_agree_with_diffusers(kind, name):
    from diffusers import DDPMScheduler  # loads for seconds

    reference = DDPMScheduler(1000, beta_schedule=name)
    schedule = make_schedule(kind, 1000)
    torch.testing.assert_close(schedule.beta.float(), reference.betas, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(schedule.alpha_bar.float(), reference.alphas_cumprod, rtol=1e-3, atol=1e-7)
    variances = torch.stack([reference._get_variance(t) for t in range(1, 1000)]).sqrt()
    torch.testing.assert_close(schedule.posterior_sigma[1:].float(), variances, rtol=1e-3, atol=1e-7)
    assert schedule.posterior_sigma[0] == 0


def test_forward_process_is_the_composition_of_its_single_steps():
    schedule = make_schedule("linear", 50)
    mean, variance = torch.ones(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    signal, spread = 1.0, 0.0
    for t in range(50):
        signal *= math.sqrt(1 - schedule.beta[t].item())
        spread = spread * (1 - schedule.beta[t].item()) + schedule.beta[t].item()
        mean[t], variance[t] = signal, spread
    torch.testing.assert_close(schedule.signal, mean)
    torch.testing.assert_close(schedule.noise.square(), variance)


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 7, 12), (5,)])
def test_q_sample_scales_each_image_by_its_own_time(shape):
    schedule, t = make_schedule("cosine", 1000), torch.tensor([0, 3, 500, 998, 999])
    x_0, eps = torch.randn(shape), torch.randn(shape)
    x_t = q_sample(schedule, x_0, t, eps)
    assert x_t.dtype == torch.float32
    for k, time in enumerate(t.tolist()):
        alpha_bar = schedule.alpha_bar[time].item()
        torch.testing.assert_close(x_t[k], math.sqrt(alpha_bar) * x_0[k] + math.sqrt(1 - alpha_bar) * eps[k])


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_x_0_comes_back_from_the_training_target(kind, prediction):
    schedule, t = make_schedule(kind, 1000), torch.tensor([0, 250, 900, 999])
    x_0, eps = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    x_t = q_sample(schedule, x_0, t, eps)
    target = training_target(schedule, prediction, x_0, t, eps)
    torch.testing.assert_close(predict_x_0(schedule, prediction, target, x_t, t), x_0, rtol=1e-6, atol=1e-6)


def test_v_agrees_with_diffusers():
    t = torch.tensor([0, 400, 999])
    x_0, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    from diffusers import DDPMScheduler  # loads for seconds

    reference = DDPMScheduler(1000, beta_schedule="linear").get_velocity(x_0, eps, t)
    torch.testing.assert_close(
        training_target(make_schedule("linear", 1000), "v", x_0, t, eps), reference, rtol=1e-4, atol=1e-5
    )


def test_a_second_time_dimension_meets_the_draw_axis():
    schedule, t = make_schedule("linear", 1000), torch.tensor([[1, 2], [3, 999]])
    x_0, eps = torch.randn(2, 2, 4, 6), torch.randn(2, 2, 4, 6)
    both = q_sample(schedule, x_0, t, eps)
    torch.testing.assert_close(both[1, 1], q_sample(schedule, x_0[1:, 1], t[1:, 1], eps[1:, 1])[0])


def test_one_step_is_refused_with_value_and_remedy():
    with pytest.raises(InputError, match="timesteps 1 is below 2"):
        make_schedule("linear", 1)
