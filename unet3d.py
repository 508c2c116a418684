"""The denoiser: a factorized space-time UNet that reads the caption word by word.

After Ding & Zhu (efficient text-to-video with latent diffusion) and Ho et al. 2022 (Video Diffusion
Models): 2D convolutions and spatial attention inside each frame, temporal attention across frames,
and cross-attention from every place and time to every word. Input is the noisy latent beside `mask
* clean latent` and the mask itself, so one model continues, interpolates or starts from given
frames.

Two things make the action follow the words in order. Each frame is told where in the clip it is (0
to 1), because relative positions alone cannot say "first ..., then ...", and looks up in the
caption what happens at that time. And it is told the frame rate, because a clip covers its whole
action, however long that takes.

Letters used here: `b` batch, `c` channels, `f` frames, `h w` height and width, `l` text tokens, `d`
width of one attention head, `n` attention heads, `e` width of the embedding of (timestep, frame
rate, position, words). `t` is the diffusion timestep, never a frame index. Latents are (b, c, f, h,
w).
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

from vae import Upsample


@dataclass(frozen=True)
class UNet3DConfig:
    """widths: channels per resolution, from the latent's down; each further one halves the sides.
    blocks: SpaceTimeBlocks per resolution on the way down, the same again on the way up; the last
    entry counts those at the bottom. attention: which resolutions look around in space, read the
    words at every place and have feed-forward layers; the others have convolutions and temporal
    attention alone, which cost little."""

    channels: int = 4  # of the latents
    latent_size: int = 8  # their sides in training; others work
    widths: tuple = (64, 160)
    blocks: tuple = (1, 3)
    attention: tuple = (False, True)
    head_width: int = 32
    text_width: int = 128
    embedding_width: int = 256
    groups: int = 16  # of GroupNorm


# ------------------------------------------------------------------------------ attention


def attention_weights(q, k, mask=None):
    """softmax(Q K^T / sqrt(d)), (..., i, j): how strongly each query attends to each key, 1 in sum.

    q (..., i, d), k (..., j, d); mask: boolean, broadcastable to (..., i, j), True where a key may
    be seen. Each query must see at least one key.
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


def attention(q, k, v, mask=None):
    """softmax(Q K^T / sqrt(d)) V, (..., i, d); v (..., j, d); Vaswani 2017, eq. 1."""
    if q.is_cuda or k.shape[-2] > 128:  # fused: never writes the (i, j) matrix to memory
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # On a CPU the fused kernel takes longer for sequences as short as most here: 1.1 to 1.6 times
    # in float32 on an Intel Xeon, 3 to 7 times in bfloat16 on an AMD EPYC.
    return attention_weights(q, k, mask).to(v.dtype) @ v


