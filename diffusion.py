"""Gaussian diffusion on video latents: noise schedule, training loss, guidance and three samplers.

A model is any callable `model(x_t, t) -> output`; the caller closes over text and given frames.
`guided`, `replaced` and `reconstruction_guided` make a better-informed model out of another.

Glossary: `b` batch, `c` channels, `f` frames, `h w` height and width. Latents are (b, c, f, h, w).
`t` is the diffusion timestep, 0 (almost clean) .. T-1 (noise), never a frame index. With
alpha_t = sqrt(alphas_cumprod[t]) and sigma_t = sqrt(1 - alphas_cumprod[t]) a noisy latent is
x_t = alpha_t * x_start + sigma_t * eps. SNR = alpha_t^2 / sigma_t^2, the signal-to-noise ratio.

Papers: DDPM (Ho 2020, arXiv 2006.11239), DDIM (Song 2021, 2010.02502), improved DDPM (Nichol 2021,
2102.09672), v-prediction (Salimans & Ho 2022, 2202.00512), guidance (Ho & Salimans 2022,
2207.12598), reconstruction guidance (Ho 2022, 2204.03458), DPM-Solver++ (Lu 2022, 2211.01095),
simple diffusion (Hoogeboom 2023, 2301.11093), min-SNR (Hang 2023, 2303.09556), zero terminal SNR
(Lin 2024, 2305.08891).

    schedule = NoiseSchedule(DiffusionConfig())
    loss = diffusion_loss(model, schedule, x_start, t, noise).mean()
    x_start = SAMPLERS["dpm"](model, schedule, noise, steps=25)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]  # model(x_t, t) -> output


# ------------------------------------------------------------------------------ the noise schedule


@dataclass(frozen=True)
class DiffusionConfig:
    """What the noise is and what the network predicts. ValueError if the values do not fit."""

    timesteps: int = 1000  # T
    schedule: str = "cosine"  # "linear" or "cosine"
    prediction: str = "v"  # "v", "eps" or "x_start"
    zero_terminal_snr: bool = True  # x at t = T-1 is pure noise, as it is when sampling starts
    shift: float = 1.0  # multiplies sigma / alpha; above 1 is more noise, for larger latents
    min_snr_gamma: float | None = None  # 5 in the paper; None weighs all t alike. With zero
    # terminal SNR its weight at t = T-1 is 0, so that step would go untrained.

    def __post_init__(self):
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"unknown schedule {self.schedule!r}: choose 'linear' or 'cosine'")
        if self.prediction not in ("v", "eps", "x_start"):
            raise ValueError(f"unknown prediction {self.prediction!r}: choose v, eps or x_start")
        if self.prediction == "eps" and self.zero_terminal_snr:
            raise ValueError("prediction 'eps' needs zero_terminal_snr=False: the last step is "
                             "pure noise, so eps does not determine x_start there")
        if self.timesteps < 2:
            raise ValueError(f"timesteps must be at least 2, got {self.timesteps}")
        for name in ("shift", "min_snr_gamma"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


def make_alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """The config's alphas_cumprod: float64 (T,), decreasing, inside [0, 1)."""
    if config.schedule == "linear":
        # DDPM section 4 gives the betas for T = 1000; other T keep about the same total noise.
        betas = torch.linspace(0.1, 20, config.timesteps, dtype=torch.float64) / config.timesteps
    else:
        # Nichol 2021 eq. 17; the offset 0.008 keeps the first betas from being too small.
        time = torch.linspace(0, 1, config.timesteps + 1, dtype=torch.float64)
        f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    # Nichol 2021 section 3.2: no singularity at the last step. Also bounds linear betas at tiny T.
    alphas_cumprod = torch.cumprod(1 - betas.clamp(max=0.999), dim=0)
    # Hoogeboom 2023 section 3.1: SNR / shift^2, written without the division by 1 - alphas_cumprod.
    noise = config.shift ** 2 * (1 - alphas_cumprod)
    alphas_cumprod = alphas_cumprod / (alphas_cumprod + noise)
    if config.zero_terminal_snr:
        # Lin 2024 Algorithm 1: shift sqrt(alphas_cumprod) so that the last is 0, then stretch it
        # so that the first is what it was.
        root = alphas_cumprod.sqrt()
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas_cumprod


