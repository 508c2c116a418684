"""Diffusion against closed forms: Bayes, an oracle denoiser, and Gaussian data.

For data N(mu, s^2) everything is known. x_t is N(alpha mu, alpha^2 s^2 + sigma^2), the best
denoiser is linear, and the exact ODE keeps (x_t - mean) / std, so it maps noise z to mu + s z.
"""

import math

import pytest
import torch

from diffusion import (SAMPLERS, DiffusionConfig, NoiseSchedule, ddim_sample, ddpm_sample,
                       diffusion_loss, dpm_solver_sample, guided, posterior, reconstruction_guided,
                       replaced)

SHAPE = (2, 4, 3, 5, 6)  # b c f h w, all different
MU, S = 0.7, 0.5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_schedule(**config):
    if config.get("prediction") == "eps":
        config = {"zero_terminal_snr": False, **config}
    return NoiseSchedule(DiffusionConfig(**config))


def oracle(schedule, x_start):
    """The model that knows the answer: its output means x_start wherever it is asked."""
    def model(x_t, t):
        alpha, sigma = schedule.alpha_sigma(t, x_t)
        return schedule.target(x_start, t, (x_t - alpha * x_start) / sigma)
    return model


def gaussian_model(schedule, mu=MU, s=S):
    """The optimal denoiser of data N(mu, s^2): E[eps | x_t] and E[x_start | x_t] by regression."""
    def model(x_t, t):
        alpha, sigma = schedule.alpha_sigma(t, x_t)
        white = (x_t - alpha * mu) / (alpha ** 2 * s ** 2 + sigma ** 2)
        return schedule.target(mu + alpha * s ** 2 * white, t, sigma * white)
    return model


class CountingNoise:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return torch.randn_like(x)


# Schedule

@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [2, 50, 1000])
def test_schedule_decreases_inside_the_unit_interval(name, timesteps):
    for zero in (True, False):
        a = make_schedule(schedule=name, timesteps=timesteps, zero_terminal_snr=zero).alphas_cumprod
        assert a.dtype == torch.float64 and a.shape == (timesteps,)
        assert (a.diff() < 0).all() and a[0] < 1 and (a[-1] == 0 if zero else a[-1] > 0)