def rotary(x, positions):
    """Rotate pairs of channels by angles proportional to the position; Su 2021 (RoFormer) eq. 34.

    x: (..., f, d); positions: (f,). The dot product of two rotated vectors depends on their content
    and on the difference of their positions only, so any number of frames can be sampled.
    """
    half = x.shape[-1] // 2
    # The slowest pair turns once in about 2 pi * 100 frames: longer than any clip here.
    frequencies = 100.0 ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def zero_init(layer):
    """Start a residual branch at zero: the network begins as its skip path, which trains stably,
    and temporal attention begins by leaving frames independent."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def sinusoidal(x, width, highest):
    """Features cos and sin of x times geometrically spaced frequencies, from 1 to `highest` radians
    per unit of x; (...,) -> (..., width). Vaswani 2017, section 3.5."""
    steps = torch.linspace(0, 1, width // 2, device=x.device)
    angles = x.float()[..., None] * highest**steps
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SpatialAttention(nn.Module):
    """Every place sees every place of its own frame. x: (b, f, s, c) with s = h * w places."""

    def __init__(self, width, head_width):
        super().__init__()
        self.heads = width // head_width
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = zero_init(nn.Linear(width, width))

    def forward(self, x):
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b f s (k n d) -> k (b f) n s d", k=3, n=self.heads)
        y = attention(q, k, v)
        return x + self.out(rearrange(y, "(b f) n s d -> b f s (n d)", b=len(x)))


class TemporalAttention(nn.Module):
    """Every frame sees every frame at the same place. x: (b, f, s, c) with s = h * w places.

    frames_are_images: each frame sees itself alone; of all clips, or (b,) of those that it says.
    """

    def __init__(self, width, head_width):
        super().__init__()
        self.heads = width // head_width
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = zero_init(nn.Linear(width, width))

    def forward(self, x, frames_are_images=False):
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b f s (k n d) -> k (b s) n f d", k=3, n=self.heads)
        if frames_are_images is True:
            y = v  # softmax over one key is 1
        else:
            positions = torch.arange(x.shape[1], device=x.device)
            y = attention(rotary(q, positions), rotary(k, positions), v)
        if isinstance(frames_are_images, torch.Tensor):
            y = torch.where(repeat(frames_are_images, "b -> (b s) 1 1 1", s=x.shape[2]), v, y)
        return x + self.out(rearrange(y, "(b s) n f d -> b f s (n d)", b=len(x)))


class CrossAttention(nn.Module):
    """Every place of every frame looks up the words. x: (b, f, s, c), context: (b, l, width)."""

    def __init__(self, width, head_width, text_width):
        super().__init__()
        self.heads = width // head_width
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(text_width, 2 * width, bias=False)
        self.out = zero_init(nn.Linear(width, width))

    def qkv(self, x, context):
        q = rearrange(self.q(self.norm(x)), "b f s (n d) -> b n (f s) d", n=self.heads)
        k, v = rearrange(self.kv(context), "b l (k n d) -> k b n l d", k=2, n=self.heads)
        return q, k, v

    def forward(self, x, context, context_mask):
        y = attention(*self.qkv(x, context), context_mask[:, None, None, :])
        return x + self.out(rearrange(y, "b n (f s) d -> b f s (n d)", f=x.shape[1]))

    def word_weights(self, x, context, context_mask):
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

    def __init__(self, width, embedding_width, multiplier=4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.film = zero_init(nn.Linear(embedding_width, 2 * width))
        self.up = nn.Linear(width, multiplier * width)
        self.down = zero_init(nn.Linear(multiplier * width, width))

    def forward(self, x, embedding):
        scale, shift = rearrange(self.film(embedding), "(b f) (k c) -> k b f 1 c", k=2, b=len(x))
        y = self.norm(x) * (1 + scale) + shift
        return x + self.down(F.gelu(self.up(y), approximate="tanh"))


# ------------------------------------------------------------------------------ blocks


class ResBlock(nn.Module):
    """Two convolutions inside each frame, modulated by the frame's embedding (FiLM; Perez 2018).

    x: (b f, c_in, h, w); embedding: (b f, e). Convolving folded frames in 2D is the same thing as a
    Conv3d with a (1, 3, 3) kernel.
    """

    def __init__(self, c_in, c_out, embedding_width, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.film = nn.Linear(embedding_width, 2 * c_out)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, embedding):
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        return self.skip(x) + y


def places(height, width, device):
    """Where each place of a frame is: features of y and x, both from 0 to 1; (64, h, w)."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (height, width))
    features = sinusoidal(torch.cartesian_prod(y, x), 32, 30)
    return rearrange(features, "(h w) k e -> (k e) h w", h=height)


class SpaceTimeBlock(nn.Module):
    """Convolve within the frame, look around in space, then in time, read the words, then think."""

    def __init__(self, c_in, c_out, config, attention=True):
        super().__init__()
        self.res = ResBlock(c_in, c_out, config.embedding_width, config.groups)
        self.temporal = TemporalAttention(c_out, config.head_width)
        self.has_attention = attention
        if self.has_attention:
            self.spatial = SpatialAttention(c_out, config.head_width)
            self.cross = CrossAttention(c_out, config.head_width, config.text_width)
            self.feed_forward = FeedForward(c_out, config.embedding_width)

    def forward(self, x, embedding, context, context_mask, frames_are_images):
        b, height = len(context), x.shape[2]
        x = self.res(x, embedding)
        x = rearrange(x, "(b f) c h w -> b f (h w) c", b=b)  # free in channels_last memory
        if self.has_attention:
            x = self.spatial(x)
        x = self.temporal(x, frames_are_images)
        if self.has_attention:
            x = self.cross(x, context, context_mask)
            x = self.feed_forward(x, embedding)
        return rearrange(x, "b f (h w) c -> (b f) c h w", h=height)


