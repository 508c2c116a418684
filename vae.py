"""KL autoencoder: turns every frame of a video into a small latent image, and back.

After Rombach et al. 2022 (latent diffusion) and Esser et al. 2021 (VQGAN: the adversarial loss).
Frames are encoded one by one, so an image model's training recipe applies and any number of frames
works; motion is left to the diffusion model.

    python train.py vae --data shapes --out runs/shapes

Letters used here: `b` batch, `c` channels, `f` frames, `h w` height and width. Frames are float
(b, 3, h, w) in [-1, 1]; latents are (b, c, h / factor, w / factor).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from text_encoder import attention
from tools import load_tensors


@dataclass(frozen=True)
class VAEConfig:
    """factor (pixels per latent, along a side) = patch * 2 ** (len(widths) - 1)."""

    latent_channels: int = 4
    patch: int = 2  # pixels folded into channels at the entrance: free, and halves every later side
    widths: tuple = (32, 64, 128)
    blocks: int = 1  # ResNet blocks per resolution
    groups: int = 16  # of GroupNorm

    @property
    def factor(self) -> int:
        return self.patch * 2 ** (len(self.widths) - 1)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of such a frame."""
        return self.latent_channels, height // self.factor, width // self.factor


# ------------------------------------------------------------------------------ blocks


class GroupNorm(nn.GroupNorm):
    """Normalizes in the number format of its input; the sums inside are float32.

    Under CUDA's autocast it would turn bfloat16 into float32, and change the memory format of that.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def zero_init(layer: nn.Module) -> nn.Module:
    """Start a residual branch at zero: the network begins as its skip path, which trains stably,
    and temporal attention begins by leaving frames independent."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (b, c, h, w) -> same."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, channels)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return x + y


class Attention(nn.Module):
    """One head of self-attention over all pixels, (b, c, h, w) -> same; Vaswani 2017, eq. 1."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (k c) h w -> k b 1 (h w) c", k=3)
        y = attention(q, k, v)
        return x + self.out(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution: transposed convolutions leave a checkerboard."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Encoder(nn.Module):
    """Frames (b, 3, h, w) -> mean and log-variance (b, 2 c, h / factor, w / factor)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.widths, config.groups
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1)
        layers = []
        for level, width in enumerate(widths):
            layers += [ResBlock(width, groups) for _ in range(config.blocks)]
            if level + 1 < len(widths):
                layers.append(nn.Conv2d(width, widths[level + 1], 3, stride=2, padding=1))
        self.down = nn.Sequential(*layers)
        self.middle = middle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.patch))
        x = self.middle(self.down(x))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents (b, c, h / factor, w / factor) -> frames (b, 3, h, w), unbounded: clip to [-1, 1]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.widths[::-1], config.groups
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = middle(widths[0], groups)
        layers = []
        for level, width in enumerate(widths):
            layers += [ResBlock(width, groups) for _ in range(config.blocks)]
            if level + 1 < len(widths):
                layers.append(Upsample(width, widths[level + 1]))
        self.up = nn.Sequential(*layers)
        self.norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1)

    def features(self, z: Tensor) -> Tensor:
        """What the last layer turns into pixels."""
        return F.silu(self.norm_out(self.up(self.middle(self.conv_in(z)))))

    def forward(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv_out(self.features(z)), self.patch)

    def compile(self, *args: object, **kwargs: object) -> None:
        """All but the last layer: compiled code goes backward once only, and `adaptive_weight`
        passes there twice before the whole loss does."""
        self.features = torch.compile(self.features, *args, **kwargs)


def middle(width: int, groups: int) -> nn.Module:
    """The bottom of encoder and decoder: the only place where far-apart pixels see each other."""
    return nn.Sequential(
        ResBlock(width, groups), Attention(width, groups), ResBlock(width, groups)
    )


class DiagonalGaussian:
    """q(z|x) = N(mean, exp(logvar)) per element; Kingma & Welling 2014."""

    def __init__(self, moments: Tensor):
        """moments: (b, 2 c, h, w), mean and log-variance stacked along the channels."""
        self.mean, logvar = moments.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)  # exp of it stays finite in float32

    def sample(self, eps: Tensor | None = None) -> Tensor:
        """mean + std * eps with eps ~ N(0, I): the reparametrization trick, section 2.4."""
        eps = torch.randn_like(self.mean) if eps is None else eps
        return self.mean + (0.5 * self.logvar).exp() * eps

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) per element, (b, c, h, w); Kingma & Welling 2014, appendix B."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar)


