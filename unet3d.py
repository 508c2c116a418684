"""The denoiser: a factorized space-time UNet that reads the caption word by word.

After Ding & Zhu (efficient text-to-video with latent diffusion) and Ho et al. 2022 (Video Diffusion
Models): 2D convolutions and spatial attention inside each frame, temporal attention across frames,
and cross-attention from every place and time to every word. Its input is the noisy latent, the
latents of given clean frames, and a mask that says which those are: one model begins with a given
picture, continues a clip, or fills in between.

Two things make the action follow the words in order. Each frame is told where in the clip it is,
because relative positions alone cannot say "first ..., then ...", and looks up in the caption what
happens at that time. And it is told the frame rate, because a clip covers its whole action, however
long that takes.

Letters used here: `b` batch, `c` channels, `f` frames, `h w` height and width, `l` text tokens, `d`
width of one attention head, `n` attention heads, `e` width of the embedding of (timestep, frame
rate, position, words). `t` is the diffusion timestep, never a frame index.
Latents are (b, c, f, h, w).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from text_encoder import attention, attention_weights
from vae import GroupNorm, Upsample, zero_init


@dataclass(frozen=True)
class UNet3DConfig:
    """The three tuples have an entry for each resolution, from the latent's own down; each further
    one halves the sides.

    widths: channels. blocks: SpaceTimeBlocks on the way down, and as many on the way up; the last
    entry counts those at the bottom. attention: which resolutions have spatial attention,
    cross-attention and feed-forward layers; the others have convolutions and temporal attention
    alone, which cost little."""

    channels: int = 4  # of the latents
    widths: tuple = (64, 160)
    blocks: tuple = (1, 3)
    attention: tuple = (True, True)
    head_width: int = 32
    text_width: int = 128
    embedding_width: int = 256
    groups: int = 16  # of GroupNorm


# ------------------------------------------------------------------------------ attention


def rotary_table(positions: Tensor, width: int) -> Tensor:
    """Cosines and sines, (2, f, width / 2), of the angles by which `rotary` turns the frames at
    `positions` (f,)."""
    half = width // 2
    # The slowest pair turns once in hundreds of frames.
    angles = positions[:, None] * 100.0 ** (-torch.arange(half, device=positions.device) / half)
    return torch.stack([angles.cos(), angles.sin()])


def rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of channels by angles proportional to the position; Su 2021 (RoFormer) eq. 34.

    x: (..., f, d); table: of `rotary_table`. The dot product of two rotated vectors depends on
    their content and on the difference of their positions only, so any number of frames can be
    sampled.
    """
    cos, sin = table.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def sinusoidal(x: Tensor, width: int, highest: float) -> Tensor:
    """Features cos and sin of x times geometrically spaced frequencies, from 1 to `highest` radians
    per unit of x; (...,) -> (..., width). Vaswani 2017, section 3.5."""
    steps = torch.linspace(0, 1, width // 2, device=x.device)
    angles = x.float()[..., None] * highest**steps
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SelfAttention(nn.Module):
    """The layers of spatial and temporal attention. x: (b, f, s, c) with s = h * w places."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.heads = width // head_width
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = zero_init(nn.Linear(width, width))


class SpatialAttention(SelfAttention):
    """Every place sees every place of its own frame."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b f s (k n d) -> k (b f) n s d", k=3, n=self.heads)
        y = attention(q, k, v)
        return x + self.out(rearrange(y, "(b f) n s d -> b f s (n d)", b=len(x)))