def blocks(width, inputs, config, attention):
    """SpaceTimeBlocks one after the other; inputs: the channels that each one takes."""
    return nn.ModuleList(SpaceTimeBlock(c, width, config, attention) for c in inputs)


# ------------------------------------------------------------------------------ the model


class UNet3D(nn.Module):
    """Predicts noise (or v, or the clean latent: see diffusion.py) from a noisy video latent."""

    def __init__(self, config):
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
        for width, wider, count, attention in levels:
            self.down.append(nn.ModuleDict({
                "blocks": blocks(width, [width] * count, config, attention),
                "resize": nn.Conv2d(width, wider, 3, stride=2, padding=1),
            }))
            # Decoder: the first block of a level takes the encoder's features beside its input.
            inputs = [2 * width] + [width] * (count - 1)
            self.up.insert(0, nn.ModuleDict({
                "resize": Upsample(wider, width),
                "blocks": blocks(width, inputs, config, attention),
            }))
        bottom = config.widths[-1]
        self.middle = blocks(bottom, [bottom] * config.blocks[-1], config, config.attention[-1])
        self.norm_out = nn.GroupNorm(config.groups, config.widths[0])
        self.conv_out = zero_init(nn.Conv2d(config.widths[0], config.channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # see SpaceTimeBlock; convolutions like it too

    def embedding(self, t, fps, frames, context, context_mask):
        """What each frame is told about itself, ((b f), e): the timestep t (b,), the frame rate fps
        (b,), its position in the clip, and what it finds in the words when it asks with these."""
        position = (torch.arange(frames, device=t.device) + 0.5) / frames  # in the clip, 0 to 1
        features = torch.stack([
            # 1000 only scales: a schedule with another number of timesteps works as well
            sinusoidal(t / 1000, 64, 1000)[:, None].expand(-1, frames, -1),
            sinusoidal(fps.log(), 64, 100)[:, None].expand(-1, frames, -1),
            sinusoidal(position, 64, 100)[None].expand(len(t), -1, -1),
        ], dim=2)
        x = self.embed(rearrange(features, "b f k w -> b f 1 (k w)"))
        x = self.embed_out(self.read(x, context, context_mask))
        return rearrange(x, "b f 1 e -> (b f) e")

    def forward(
        self, x, t, context, context_mask, fps, given=None, given_mask=None, frames_are_images=False
    ):
        """One denoising prediction, the shape of x.

        x: noisy latents (b, c, f, h, w); t: timesteps (b,); context: encoded words (b, l,
        text_width) and context_mask (b, l), True at real tokens; fps: frames per second (b,).
        given: clean latents, the shape of x, and given_mask (b, f), True at the frames to take from
        it (none by default). frames_are_images: no information passes between the frames of any
        clip, or of those where a boolean tensor (b,) is True.
        Raises ValueError when h or w cannot be halved len(widths) - 1 times, or the inputs do not
        fit together.
        """
        b, _, frames, height, width = x.shape
        stride = 2 ** (len(self.config.widths) - 1)
        if height % stride or width % stride:
            raise ValueError(f"latent sides {height}x{width} must divide by {stride}")
        if not b == len(t) == len(context) == len(context_mask) == len(fps):
            raise ValueError(f"{b} latents need as many timesteps, contexts, masks and frame rates")
        if (given is None) != (given_mask is None):
            raise ValueError("given and given_mask come together")
        mask = x.new_zeros(b, 1, frames, height, width)
        if given_mask is None:
            given = torch.zeros_like(x)
        else:
            mask = mask + given_mask[:, None, :, None, None].to(x.dtype)
        embedding = self.embedding(t, fps, frames, context, context_mask)
        place = places(height, width, x.device).to(x.dtype)
        place = place[None, :, None].expand(b, -1, frames, -1, -1)
        conditions = (embedding, context, context_mask, frames_are_images)

        x = torch.cat([x, mask * given, mask, place], dim=1)    # b 2c+1+64 f h w
        x = rearrange(x, "b c f h w -> (b f) c h w").contiguous(memory_format=torch.channels_last)
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
def record_attention(unet):
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