# ------------------------------------------------------------------------------ the model


class AutoencoderKL(nn.Module):
    """Frames to latents and back. After `set_latent_statistics`, `encode_video` gives latents of
    zero mean and unit variance per channel over the training set, as the noise schedule assumes."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        self.to(memory_format=torch.channels_last)  # 3x3 convolutions are about twice as fast

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Frames (b, 3, h, w) in [-1, 1] -> the distribution of their unnormalized latents.

        Raises ValueError when a side is not a multiple of the factor."""
        if x.shape[-1] % self.config.factor or x.shape[-2] % self.config.factor:
            raise ValueError(
                f"frame sides {tuple(x.shape[-2:])} must be multiples of {self.config.factor}"
            )
        return DiagonalGaussian(self.encoder(self._prepare(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Unnormalized latents (b, c, h, w) -> frames (b, 3, factor h, factor w)."""
        return self.decoder(self._prepare(z))

    def _prepare(self, x):
        """In the number format of the weights, and in their memory format."""
        return x.to(self.last_layer.dtype).contiguous(memory_format=torch.channels_last)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which reconstruction and adversarial gradients are compared."""
        return self.decoder.conv_out.weight

    def set_latent_statistics(self, latents: Tensor) -> None:
        """latents: unnormalized (b, c, f, h, w) of the training set, on the CPU."""
        channels = rearrange(latents.double(), "b c f h w -> c (b f h w)")
        self.latent_mean.copy_(channels.mean(1).float())  # some devices have no float64
        self.latent_std.copy_(channels.std(1).float())

    def _statistics(self):
        return (s[:, None, None, None] for s in (self.latent_mean, self.latent_std))

    def encode_video(self, video: Tensor, pixels: int = 2**19) -> Tensor:
        """(b, 3, f, h, w) in [-1, 1] -> normalized latents (b, c, f, h / factor, w / factor).

        The mean of q(z|x) is taken. So many frames at a time as have `pixels` pixels, but one at
        least, which bounds the memory."""
        frames = rearrange(video, "b c f h w -> (b f) c h w")
        parts = frames.split(max(1, pixels // frames[0, 0].numel()))
        z = torch.cat([self.encode(part).mean for part in parts])
        mean, std = self._statistics()
        return (rearrange(z, "(b f) c h w -> b c f h w", b=len(video)) - mean) / std

    def decode_video(self, latents: Tensor, pixels: int = 2**19) -> Tensor:
        """Normalized latents (b, c, f, h, w) -> video (b, 3, f, factor h, factor w), float32, about
        [-1, 1]; pixels: as in `encode_video`."""
        mean, std = self._statistics()
        z = rearrange(latents * std + mean, "b c f h w -> (b f) c h w")
        parts = z.split(max(1, pixels // (self.config.factor**2 * z[0, 0].numel())))
        frames = torch.cat([self.decode(part).float() for part in parts])
        return rearrange(frames, "(b f) c h w -> b c f h w", b=len(latents))


# ------------------------------------------------------------------------------ losses


class PatchDiscriminator(nn.Module):
    """Real or fake, patch by patch: (b, 3, h, w) -> logits (b, 1, h', w'); Isola 2017 (pix2pix).

    GroupNorm stands where pix2pix has BatchNorm: no statistics that differ between real and fake
    batches.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        modules = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(layers):
            c_in, c_out = width * min(2**i, 8), width * min(2 ** (i + 1), 8)
            stride = 2 if i + 1 < layers else 1
            modules += [nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False)]
            modules += [GroupNorm(8, c_out), nn.LeakyReLU(0.2)]
        modules.append(nn.Conv2d(c_out, 1, 4, padding=1))
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class VGGFeatures(nn.Module):
    """Perceptual distance: mean squared difference of unit-length VGG16 features after each stage.

    As LPIPS (Zhang 2018) with all channels weighted equally. path: `vgg16-397923af.pth` of
    torchvision.
    """

    # Convolutions per stage, and the index of each one in torchvision's `features`.
    stages = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)))
    stages += ((512, (24, 26, 28)),)

    def __init__(self, path: Path | str | None = None):
        super().__init__()
        self.convolutions = nn.ModuleDict()
        c_in = 3
        for width, indices in self.stages:
            for index in indices:
                self.convolutions[str(index)] = nn.Conv2d(c_in, width, 3, padding=1)
                c_in = width
        # ImageNet statistics for inputs in [0, 1], rewritten for inputs in [-1, 1].
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", (2 * mean - 1)[:, None, None])
        self.register_buffer("std", (2 * std)[:, None, None])
        if path is not None:
            state = load_tensors(path, "state dict")
            prefix = "features."
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            self.convolutions.load_state_dict(state)
        self.requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """One map per stage, normalized over channels, of pictures x (b, 3, h, w) in [-1, 1]."""
        x = (x - self.mean) / self.std
        outputs = []
        for stage, (_, indices) in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if stage else x
            for index in indices:
                x = F.relu(self.convolutions[str(index)](x))
            outputs.append(F.normalize(x.float(), dim=1))
        return outputs

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Frames (b, 3, h, w) in [-1, 1], twice -> scalar distance."""
        pairs = zip(self.features(x), self.features(y))
        return sum((p - q).square().sum(1).mean() for p, q in pairs)


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the terms; VGG and GAN are not computed where theirs is 0."""

    l1_weight: float = 1.0
    mse_weight: float = 1.0
    kl_weight: float = 1e-4
    vgg_weight: float = 0.0  # needs the VGG16 weights
    gan_weight: float = 0.0
    gan_start: int = 0  # steps before the discriminator's opinion counts


class VAELoss(nn.Module):
    """L1 + MSE + KL (+ VGG features) (+ a discriminator's opinion, see `adaptive_weight`)."""

    def __init__(self, config: VAELossConfig, vgg_path: Path | str | None = None):
        super().__init__()
        if config.vgg_weight and vgg_path is None:
            raise ValueError("vgg_weight needs the VGG16 weights: random ones would mean nothing")
        self.config = config
        self.discriminator = PatchDiscriminator() if config.gan_weight else None
        self.vgg = VGGFeatures(vgg_path) if config.vgg_weight else None

    def generator_loss(
        self, x: Tensor, x_hat: Tensor, posterior: DiagonalGaussian, last_layer: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the autoencoder and its terms. x, x_hat: frames (b, 3, h, w) in [-1, 1] and
        their reconstruction; last_layer: the decoder's last weight."""
        config, x_hat = self.config, x_hat.float()
        terms = {"l1": (x_hat - x).abs().mean(), "mse": F.mse_loss(x_hat, x)}
        terms["kl"] = posterior.kl().mean()
        loss = config.l1_weight * terms["l1"] + config.mse_weight * terms["mse"]
        if self.vgg is not None:
            terms["vgg"] = self.vgg(x, x_hat)
            loss = loss + config.vgg_weight * terms["vgg"]
        if self.discriminator is not None and step >= config.gan_start:
            # Frozen here, or the generator's gradient would also move the discriminator.
            self.discriminator.requires_grad_(False)
            terms["gan"] = -self.discriminator(x_hat).float().mean()
            self.discriminator.requires_grad_(True)
            weight = adaptive_weight(loss, terms["gan"], last_layer)
            loss = loss + config.gan_weight * weight * terms["gan"]
        loss = loss + config.kl_weight * terms["kl"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def discriminator_loss(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Hinge loss (Lim & Ye 2017): push real logits above 1 and fake ones below -1."""
        real = self.discriminator(x).float()
        fake = self.discriminator(x_hat.detach()).float()
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|gradient of the reconstruction loss| / |gradient of the adversarial loss|, both with respect
    to the decoder's last layer; Esser 2021, eq. 7.

    It keeps the two in balance while they change. At most 1e4; no gradient flows through it."""
    (grad_rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (grad_gan,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (grad_rec.norm() / (grad_gan.norm() + 1e-4)).clamp(0, 1e4).detach()