def test_schedules_are_the_closed_forms():
    """Linear: the product of DDPM's betas; cosine: away from the clip."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a = make_schedule(schedule="linear", zero_terminal_snr=False).alphas_cumprod
    torch.testing.assert_close(a, (1 - beta).cumprod(0), rtol=1e-12, atol=0)

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    a = make_schedule(zero_terminal_snr=False).alphas_cumprod
    expected = torch.tensor([f(t + 1) / f(0) for t in range(998)], dtype=torch.float64)
    torch.testing.assert_close(a[:998], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_zero_terminal_snr_keeps_the_first_step_and_zeroes_the_last(name):
    a = make_schedule(schedule=name).alphas_cumprod
    plain = make_schedule(schedule=name, zero_terminal_snr=False).alphas_cumprod
    assert a[-1] == 0
    assert a[0].item() == pytest.approx(plain[0].item(), rel=1e-14)
    # Lin 2024: the rescaling is affine in sqrt(alphas_cumprod).
    ratio = (a.sqrt() - a[0].sqrt()) / (plain.sqrt() - plain[0].sqrt())
    torch.testing.assert_close(ratio[1:], ratio[-1].expand(999), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shift_divides_snr_by_its_square_before_the_rescale(shift):
    def schedule(**config):
        return make_schedule(zero_terminal_snr=False, **config).alphas_cumprod
    plain, shifted, rescaled = schedule(), schedule(shift=shift), make_schedule(shift=shift)
    torch.testing.assert_close(
        shifted / (1 - shifted), plain / (1 - plain) / shift ** 2, rtol=1e-9, atol=0)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alphas_cumprod[0].item() == pytest.approx(shifted[0].item(), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factors_are_rounded_last_and_follow_the_latents(dtype):
    schedule, t = make_schedule(), torch.tensor([0, 3, 999])
    a = schedule.alphas_cumprod[t]
    for device in ("cpu", "meta"):  # meta stands for a device of another kind
        like = torch.zeros(3, 2, 1, 1, dtype=dtype, device=device)
        alpha, sigma = schedule.alpha_sigma(t.to(device), like)
        assert alpha.shape == (3, 1, 1, 1) and alpha.device == sigma.device == like.device
        assert alpha.dtype == torch.promote_types(dtype, torch.float32)
        if device == "cpu":
            assert torch.equal(alpha.flatten(), a.sqrt().to(alpha.dtype))
            assert torch.equal(sigma.flatten(), (1 - a).sqrt().to(alpha.dtype))
    assert schedule.alphas_cumprod.dtype == torch.float64


def test_q_sample_has_the_schedules_mean_and_keeps_the_dtype():
    schedule = make_schedule()
    x_start, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    t = torch.tensor([0, 999])
    x_t = schedule.q_sample(x_start, t, noise)
    assert torch.equal(x_t[1], noise[1])  # zero terminal SNR: nothing of the data is left
    a = schedule.alphas_cumprod[0].item()
    torch.testing.assert_close(x_t[0], math.sqrt(a) * x_start[0] + math.sqrt(1 - a) * noise[0])
    sigma = schedule.alpha_sigma(t, x_start)[1][0].item()
    assert sigma == pytest.approx(math.sqrt(1 - a), rel=1e-7)  # 1 - a taken in float64
    assert schedule.q_sample(x_start.bfloat16(), t, noise.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("prediction", ["v", "eps", "x_start"])
def test_predict_inverts_target_and_output(prediction):
    schedule = make_schedule(prediction=prediction)
    x_start, noise = torch.randn(2, *SHAPE, dtype=torch.float64).unbind()
    for t in (0, 1, 500, 998, 999):
        if prediction == "v" and t == 999:
            assert torch.equal(schedule.target(x_start, torch.tensor([t, t]), noise), -x_start)
        t = torch.tensor([t, 300])
        x_t = schedule.q_sample(x_start, t, noise)
        predicted = schedule.predict(schedule.target(x_start, t, noise), x_t, t)
        torch.testing.assert_close(predicted, (x_start, noise))
        found, _ = schedule.predict(schedule.output(x_start, noise, t), noise, t)  # for any x_t
        torch.testing.assert_close(found, x_start)
    pair = schedule.predict(noise.bfloat16(), noise.float(), t)
    assert [x.dtype for x in pair] == [torch.float32] * 2


def test_timesteps_begin_at_the_noisiest_and_are_evenly_spaced():
    schedule = make_schedule()
    assert schedule.timesteps(4) == [999, 749, 499, 249]
    assert schedule.timesteps(1) == [999]
    assert schedule.timesteps(1000) == list(range(999, -1, -1))
    for schedule, total in ((make_schedule(timesteps=97), 97), (schedule, 1000)):
        for steps in range(1, total + 1):
            t = schedule.timesteps(steps)
            assert t[0] == total - 1 and t[-1] >= 0 and len(t) == steps
            gaps = [earlier - later for earlier, later in zip(t, [*t[1:], -1])]
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


# Loss

def test_loss_is_the_mean_squared_error_with_the_target():
    x_start, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    t = torch.tensor([10, 999])
    for prediction, expected in [("eps", noise), ("x_start", x_start)]:
        schedule = make_schedule(prediction=prediction)
        loss = diffusion_loss(lambda x, t: torch.zeros_like(x), schedule, x_start, t, noise)
        torch.testing.assert_close(loss, (expected ** 2).mean(dim=(1, 2, 3, 4)))
    schedule = make_schedule()
    perfect = diffusion_loss(oracle(schedule, x_start), schedule, x_start, t, noise)
    assert (perfect < 1e-9).all()
    half = diffusion_loss(lambda x, t: x.bfloat16(), schedule, x_start, t, noise)
    assert half.dtype == torch.float32 and half.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_frames_left_out_of_the_loss_get_no_gradient(dtype):
    schedule, t = make_schedule(), torch.tensor([10, 500])
    x_start, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    keep = torch.tensor([[0, 1, 1], [0, 0, 1]]).to(dtype)
    output = torch.randn(SHAPE, requires_grad=True)
    loss = diffusion_loss(lambda x, t: output, schedule, x_start, t, noise, keep)
    loss.mean().backward()
    grad = output.grad.abs().amax(dim=(1, 3, 4))
    assert (grad[keep == 0] == 0).all() and (grad[keep != 0] > 0).all()

    # The mean over the kept frames of each sample.
    error = (output.detach() - schedule.target(x_start, t, noise)) ** 2
    expected = torch.stack([error[0, :, 1:].mean(), error[1, :, 2:].mean()])
    torch.testing.assert_close(loss.detach(), expected)
    none = torch.zeros_like(keep)
    assert not diffusion_loss(lambda x, t: output, schedule, x_start, t, noise, none).any()
    everything = diffusion_loss(lambda x, t: output, schedule, x_start, t, noise)
    torch.testing.assert_close(everything.detach().mean(), error.mean())


def test_min_snr_weights():
    t, gamma = torch.tensor([0, 300, 700, 998]), 5.0
    for prediction in ("v", "eps", "x_start"):
        schedule = make_schedule(prediction=prediction, min_snr_gamma=gamma)
        a = schedule.alphas_cumprod[t]
        for weight, snr in zip(schedule.loss_weight(t), (a / (1 - a)).tolist()):
            divisor = {"v": snr + 1, "eps": snr, "x_start": 1}[prediction]
            assert weight.item() == pytest.approx(min(snr, gamma) / divisor, rel=1e-6)
    assert torch.equal(make_schedule().loss_weight(t), torch.ones(4))


# Guidance

def test_guidance_one_is_the_conditional_output_bit_for_bit():
    conditional, unconditional = torch.randn(2, *SHAPE).unbind()
    output = guided(lambda x, t: (conditional, unconditional), 1.0, rescale=0.7)(None, None)
    assert torch.equal(output, conditional)
    output = guided(lambda x, t: (conditional, unconditional), 0.0)(None, None)
    assert torch.equal(output, unconditional)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_changes_every_channel(rescale):
    pair = conditional, unconditional = torch.randn(2, *SHAPE).unbind()
    output = guided(lambda x, t: pair, 3.0, rescale)(None, None)
    assert ((output - conditional).abs().amin(dim=(0, 2, 3, 4)) > 0).all()
    if not rescale:
        torch.testing.assert_close(output, 3 * conditional - 2 * unconditional)
    half = guided(lambda x, t: (pair[0].bfloat16(), pair[1].bfloat16()), 5.0, rescale)(None, None)
    assert half.dtype == torch.float32


def test_full_rescale_gives_back_the_std_of_the_conditional():
    conditional, unconditional = torch.randn(2, *SHAPE).unbind()
    conditional[1] *= 4  # each sample has its own std
    plain, half, full = (guided(lambda x, t: (conditional, unconditional), 6.0, rescale)(None, None)
                         for rescale in (0.0, 0.5, 1.0))
    torch.testing.assert_close(full.flatten(1).std(1), conditional.flatten(1).std(1))
    torch.testing.assert_close(half, (plain + full) / 2)
    zero = torch.zeros(SHAPE)
    assert torch.equal(guided(lambda x, t: (zero, zero), 6.0, 1.0)(None, None), zero)


# Samplers

def test_posterior_equals_brute_force_bayes():
    # p(x_next | x_t, x_start) is proportional to q(x_t | x_next) q(x_next | x_start), on a grid.
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    x_start, x_t = 0.8, -0.3
    schedule = make_schedule(zero_terminal_snr=False)
    for t, t_next in [(500, 499), (900, 300), (700, 20), (100, 60)]:
        a, a_next = schedule.alphas_cumprod[[t, t_next]].tolist()
        step = a / a_next
        density = torch.exp(-(x_t - math.sqrt(step) * grid) ** 2 / (2 * (1 - step))
                            - (grid - math.sqrt(a_next) * x_start) ** 2 / (2 * (1 - a_next)))
        density /= density.sum()
        mean = (density * grid).sum().item()
        x_start_factor, x_t_factor, variance = posterior(a, a_next)
        assert x_start_factor * x_start + x_t_factor * x_t == pytest.approx(mean, abs=1e-9)
        assert variance == pytest.approx((density * (grid - mean) ** 2).sum().item(), rel=1e-6)
    assert posterior(0.9, 1.0) == (1.0, 0.0, 0.0)  # to clean data: x_start itself, no noise
    assert posterior(0.0, 0.3) == pytest.approx((math.sqrt(0.3), 0.0, 0.7))  # from pure noise


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("prediction", ["v", "eps", "x_start"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_an_oracle_denoiser_gives_x_start(sampler, prediction, steps):
    # Linear for eps: without zero terminal SNR, cosine ends where float32 eps says nothing.
    name = "linear" if prediction == "eps" else "cosine"
    schedule = make_schedule(prediction=prediction, schedule=name)
    x_start = torch.randn(SHAPE)
    x = SAMPLERS[sampler](oracle(schedule, x_start), schedule, torch.randn(SHAPE), steps)
    torch.testing.assert_close(x, x_start, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 100])
def test_ddim_with_eta_one_is_ddpm(steps):
    schedule = make_schedule(timesteps=100)
    model = gaussian_model(schedule)
    noise = torch.randn(SHAPE)
    torch.manual_seed(1)
    ddpm = ddpm_sample(model, schedule, noise, steps)
    torch.manual_seed(1)
    ddim = ddim_sample(model, schedule, noise, steps, eta=1.0)
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=2e-6)
    assert (ddpm - ddim_sample(model, schedule, noise, steps)).abs().max() > 0.1


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_no_noise_is_drawn_at_the_last_step(steps):
    schedule = make_schedule()
    noise, model = torch.randn(SHAPE), gaussian_model(schedule)
    for sampler, options, calls in [(ddpm_sample, {}, steps - 1), (ddim_sample, {}, 0),
                                    (ddim_sample, {"eta": 1.0}, steps - 1),
                                    (dpm_solver_sample, {}, 0)]:
        randn_like = CountingNoise()
        sampler(model, schedule, noise, steps, randn_like=randn_like, **options)
        assert randn_like.calls == calls
    once, again = (ddpm_sample(model, schedule, noise, 1) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("sampler, steps", [("ddpm", 300), ("ddim", 100), ("dpm", 30)])
@pytest.mark.parametrize("prediction", ["v", "x_start"])
def test_every_sampler_draws_the_gaussian(sampler, steps, prediction):
    schedule = make_schedule(prediction=prediction)
    noise = torch.randn(1, 1, 1, 100, 200)
    x = SAMPLERS[sampler](gaussian_model(schedule), schedule, noise, steps)
    # 20,000 samples: standard errors of 0.0035 and 0.0025, and a few percent of discretisation
    assert x.mean().item() == pytest.approx(MU, abs=0.015)
    assert x.std().item() == pytest.approx(S, rel=0.03)


def exact_ode_error(sampler, steps, **config):
    schedule = make_schedule(**config)
    noise = torch.linspace(-2, 2, 41).reshape(1, 1, 1, 1, 41)
    x = sampler(gaussian_model(schedule), schedule, noise, steps)
    return (x - (MU + S * noise)).abs().max().item()


@pytest.mark.parametrize("name, fraction", [("linear", 0.8), ("cosine", 0.5)])
def test_dpm_solver_is_closer_to_the_exact_ode_than_ddim(name, fraction):
    ddim, dpm = ([exact_ode_error(sampler, steps, schedule=name) for steps in (10, 20, 100)]
                 for sampler in (ddim_sample, dpm_solver_sample))
    assert dpm[0] < fraction * ddim[0]
    for errors in (ddim, dpm):
        assert errors[0] > errors[1] > errors[2]


def test_dpm_solver_first_and_last_steps_are_first_order():
    # DDIM is the first-order DPM-Solver++, so one and two steps are the same as DDIM.
    schedule = make_schedule(zero_terminal_snr=False, schedule="linear")
    model, noise = gaussian_model(schedule), torch.randn(SHAPE)
    for steps, same in [(1, True), (2, True), (3, False)]:
        dpm, ddim = (f(model, schedule, noise, steps) for f in (dpm_solver_sample, ddim_sample))
        assert torch.allclose(dpm, ddim, atol=1e-5) == same


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_sampler_contract(sampler):
    schedule, seen = make_schedule(), []
    noise = torch.randn(SHAPE)
    before = noise.clone()

    def model(x_t, t):
        assert x_t.dtype == torch.float32 and x_t.shape == SHAPE
        assert t.dtype == torch.int64 and t.shape == SHAPE[:1] and (t == t[0]).all()
        seen.append(t[0].item())
        return (gaussian_model(schedule)(x_t, t)).bfloat16()

    watched = []
    x = SAMPLERS[sampler](model, schedule, noise, 6, watch=lambda *args: watched.append(args))
    assert x.dtype == torch.float32 and x.shape == SHAPE and x.isfinite().all()
    assert list(dict.fromkeys(seen)) == schedule.timesteps(6)  # each once, or more often
    assert [(step, t) for step, t, _, _ in watched] == list(enumerate(schedule.timesteps(6)))
    assert torch.equal(watched[0][2], noise) and torch.equal(watched[-1][3], x)
    assert torch.equal(noise, before)
    half = SAMPLERS[sampler](gaussian_model(schedule), schedule, noise.bfloat16(), 2)
    assert half.dtype == torch.float32


# Given frames. At every pixel the frames of a clip are N(0, COVARIANCE), so the best denoiser is a
# matrix over time, and given frame 0 the others are Gaussian with a known mean and variance.

COVARIANCE = 0.9 ** (torch.arange(3)[:, None] - torch.arange(3)).abs()  # a random walk, nearly
CLIPS = (4, 1, 3, 40, 50)  # 8,000 pixels
FIRST = torch.tensor([True, False, False]).expand(4, -1)


def gain_of_denoiser(schedule, t, covariance):
    """The matrix A of E[x_start | x_t] = A x_t over the frames, and alpha and sigma."""
    a = schedule.alphas_cumprod[t].float()
    noisy = a * covariance + (1 - a) * torch.eye(len(covariance))
    return a.sqrt() * covariance @ noisy.inverse(), a.sqrt(), (1 - a).sqrt()


def over_frames(matrix, x):
    return torch.einsum("fg,bcghw->bcfhw", matrix, x)


def clip_model(schedule):
    """The best denoiser of clips when nothing is given."""
    def model(x_t, t):
        gain, _, _ = gain_of_denoiser(schedule, t[0], COVARIANCE)
        return schedule.output(over_frames(gain, x_t), x_t, t)
    return model


def given_the_first(given):
    """Mean (b, c, 2, h, w) and covariance of frames 1 and 2 when frame 0 is given."""
    slope = COVARIANCE[1:, :1]
    return over_frames(slope, given[:, :, :1]), COVARIANCE[1:, 1:] - slope @ slope.T


def informed_model(schedule, given):
    """The best denoiser when frame 0 is given: what a model trained with masks should learn."""
    mean, covariance = given_the_first(given)

    def model(x_t, t):
        gain, alpha, _ = gain_of_denoiser(schedule, t[0], covariance)
        rest = mean + over_frames(gain, x_t[:, :, 1:] - alpha * mean)
        return schedule.output(torch.cat([torch.zeros_like(given[:, :, :1]), rest], 2), x_t, t)
    return model


def informed_models(schedule, given):
    """The three ways of conditioning on frame 0, by their names in sample.py."""
    model = clip_model(schedule)
    return {
        "mask": replaced(informed_model(schedule, given), schedule, given, FIRST),
        "replacement": replaced(model, schedule, given, FIRST),
        "reconstruction": reconstruction_guided(model, schedule, given, FIRST),
    }


@pytest.mark.parametrize("prediction", ["v", "eps", "x_start"])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_given_frames_come_back(sampler, prediction):
    schedule = make_schedule(prediction=prediction, schedule="linear")
    given, noise = torch.randn(2, *CLIPS).unbind()
    mask = torch.tensor([[True, False, True], [False] * 3, [False, True, False], [True] * 3])
    for inform in (replaced, reconstruction_guided):
        model = inform(clip_model(schedule), schedule, given, mask)
        x = SAMPLERS[sampler](model, schedule, noise, 5).transpose(1, 2)
        torch.testing.assert_close(x[mask], given.transpose(1, 2)[mask], atol=2e-5, rtol=1e-4)
        assert (x[~mask] - given.transpose(1, 2)[~mask]).abs().mean() > 0.1


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_on_the_way_given_frames_carry_the_noise_of_their_step(sampler):
    schedule, given = make_schedule(), 5 + torch.randn(CLIPS)
    seen = []

    def model(x_t, t):
        alpha, sigma = schedule.alpha_sigma(t, x_t)
        seen.append(((x_t - alpha * given) / sigma)[:, :, 0])
        return clip_model(schedule)(x_t, t)

    SAMPLERS[sampler](replaced(model, schedule, given, FIRST), schedule, torch.randn(CLIPS), 10)
    for eps in seen:  # 8,000 draws of N(0, 1)
        assert eps.mean().abs() < 0.05 and eps.std().item() == pytest.approx(1, abs=0.05)
    # The deterministic samplers keep the noise that they start from.
    assert torch.allclose(seen[0], seen[-1], atol=1e-3) == (sampler != "ddpm")


def test_reconstruction_guidance_is_the_papers_equation():
    schedule, given, x_t = make_schedule(), torch.randn(CLIPS), torch.randn(CLIPS)
    t = torch.full((4,), 400)
    gain, alpha, _ = gain_of_denoiser(schedule, 400, COVARIANCE)
    model = reconstruction_guided(clip_model(schedule), schedule, given, FIRST, weight=3.0)
    found, _ = schedule.predict(model(x_t, t), x_t, t)
    plain = over_frames(gain, x_t)
    # Ho 2022 eq. 7: - w_r alpha / 2 times the gradient of |given - plain|^2 at frame 0
    error = (given - plain)[:, :, :1]
    expected = plain + 3.0 * alpha * over_frames(gain[:1].T, error)
    torch.testing.assert_close(found[:, :, 1:], expected[:, :, 1:])
    assert not x_t.requires_grad and not found.requires_grad


def test_reconstruction_guidance_is_exact_where_there_is_little_noise():
    """There the paper's Gaussian for q(given | x_t) is the true one: w_r = 1 is Bayes (eq. 6)."""
    schedule, given = make_schedule(), torch.randn(CLIPS)
    t = torch.full((4,), 15)
    x_t = schedule.q_sample(torch.randn(CLIPS), t, torch.randn(CLIPS))

    def x_start(model):
        return schedule.predict(model(x_t, t), x_t, t)[0][:, :, 1:]

    exact = x_start(informed_model(schedule, given))
    guidance = reconstruction_guided(clip_model(schedule), schedule, given, FIRST, weight=1.0)
    missing = x_start(replaced(clip_model(schedule), schedule, given, FIRST)) - exact
    assert (x_start(guidance) - exact).norm() < 0.05 * missing.norm()