class TemporalAttention(SelfAttention):
    """Every frame sees every frame at the same place; where frames_are_images (b,), itself alone.

    table: of `rotary_table`, for the frames' positions and the width of a head.
    """

    def forward(self, x: Tensor, table: Tensor, frames_are_images: Tensor | None = None) -> Tensor:
        qkv = self.qkv(self.norm(x))
        qkv = rearrange(qkv, "b f s (k n d) -> k (b s) n f d", k=3, n=self.heads)
        qk, (v,) = qkv.split((2, 1))
        y = attention(*rotary(qk, table), v)
        if frames_are_images is not None:  # softmax over one key is 1
            y = torch.where(repeat(frames_are_images, "b -> (b s) 1 1 1", s=x.shape[2]), v, y)
        return x + self.out(rearrange(y, "(b s) n f d -> b f s (n d)", b=len(x)))


class CrossAttention(nn.Module):
    """Every place of every frame looks up the words. x: (b, f, s, c), context: (b, l, width)."""

    def __init__(self, width: int, head_width: int, text_width: int):
        super().__init__()
        self.heads = width // head_width
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(text_width, 2 * width, bias=False)
        self.out = zero_init(nn.Linear(width, width))

    def qkv(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = rearrange(self.q(self.norm(x)), "b f s (n d) -> b n (f s) d", n=self.heads)
        k, v = rearrange(self.kv(context), "b l (k n d) -> k b n l d", k=2, n=self.heads)
        return q, k, v

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        y = attention(*self.qkv(x, context), context_mask[:, None, None, :])
        return x + self.out(rearrange(y, "b n (f s) d -> b f s (n d)", f=x.shape[1]))

    def word_weights(self, x: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        """How strongly each frame attends to each word in `forward`: (b, f, l), the mean over heads
        and places. Each row sums to 1."""
        q, k, _ = self.qkv(x, context)
        with torch.autocast(x.device.type, enabled=False):  # to be read, not to be fast
            weights = attention_weights(q.float(), k.float(), context_mask[:, None, None, :])
        return reduce(weights, "b n (f s) l -> b f l", "mean", f=x.shape[1])


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, at every place and time alike.

    Its input is modulated by the frame's embedding (FiLM; Perez 2018). Where "right" puts an object
    depends on a product of three things, the word, the time and the place; multiplying by the time
    here leaves the layers a product of two to find.
    """

    def __init__(self, width: int, embedding_width: int, multiplier: int = 4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.film = zero_init(nn.Linear(embedding_width, 2 * width))
        self.up = nn.Linear(width, multiplier * width)
        self.down = zero_init(nn.Linear(multiplier * width, width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = rearrange(self.film(embedding), "(b f) (k c) -> k b f 1 c", k=2, b=len(x))
        y = self.norm(x) * (1 + scale) + shift
        return x + self.down(F.gelu(self.up(y), approximate="tanh"))


# ------------------------------------------------------------------------------ blocks


class ResBlock(nn.Module):
    """Two convolutions inside each frame, modulated by the frame's embedding (FiLM; Perez 2018).

    x: (b f, c_in, h, w); embedding: (b f, e). Convolving folded frames in 2D is the same thing as a
    Conv3d with a (1, 3, 3) kernel.
    """

    def __init__(self, c_in: int, c_out: int, embedding_width: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, c_out)
        self.film = nn.Linear(embedding_width, 2 * c_out)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        return self.skip(x) + y


def places(height: int, width: int, device: torch.device | str) -> Tensor:
    """Where each place of a frame is: features of y and x, both from 0 to 1; (64, h, w)."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (height, width))
    features = sinusoidal(torch.cartesian_prod(y, x), 32, 30)
    return rearrange(features, "(h w) k e -> (k e) h w", h=height)


class SpaceTimeBlock(nn.Module):
    """Convolve within the frame, look around in space, then in time, read the words, then think.

    x: (b f, c_in, h, w). full: with all five parts, not convolutions and temporal attention alone.
    """

    def __init__(self, c_in: int, c_out: int, config: UNet3DConfig, full: bool = True):
        super().__init__()
        self.res = ResBlock(c_in, c_out, config.embedding_width, config.groups)
        self.temporal = TemporalAttention(c_out, config.head_width)
        self.full = full
        if full:
            self.spatial = SpatialAttention(c_out, config.head_width)
            self.cross = CrossAttention(c_out, config.head_width, config.text_width)
            self.feed_forward = FeedForward(c_out, config.embedding_width)

    def forward(
        self, x: Tensor, embedding: Tensor, context: Tensor, context_mask: Tensor, table: Tensor,
        frames_are_images: Tensor | None,
    ) -> Tensor:
        b, height = len(context), x.shape[2]
        x = self.res(x, embedding)
        x = rearrange(x, "(b f) c h w -> b f (h w) c", b=b)  # free in channels_last memory
        if self.full:
            x = self.spatial(x)
        x = self.temporal(x, table, frames_are_images)
        if self.full:
            x = self.cross(x, context, context_mask)
            x = self.feed_forward(x, embedding)
        return rearrange(x, "b f (h w) c -> (b f) c h w", h=height)


def make_blocks(width: int, inputs: list[int], config: UNet3DConfig, full: bool) -> nn.ModuleList:
    """SpaceTimeBlocks one after the other; inputs: the channels that each one takes."""
    return nn.ModuleList(SpaceTimeBlock(c, width, config, full) for c in inputs)


# ------------------------------------------------------------------------------ the model


class UNet3D(nn.Module):
    """Predicts noise (or v, or the clean latent: see diffusion.py) from a noisy video latent."""

    def __init__(self, config: UNet3DConfig):
        super().__init__()
        if len({len(config.widths), len(config.blocks), len(config.attention)}) > 1:
            raise ValueError("widths, blocks and attention need one entry per resolution each")
        if any(w % config.head_width for w in config.widths):
            raise ValueError(f"widths {config.widths} must be multiples of {config.head_width}")
        self.config = config
        e = config.embedding_width
        self.embed = nn.Sequential(nn.Linear(3 * 64, e), nn.SiLU(), nn.Linear(e, e))
        self.read = CrossAttention(e, config.head_width, config.text_width)
        self.embed_out = nn.Sequential(
            nn.LayerNorm(e), nn.Linear(e, 2 * e), nn.SiLU(), nn.Linear(2 * e, e), nn.SiLU()
        )
        # Noisy latent, given latent, mask; and the place (Liu 2018, CoordConv): neither convolution
        # nor attention would know left from right, and directions are words here.
        self.conv_in = nn.Conv2d(2 * config.channels + 1 + 2 * 32, config.widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        levels = zip(config.widths, config.widths[1:], config.blocks, config.attention)
        for width, wider, count, full in levels:
            self.down.append(nn.ModuleDict({
                "blocks": make_blocks(width, [width] * count, config, full),
                "resize": nn.Conv2d(width, wider, 3, stride=2, padding=1),
            }))
            # Decoder: the first block of a level takes the encoder's features beside its input.
            inputs = [2 * width] + [width] * (count - 1)
            self.up.insert(0, nn.ModuleDict({
                "resize": Upsample(wider, width),
                "blocks": make_blocks(width, inputs, config, full),
            }))
        bottom, count, full = config.widths[-1], config.blocks[-1], config.attention[-1]
        self.middle = make_blocks(bottom, [bottom] * count, config, full)
        self.norm_out = GroupNorm(config.groups, config.widths[0])
        self.conv_out = zero_init(nn.Conv2d(config.widths[0], config.channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # see SpaceTimeBlock; convolutions like it too

    def embedding(
        self, t: Tensor, fps: Tensor, frames: int, context: Tensor, context_mask: Tensor
    ) -> Tensor:
        """What each frame is told about itself, ((b f), e): the timestep t (b,), the frame rate fps
        (b,), its position in the clip, and what it finds in the words when it asks with these."""
        position = (torch.arange(frames, device=t.device) + 0.5) / frames  # in the clip, 0 to 1
        features = torch.stack([
            # 1000 only scales: a schedule with another number of timesteps works as well
            sinusoidal(t / 1000, 64, 1000)[:, None].expand(-1, frames, -1),
            sinusoidal(fps.log(), 64, 100)[:, None].expand(-1, frames, -1),
            sinusoidal(position, 64, 100)[None].expand(len(t), -1, -1),
        ], dim=2)
        features = features.to(self.embed[0].weight.dtype)
        x = self.embed(rearrange(features, "b f k w -> b f 1 (k w)"))
        x = self.embed_out(self.read(x, context, context_mask))
        return rearrange(x, "b f 1 e -> (b f) e")

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, context_mask: Tensor, fps: Tensor,
        given: Tensor | None = None, given_mask: Tensor | None = None,
        frames_are_images: Tensor | None = None,
    ) -> Tensor:
        """One denoising prediction, the shape of x.

        x: noisy latents (b, c, f, h, w); t: timesteps (b,); context: encoded words (b, l,
        text_width) and context_mask (b, l), True at real tokens; fps: frames per second (b,).
        given: clean latents, the shape of x, and given_mask (b, f), True at the frames to take from
        it (none by default). frames_are_images: boolean (b,), True at clips between whose frames no
        information passes (at none by default).
        Raises ValueError when h or w cannot be halved len(widths) - 1 times, or the inputs do not
        fit together.
        """
        b, _, frames, height, width = x.shape
        stride = 2 ** (len(self.config.widths) - 1)
        if height % stride or width % stride:
            raise ValueError(f"latent sides {height}x{width} must be multiples of {stride}")
        if not b == len(t) == len(context) == len(context_mask) == len(fps):
            raise ValueError(f"{b} latents need as many timesteps, contexts, masks and frame rates")
        if (given is None) != (given_mask is None):
            raise ValueError("given and given_mask come together")
        mask = x.new_zeros(b, 1, frames, height, width)
        if given_mask is None:
            given = torch.zeros_like(x)
        else:
            mask = mask + given_mask[:, None, :, None, None].to(x.dtype)
        place = places(height, width, x.device).to(x.dtype)
        place = place[None, :, None].expand(b, -1, frames, -1, -1)
        embedding = self.embedding(t, fps, frames, context, context_mask)
        table = rotary_table(torch.arange(frames, device=x.device), self.config.head_width)
        conditions = (embedding, context, context_mask, table, frames_are_images)

        x = torch.cat([x, mask * given, mask, place], dim=1)    # b 2c+1+64 f h w
        x = rearrange(x, "b c f h w -> (b f) c h w").contiguous(memory_format=torch.channels_last)
        x = x.to(self.conv_in.weight.dtype)
        x = self.conv_in(x)                                     # (b f) widths[0] h w
        skips = []
        for level in self.down:
            for block in level["blocks"]:
                x = block(x, *conditions)
            skips.append(x)
            x = level["resize"](x)                              # (b f) wider h/2 w/2
        for block in self.middle:
            x = block(x, *conditions)
        for level in self.up:
            x = torch.cat([level["resize"](x), skips.pop()], dim=1)
            for block in level["blocks"]:
                x = block(x, *conditions)                       # (b f) width h w
        x = self.conv_out(F.silu(self.norm_out(x)))             # (b f) c h w
        return rearrange(x, "(b f) c h w -> b c f h w", b=b)


@contextlib.contextmanager
def record_attention(unet: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """`with record_attention(unet) as record:` notes how strongly frames attend to words.

    record[name of a CrossAttention] becomes a list with one (b, f, l) float tensor for every call
    of the model, see `CrossAttention.word_weights`; "read" is what each frame looks up for itself.
    """
    record, handles = {}, []
    for name, module in unet.named_modules():
        if isinstance(module, CrossAttention):
            record[name] = []

            def note(module, inputs, _, calls=record[name]):
                with torch.no_grad():
                    calls.append(module.word_weights(*inputs).cpu())

            handles.append(module.register_forward_hook(note))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