class NoiseSchedule:
    """q(x_t | x_start) and the conversions between x_start, eps and v.

    Latents may have any rank, float dtype and device; t is int64 (b,) on the same device. The
    arithmetic is float32 or better; results have the dtype of the latent that was passed.
    alphas_cumprod: float64 (T,), always on the CPU, since some devices have no float64.
    """

    def __init__(self, config: DiffusionConfig):
        self.config = config
        self.alphas_cumprod = make_alphas_cumprod(config)
        if not (self.alphas_cumprod.diff() < 0).all():
            raise ValueError(f"no schedule comes of shift {config.shift}: choose one nearer to 1")
        self.tables = {}  # alpha and sigma of all t, (2, T), for each device and dtype

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each (b, 1, .., 1) to broadcast over `like`, float32 or better."""
        device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        if (device, dtype) not in self.tables:
            a = self.alphas_cumprod
            # Cast last: 1 - a in float32 would cost the small sigmas half of their digits.
            table = torch.stack([a.sqrt(), (1 - a).sqrt()]).to(dtype)
            self.tables[device, dtype] = table.to(device)
        factors = self.tables[device, dtype][:, t]
        return factors.reshape(2, -1, *[1] * (like.dim() - 1)).unbind()

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t from x_start and unit noise of the same shape (DDPM eq. 4)."""
        alpha, sigma = self.alpha_sigma(t, x_start)
        return (alpha * x_start + sigma * noise).to(x_start.dtype)

    def target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should output, in the shape and dtype of x_start."""
        alpha, sigma = self.alpha_sigma(t, x_start)
        # v: Salimans & Ho 2022 appendix D
        targets = {"v": alpha * noise - sigma * x_start, "eps": noise, "x_start": x_start}
        return targets[self.config.prediction].to(x_start.dtype)

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_start, eps) that a network output means at x_t; both in the dtype of x_t."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.config.prediction == "eps":
            x_start, eps = (x_t - sigma * output) / alpha, output
        elif self.config.prediction == "x_start":
            x_start, eps = output, (x_t - alpha * output) / sigma
        else:
            # (x_t, v) is (x_start, eps) rotated: rotate back. No division, so any SNR will do.
            x_start, eps = alpha * x_t - sigma * output, sigma * x_t + alpha * output
        return x_start.to(x_t.dtype), eps.to(x_t.dtype)

    def output(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network output that means x_start at x_t (`predict` backwards), as x_start.dtype."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        return self.target(x_start, t, (x_t - alpha * x_start) / sigma)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Min-SNR-gamma weights (b,), float32 (Hang 2023 section 3.4); 1 without gamma."""
        if self.config.min_snr_gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        alpha, sigma = self.alpha_sigma(t, t.float())
        snr = (alpha / sigma) ** 2
        # min(SNR, gamma) is for the squared error in x_start. The same mistake is SNR times larger
        # when it is measured in eps and SNR + 1 times in v, so those weights are divided by that.
        divisor = {"v": snr + 1, "eps": snr, "x_start": 1}[self.config.prediction]
        return snr.clamp(max=self.config.min_snr_gamma) / divisor

    def timesteps(self, steps: int) -> list[int]:
        """`steps` decreasing timesteps, evenly spaced ("trailing" in Lin 2024, section 3.3).

        The first is T-1: starting below would hand pure noise to a network that expects some
        signal. ValueError unless 1 <= steps <= T.
        """
        total = self.config.timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"steps must be between 1 and {total}, got {steps}")
        return [total - i * total // steps - 1 for i in range(steps)]


# ------------------------------------------------------------------------------ loss and guidance


def diffusion_loss(model: Model, schedule: NoiseSchedule, x_start: Tensor, t: Tensor,
                   noise: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean squared error of the model's output at x_t for each sample, float32 (b,) (DDPM eq. 14).

    x_start, noise: (b, c, f, h, w); t: int64 (b,). keep: (b, f), 1 for the frames that count, 0
    for those the model was given clean and could copy. Every sample weighs the same, however many
    of its frames count; one with none adds 0.
    """
    output = model(schedule.q_sample(x_start, t, noise), t)
    error = (output.float() - schedule.target(x_start, t, noise).float()) ** 2
    error = reduce(error, "b c f h w -> b f", "mean")
    keep = torch.ones_like(error) if keep is None else keep.to(error.dtype)
    per_sample = (error * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1)
    return schedule.loss_weight(t) * per_sample


def guided(denoise_pair: Callable, scale: float, rescale: float = 0.0) -> Model:
    """Classifier-free guidance: a model(x_t, t) made from a pair of predictions.

    denoise_pair(x_t, t) returns the (conditional, unconditional) outputs, which the caller gets
    from one batch of 2b: `model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)`.
    scale 1 is the conditional output itself (so a caller may skip the pair), 0 the unconditional
    one, more is stronger. rescale, in [0, 1], pulls the output's std back to the conditional one's.
    """

    def model(x_t, t):
        """The guided output."""
        conditional, unconditional = denoise_pair(x_t, t)
        if scale == 1:
            return conditional
        # Float32: the difference of two close bf16 outputs, times scale, would be mostly rounding.
        conditional, unconditional = conditional.float(), unconditional.float()
        # Ho & Salimans 2022 eq. 6, scale = 1 + w. At a given x_t every prediction type is affine
        # in eps, so to guide the output is to guide eps. Every channel is guided.
        output = unconditional + scale * (conditional - unconditional)
        if rescale:
            # Lin 2024 eq. 15-16: a large scale inflates the std and overexposes the picture.
            std, wanted = (o.std((1, 2, 3, 4), keepdim=True) for o in (output, conditional))
            # clamp: a head that is still zero-initialised has std 0.
            output = rescale * output * wanted / std.clamp(min=1e-8) + (1 - rescale) * output
        return output
    return model


# ------------------------------------------------------------------------------ the samplers

# Samplers. One signature; all return x_start, float32, not clamped (latents have no fixed range).
#   model(x_t, t) -> output, with t an int64 tensor (b,); the output may be half precision
#   x            unit noise (b, c, f, h, w), the state at t = T-1
#   steps        network evaluations, 1..T, else ValueError
#   randn_like   draws fresh unit noise like its argument; pass one with your own seeds
#   watch        is called as watch(step, t, x_t, x_start) with each prediction, step = 0, 1, ..
# `a` and `a_next` are alphas_cumprod before and after a step; a_next is 1, no noise, at the last.

def sampling_steps(schedule: NoiseSchedule, steps: int) -> list:
    """[(step, (t, a, a_next)), ...] in Python's own numbers, so float64 on every device."""
    t = schedule.timesteps(steps)
    a = schedule.alphas_cumprod[t].tolist()
    return list(enumerate(zip(t, a, a[1:] + [1.0])))


def denoise(model: Model, schedule: NoiseSchedule, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """(x_start, eps) predicted at x when the whole batch is at the timestep t (an int)."""
    t = torch.full((len(x),), t, dtype=torch.long, device=x.device)
    return schedule.predict(model(x, t), x, t)


def posterior(a: float, a_next: float) -> tuple[float, float, float]:
    """q(x_next | x_t, x_start): the mean's factors of x_start and x_t, and the variance.

    DDPM eq. 6-7. The ratio a / a_next is the alpha of one step of the chain that visits only the
    chosen timesteps, so any subset of them is a valid chain.
    """
    alpha = a / a_next
    clean, noisy = (1 - alpha) / (1 - a), (1 - a_next) / (1 - a)
    return math.sqrt(a_next) * clean, math.sqrt(alpha) * noisy, (1 - alpha) * noisy


@torch.no_grad()
def ddpm_sample(model: Model, schedule: NoiseSchedule, x: Tensor, steps: int,
                randn_like: Callable = torch.randn_like, watch: Callable | None = None) -> Tensor:
    """Ancestral sampling (DDPM Algorithm 2) over any number of steps."""
    x = x.float()
    for step, (t, a, a_next) in sampling_steps(schedule, steps):
        x_start, _ = denoise(model, schedule, x, t)
        if watch is not None:
            watch(step, t, x, x_start)
        x_start_factor, x_t_factor, variance = posterior(a, a_next)
        x = x_start_factor * x_start + x_t_factor * x
        if variance > 0:
            x = x + math.sqrt(variance) * randn_like(x)
    return x


@torch.no_grad()
def ddim_sample(model: Model, schedule: NoiseSchedule, x: Tensor, steps: int,
                randn_like: Callable = torch.randn_like, watch: Callable | None = None,
                eta: float = 0.0) -> Tensor:
    """DDIM: eta 0 is deterministic, 1 is DDPM. ValueError unless 0 <= eta <= 1."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    x = x.float()
    for step, (t, a, a_next) in sampling_steps(schedule, steps):
        x_start, eps = denoise(model, schedule, x, t)
        if watch is not None:
            watch(step, t, x, x_start)
        # Song 2021 eq. 16, which is eta^2 times the posterior variance
        variance = eta ** 2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
        # Song 2021 eq. 12; max() because rounding may leave -1e-17 at tiny a, eta = 1
        x = math.sqrt(a_next) * x_start + math.sqrt(max(1 - a_next - variance, 0)) * eps
        if variance > 0:
            x = x + math.sqrt(variance) * randn_like(x)
    return x


@torch.no_grad()
def dpm_solver_sample(model: Model, schedule: NoiseSchedule, x: Tensor, steps: int,
                      randn_like: Callable = torch.randn_like,
                      watch: Callable | None = None) -> Tensor:
    """DPM-Solver++(2M): second order, so few steps do. Deterministic: randn_like is not used."""
    x = x.float()
    x_start_last = h_last = None
    for step, (t, a, a_next) in sampling_steps(schedule, steps):
        x_start, _ = denoise(model, schedule, x, t)
        if watch is not None:
            watch(step, t, x, x_start)
        # Lu 2022: lambda = log(alpha / sigma), h = lambda_next - lambda. e^-h as a ratio is exact
        # where lambda is infinite: it is 0 from pure noise (a = 0) and to clean data (a_next = 1).
        exp_minus_h = math.sqrt(a * (1 - a_next) / ((1 - a) * a_next))
        h = -math.log(exp_minus_h) if exp_minus_h > 0 else math.inf
        # Lu 2022 Algorithm 2: extrapolate x_start along lambda from the last two predictions,
        # D = (1 + 1/2r) x_start - 1/2r x_start_last, r = h_last / h. The first and last step are
        # first order; after a start at pure noise h_last is infinite, 1/2r is 0, as it should be.
        d = x_start
        if x_start_last is not None and a_next < 1:
            d = x_start + h / (2 * h_last) * (x_start - x_start_last)
        x = math.sqrt((1 - a_next) / (1 - a)) * x + math.sqrt(a_next) * (1 - exp_minus_h) * d
        x_start_last, h_last = x_start, h
    return x


SAMPLERS = {"dpm": dpm_solver_sample, "ddim": ddim_sample, "ddpm": ddpm_sample}

# ------------------------------------------------------------------------------ given frames

# given: clean latents (b, c, f, h, w), of which only the given frames count; given_mask: bool
# (b, f), True at these. Both functions return a model(x_t, t) whose x_start is `given` there, so
# every sampler ends with the given latents as they are. On the way it carries them at the noise of
# its step, a draw from q(x_t | given): this is the replacement of Ho 2022, section 3.1 (and before
# that of Song 2021, 2011.13456), and needs no other code.

def replaced(model: Model, schedule: NoiseSchedule, given: Tensor, given_mask: Tensor) -> Model:
    """Replacement: the model never errs about the given frames, and sees them noisy in x_t.

    Enough for a model that was shown the clean frames as well. Alone it is known to fail: the other
    frames move towards E[x | x_t], not E[x | x_t, given], and agree too little with the given ones.
    """
    chosen = given_mask[:, None, :, None, None]

    def wrapped(x_t, t):
        """The output, given the clean frames."""
        x_start, _ = schedule.predict(model(x_t, t), x_t, t)
        return schedule.output(torch.where(chosen, given.to(x_start), x_start), x_t, t)
    return wrapped


def reconstruction_guided(model: Model, schedule: NoiseSchedule, given: Tensor,
                          given_mask: Tensor, weight: float = 4.0) -> Model:
    """Reconstruction guidance (Ho 2022 eq. 7) for a model that was never shown clean frames.

    x_start of the other frames moves down the gradient of how badly the model reconstructs the
    given ones, which costs a backward pass per step. weight: w_r in the paper, above 1 because at
    high noise the true q(given | x_t) is narrower than the Gaussian that stands for it there.
    """
    chosen = given_mask[:, None, :, None, None]

    def guided_by_error(x_t, t):
        """The output, moved against the gradient of the error."""
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            x_start, _ = schedule.predict(model(x_t, t), x_t, t)
            error = torch.where(chosen, given.to(x_start) - x_start, 0).square().sum()
            gradient = torch.autograd.grad(error, x_t)[0]
        x_t, x_start = x_t.detach(), x_start.detach()
        alpha, _ = schedule.alpha_sigma(t, x_t)
        return schedule.output(x_start - weight * alpha / 2 * gradient, x_t, t)
    return replaced(guided_by_error, schedule, given, given_mask)