def test_who_draws_the_conditional_gaussian():
    """A model that sees the given frame draws the true conditional; guidance comes near, plain
    replacement remains less than half-way and keeps too much freedom."""
    schedule = make_schedule()
    given, noise = torch.full(CLIPS, 1.5), torch.randn(CLIPS)
    mean, covariance = given_the_first(given)
    x = {name: ddim_sample(model, schedule, noise, 50)[:, :, 1:]
         for name, model in informed_models(schedule, given).items()}
    share = {name: video.mean((0, 1, 3, 4)) / mean[0, 0, :, 0, 0] for name, video in x.items()}
    std = {name: video.std((0, 1, 3, 4)) / covariance.diag().sqrt() for name, video in x.items()}
    assert (share["mask"] - 1).abs().max() < 0.02 and (std["mask"] - 1).abs().max() < 0.06
    assert share["replacement"].max() < 0.5 and std["replacement"].min() > 1.3
    assert share["reconstruction"].min() > 0.75 and (std["reconstruction"] - 1).abs().max() < 0.15


# Errors

def test_bad_settings_are_refused_in_one_line():
    for config in ({"schedule": "sigmoid"}, {"prediction": "score"}, {"timesteps": 1},
                   {"zero_terminal_snr": True, "prediction": "eps"}, {"shift": 0.0},
                   {"min_snr_gamma": -1.0}):
        with pytest.raises(ValueError, match=next(iter(config))) as error:
            NoiseSchedule(DiffusionConfig(**config))
        assert "\n" not in str(error.value)
    for name, values in {"steps": (0, -1, 1001), "eta": (-0.1, 1.5)}.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                ddim_sample(None, make_schedule(), torch.randn(SHAPE), **{"steps": 2, name: value})
