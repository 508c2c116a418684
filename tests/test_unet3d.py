"""Tests of unet3d.py: which inputs reach which outputs, and the layers against PyTorch's own."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import text_encoder
import train
from tools import autocast, pick_device
from unet3d import (CrossAttention, SpatialAttention, TemporalAttention, UNet3D, UNet3DConfig,
                    places, record_attention, rotary, rotary_table, sinusoidal)

CONFIG = UNet3DConfig(
    channels=3, widths=(16, 32), blocks=(1, 1), attention=(True, True), head_width=16,
    text_width=12, embedding_width=24, groups=4,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def wake(model, asleep=()):
    """Random weights for the layers that start at zero, but for the parameters that `asleep` names:
    a branch that adds nothing would hide its mistakes."""
    for name, p in model.named_parameters():
        if not p.any() and not any(part in name for part in asleep):
            nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return wake(UNet3D(CONFIG)).requires_grad_(False)


def make_inputs(b=2, frames=3, height=4, width=8, tokens=5, given=False):
    """Arguments of UNet3D.forward; the second half of the tokens of sample 0 is padding."""
    inputs = {
        "x": torch.randn(b, 3, frames, height, width),
        "t": torch.linspace(900, 100, b).long(),
        "context": torch.randn(b, tokens, 12),
        "context_mask": torch.ones(b, tokens, dtype=torch.bool),
        "fps": torch.linspace(4, 12, b),
    }
    inputs["context_mask"][0, tokens // 2 :] = False
    if given:
        inputs["given"] = torch.randn_like(inputs["x"])
        inputs["given_mask"] = torch.zeros(b, frames, dtype=torch.bool)
        inputs["given_mask"][:, 0] = True
    return inputs


def distance(unet, inputs, **changes):
    """Largest change of each sample's output when some inputs change, (b,)."""
    with torch.no_grad():
        return (unet(**inputs) - unet(**{**inputs, **changes})).abs().amax((1, 2, 3, 4))


def reach(unet, frame=1, clips=slice(None), **options):
    """How strongly each input frame reaches output `frame` of the clips: (2, f), noisy and given
    frames, the largest gradient of a random projection of the output. Zero only where the Jacobian
    is zero."""
    inputs = make_inputs(given=True)
    inputs["given_mask"][:] = True
    sources = [inputs["x"].requires_grad_(), inputs["given"].requires_grad_()]
    y = unet(**inputs, **options)[clips, :, frame]
    grads = torch.autograd.grad((y * torch.randn_like(y)).sum(), sources)
    return torch.stack([g.abs().amax((0, 1, 3, 4)) for g in grads])


# ------------------------------------------------------------------------------ attention


def reference(layer, kv_width=None):
    """nn.MultiheadAttention with the weights of one of the attention layers."""
    width = layer.out.in_features
    kv_width = kv_width or width
    mha = nn.MultiheadAttention(width, layer.heads, kdim=kv_width, vdim=kv_width, batch_first=True)
    state = {"out_proj.weight": layer.out.weight, "out_proj.bias": layer.out.bias}
    state["in_proj_bias"] = torch.zeros(3 * width)
    if kv_width == width:
        state["in_proj_weight"] = layer.qkv.weight
    else:
        state["q_proj_weight"] = layer.q.weight
        state["k_proj_weight"], state["v_proj_weight"] = layer.kv.weight.chunk(2)
    mha.load_state_dict(state)

    def run(q, kv, need_weights=False, **options):
        y, weights = mha(q, kv, kv, need_weights=need_weights, **options)
        return (y, weights) if need_weights else y

    return run


@torch.no_grad()
def test_attention_over_space_and_time_equals_torch():
    layer, x = wake(SpatialAttention(32, 16)), torch.randn(2, 3, 5, 32)
    y = layer.norm(x).flatten(0, 1)
    expected = x + reference(layer)(y, y).unflatten(0, (2, 3))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer = wake(TemporalAttention(32, 16))
    y = layer.norm(x).transpose(1, 2).flatten(0, 1)  # a sequence per place
    expected = x + reference(layer)(y, y).unflatten(0, (2, 5)).transpose(1, 2)
    table = rotary_table(torch.zeros(3), 16)  # PyTorch's has no positions
    torch.testing.assert_close(layer(x, table), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cross_attention_equals_torch():
    layer, x = wake(CrossAttention(32, 16, 12)), torch.randn(2, 3, 5, 32)
    words, mask = torch.randn(2, 6, 12), torch.arange(6) < torch.tensor([[6], [2]])
    y, weights = reference(layer, 12)(
        layer.norm(x).flatten(1, 2), words, key_padding_mask=~mask, need_weights=True)
    expected = x + y.unflatten(1, (3, 5))
    torch.testing.assert_close(layer(x, words, mask), expected, rtol=1e-5, atol=1e-5)
    found = layer.word_weights(x, words, mask)
    torch.testing.assert_close(found, weights.unflatten(1, (3, 5)).mean(2))
    torch.testing.assert_close(found.sum(2), torch.ones(2, 3))
    assert (found[1, :, 2:] == 0).all() and found.std(2).min() > 0.01


@torch.no_grad()
def test_recording_attention_changes_nothing(unet):
    inputs = make_inputs()
    expected = unet(**inputs)
    with record_attention(unet) as record:
        outputs = [unet(**inputs) for _ in range(2)]
    assert all(torch.equal(y, expected) for y in outputs)
    assert set(record) == {"read", "down.0.blocks.0.cross", "middle.0.cross", "up.0.blocks.0.cross"}
    for calls in record.values():
        assert len(calls) == 2 and torch.equal(*calls)
        assert calls[0].shape == (2, 3, 5)
        torch.testing.assert_close(calls[0].sum(2), torch.ones(2, 3))
    unet(**inputs)
    assert all(len(calls) == 2 for calls in record.values())  # over when the block is left


@torch.no_grad()
def test_temporal_attention_knows_the_order_of_frames():
    layer, x = wake(TemporalAttention(32, 16)), torch.randn(2, 4, 5, 32)
    table = rotary_table(torch.arange(4), 16)
    y, order = layer(x, table), [2, 0, 3, 1]
    assert (layer(x[:, order], table) - y[:, order]).abs().max() > 1e-3
    alone = torch.cat([layer(x[:, i : i + 1], table[:, :1]) for i in range(4)], dim=1)
    torch.testing.assert_close(layer(x, table, torch.ones(2).bool()), alone)
    mixed = layer(x, table, torch.tensor([True, False]))
    torch.testing.assert_close(mixed, torch.stack([alone[0], y[1]]))
    # Only differences of positions count: a clip may start anywhere.
    later = layer(x, rotary_table(torch.arange(4) + 7, 16))
    torch.testing.assert_close(later, y, rtol=1e-4, atol=1e-4)


def test_rotary_is_relative_and_keeps_the_norm():
    q, k = torch.randn(2, 1, 16).expand(2, 24, 16)  # the same vectors at 24 positions
    table = rotary_table(torch.arange(24), 16)
    q_rotated, k_rotated = rotary(q, table), rotary(k, table)
    torch.testing.assert_close(q_rotated.norm(dim=-1), q.norm(dim=-1))
    dots = q_rotated @ k_rotated.T
    for offset in (-5, 0, 1, 12):
        diagonal = dots.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    torch.testing.assert_close(dots[0, 0], q[0] @ k[0])
    assert dots[0].unique().numel() == 24  # and differs from one offset to the next


@pytest.mark.parametrize("frames", [16, 200])
def test_no_kernel_is_given_more_sequences_than_cuda_takes(monkeypatch, frames):
    """Places are folded into the batch, so 300 clips of 256 places are 76,800 sequences."""
    sizes, fused = [], F.scaled_dot_product_attention

    def note(q, *rest, **options):
        sizes.append(len(q))
        return fused(q, *rest, **options)

    monkeypatch.setattr(text_encoder.F, "scaled_dot_product_attention", note)
    config = UNet3DConfig(**{**vars(CONFIG), "attention": (False, True)})
    with torch.device("meta"):
        inputs = make_inputs(b=300, frames=frames, height=16, width=16)
        assert UNet3D(config)(**inputs).shape == inputs["x"].shape
    assert all(size < 65_536 for size in sizes) and any(sizes) == (frames > 128)


# ------------------------------------------------------------------------------ what words do


@torch.no_grad()
def test_words_are_a_set_and_padding_is_nothing():
    layer, x = wake(CrossAttention(32, 16, 12)), torch.randn(2, 3, 5, 32)
    words, mask = torch.randn(2, 6, 12), torch.arange(6) < torch.tensor([[6], [3]])
    y = layer(x, words, mask)
    order = torch.randperm(6)  # the order is the text encoder's business: words arrive knowing it
    torch.testing.assert_close(layer(x, words[:, order], mask[:, order]), y)
    padding = torch.where(mask[..., None], words, 100.0)
    assert torch.equal(layer(x, padding, mask), y)
    torch.testing.assert_close(layer(x[1:], words[1:, :3], mask[1:, :3]), y[1:])
    assert (layer(x, words, torch.ones_like(mask))[1] - y[1]).abs().max() > 1e-3
    real = torch.where(mask[..., None], words + 1, words)
    assert ((layer(x, real, mask) - y).abs().amax((1, 2, 3)) > 1e-3).all()


def test_unet_reads_words_but_no_padding(unet):
    inputs = make_inputs()
    context, mask = inputs["context"], inputs["context_mask"]
    padding = torch.where(mask[..., None], context, 100.0)
    assert distance(unet, inputs, context=padding).max() == 0
    longer, longer_mask = F.pad(context, (0, 0, 0, 4), value=9.0), F.pad(mask, (0, 4))
    assert distance(unet, inputs, context=longer, context_mask=longer_mask).max() < 1e-4
    words = torch.where(mask[..., None], context + 1, context)
    assert distance(unet, inputs, context=words).min() > 1e-3
    change = distance(unet, inputs, context_mask=torch.ones_like(mask))
    assert change[0] > 1e-3 and change[1] == 0  # only sample 0 has padding


# ------------------------------------------------------------------------------ frames


def test_frames_are_independent_at_initialisation_only():
    new = UNet3D(CONFIG)
    assert not new(**make_inputs(given=True)).any()
    nn.init.normal_(new.conv_out.weight)  # which is zero too, and would hide everything
    strength = reach(new)
    assert (strength[:, 1] > 0).all() and not strength[:, [0, 2]].any()
    # Of all zero layers it is the temporal attention's that keep frames apart.
    strength = reach(wake(UNet3D(CONFIG), asleep=["temporal.out"]))
    assert (strength[:, 1] > 0).all() and not strength[:, [0, 2]].any()
    assert (reach(wake(UNet3D(CONFIG))) > 1e-4).all()


@pytest.mark.parametrize("frame", [0, 2])
def test_image_frames_never_leak(unet, frame):
    strength = reach(unet, frame, frames_are_images=torch.ones(2).bool())
    others = [i for i in range(3) if i != frame]
    assert (strength[:, frame] > 0).all() and not strength[:, others].any()  # exactly zero
    assert (reach(unet, frame, frames_are_images=torch.zeros(2).bool()) > 1e-4).all()
    assert (reach(unet, frame) > 1e-4).all()
    mixed = torch.tensor([True, False])
    strength = reach(unet, frame, clips=[0], frames_are_images=mixed)
    assert (strength[:, frame] > 0).all() and not strength[:, others].any()
    assert (reach(unet, frame, clips=[1], frames_are_images=mixed) > 1e-4).all()


def test_given_frames_are_seen(unet):
    inputs = make_inputs(given=True)
    given, mask = inputs["given"], inputs["given_mask"]
    shown = mask[:, None, :, None, None]
    seen, hidden = torch.where(shown, given + 1, given), torch.where(shown, given, given + 1)
    with torch.no_grad():
        change = unet(**inputs) - unet(**inputs | {"given": seen})
    assert (change.abs().amax((1, 3, 4)) > 1e-4).all()  # b f: it reaches all other frames
    assert distance(unet, inputs, given=seen).min() > 1e-3
    assert distance(unet, inputs, given=hidden).max() == 0
    # A black frame given and no frame given are different things: the mask is an input too.
    black = {**inputs, "given": torch.zeros_like(given)}
    assert distance(unet, black, given_mask=torch.zeros_like(mask)).min() > 1e-3
    nothing = {"given": None, "given_mask": None}
    assert distance(unet, {**inputs, "given_mask": torch.zeros_like(mask)}, **nothing).max() == 0


def test_frames_know_their_position(unet):
    inputs = make_inputs(frames=4)
    inputs["x"] = inputs["x"][:, :, :1].expand(-1, -1, 4, -1, -1)  # four times the same frame
    with torch.no_grad():
        y = unet(**inputs, frames_are_images=torch.ones(2).bool())
    y = y.transpose(1, 2).flatten(2)  # b f (c h w)
    apart = torch.cdist(y, y, p=torch.inf) + 1e9 * torch.eye(4)
    assert apart.min() > 1e-3


# ------------------------------------------------------------------------------ other inputs


def test_every_frame_reads_the_words_for_itself(unet):
    inputs = make_inputs(frames=4)
    names = ("t", "context", "context_mask", "fps")

    def embed(**changes):
        return unet.embedding(frames=4, **{k: (inputs | changes)[k] for k in names}).view(2, 4, -1)

    swapped = inputs["context"].roll(1, 0)
    change = embed(context=swapped) - embed()
    assert change.abs().amax(-1).min() > 1e-3  # of all frames,
    assert (change[:, 1:] - change[:, :-1]).abs().amax(-1).min() > 1e-4  # and of each differently
    half = inputs["context"].clone()
    half[0, 2:] += 1  # padding
    assert torch.equal(embed(context=half), embed())


def test_every_place_is_known():
    features = places(4, 6, "cpu").flatten(1)
    assert torch.cdist(features.T, features.T).add(torch.eye(24)).min() > 0.1
    # Cosines of y come first, at frequency 1; then the sines of y, then x.
    assert torch.allclose(places(2, 2, "cpu")[0], torch.tensor([[0.25], [0.75]]).cos().expand(2, 2))
    assert torch.allclose(places(2, 2, "cpu")[48], torch.tensor([0.25, 0.75]).sin().expand(2, 2))


def test_timestep_and_frame_rate_are_seen(unet):
    inputs = make_inputs()
    assert distance(unet, inputs, fps=2 * inputs["fps"]).min() > 1e-3
    assert distance(unet, inputs, t=inputs["t"] - 1).min() > 1e-5


def test_sinusoidal_features():
    x = torch.tensor([0.0, 0.3])
    features = sinusoidal(x, 8, 1000)
    angles = x[:, None] * torch.tensor([1.0, 10.0, 100.0, 1000.0])
    expected = torch.cat([angles.cos(), angles.sin()], dim=-1)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)
    for values, highest in (
        (torch.arange(1000) / 1000, 1000),  # as UNet3D.embedding asks for t, fps and position
        (torch.arange(1, 61).log(), 100),
        ((torch.arange(48) + 0.5) / 48, 100),
    ):
        features = sinusoidal(values, 64, highest)
        apart = torch.cdist(features, features) + 1e9 * torch.eye(len(values))
        assert apart.min() > 0.1


def test_samples_of_a_batch_are_independent(unet):
    inputs = make_inputs(b=3, given=True)
    with torch.no_grad():
        together = unet(**inputs)
        for i in range(3):
            alone = unet(**{name: value[i : i + 1] for name, value in inputs.items()})
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frames, height, width", [(1, 4, 4), (5, 8, 2), (24, 2, 4)])
def test_other_frame_counts_and_sizes(unet, frames, height, width):
    inputs = make_inputs(frames=frames, height=height, width=width)
    with torch.no_grad():
        y = unet(**inputs)
    assert y.shape == inputs["x"].shape and y.isfinite().all()


def test_inputs_that_do_not_fit_are_refused(unet):
    """Broadcasting one context over two clips would fold both clips into a single one."""
    for height, width in ((5, 4), (4, 5)):
        with pytest.raises(ValueError, match="2$"):
            unet(**make_inputs(height=height, width=width))
    inputs = make_inputs(b=2)
    for short in ("context", "context_mask", "fps", "t"):
        with pytest.raises(ValueError):
            unet(**inputs | {short: inputs[short][:1]})


# ------------------------------------------------------------------------------ configurations


def test_a_bad_configuration_is_refused():
    for bad in ({"blocks": (1, 1, 1)}, {"widths": (16,)}, {"widths": (16, 24)},
                {"attention": (True,)}, {"attention": (True, True, True)}):
        with pytest.raises(ValueError):
            UNet3D(UNet3DConfig(**vars(CONFIG) | bad))


@pytest.mark.parametrize("levels", [(True, True), (False, True), (False, False)])
def test_attention_only_where_the_configuration_says(levels):
    unet = wake(UNet3D(UNet3DConfig(**{**vars(CONFIG), "attention": levels})))
    for part, expected in (("down.0.", levels[0]), ("up.0.", levels[0]), ("middle.", levels[1])):
        names = [name for name, _ in unet.named_parameters() if name.startswith(part)]
        for layer in ("spatial", "cross", "feed_forward"):
            assert any(layer in name for name in names) == expected
        assert any("temporal" in name for name in names)
    assert (reach(unet) > 0).all()


@pytest.mark.parametrize("attention", [(True, True), (False, True), (False, False)])
def test_every_parameter_gets_a_gradient(attention):
    unet = wake(UNet3D(UNet3DConfig(**{**vars(CONFIG), "blocks": (2, 2), "attention": attention})))
    unet(**make_inputs(given=True)).square().sum().backward()
    for name, p in unet.named_parameters():
        assert p.grad is not None and p.grad.any() and p.grad.isfinite().all(), name


@pytest.mark.parametrize("cast, autocast", [(False, True), (True, True), (True, False)])
@torch.no_grad()
def test_half_precision(unet, cast, autocast):
    """Of the products, of the weights, of both."""
    inputs = make_inputs(given=True)
    expected = unet(**inputs)
    model = copy.deepcopy(unet).bfloat16() if cast else unet
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if cast:
            inputs["context"] = inputs["context"].bfloat16()  # as the text encoder gives it
        y = model(**inputs)
    assert y.is_floating_point() and y.isfinite().all()
    error = (y.float() - expected).square().mean().sqrt() / expected.std()
    assert error < 0.1  # bfloat16 has 8 bits


@pytest.mark.gpu
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 0.1)])
def test_a_gpu_gives_the_same_numbers(unet, precision, tolerance):
    inputs, found = make_inputs(given=True), []
    for device in (torch.device("cpu"), pick_device("cuda", precision)):
        model = copy.deepcopy(unet).requires_grad_(True).to(device)
        with autocast(device, precision if device.type == "cuda" else "fp32"):
            y = model(**{name: value.to(device) for name, value in inputs.items()})
        y.float().square().sum().backward()
        parts = y, *(p.grad for p in model.parameters())
        found.append(torch.cat([part.detach().float().cpu().flatten() for part in parts]))
    assert (found[1] - found[0]).norm() < tolerance * found[0].norm()


@pytest.mark.parametrize("more", [[], ["--grad-checkpoint"]])
def test_the_model_compiles_into_one_graph(more):
    """And the graph has the same gradients."""
    inputs = make_inputs(given=True) | {"frames_are_images": torch.tensor([True, False])}
    one_level = {"widths": (16,), "blocks": (1,), "attention": (True,)}
    model = wake(UNet3D(UNet3DConfig(**{**vars(CONFIG), **one_level})))
    expected = model(**inputs)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    train.economize(train.parse_args(["diffusion", "--out", "x", *more]), model)
    torch._dynamo.reset()
    counter = CompileCounter()
    model.compile(backend=counter, fullgraph=True)
    model(**inputs | {"t": inputs["t"] - 7})
    y = model(**inputs)
    assert counter.frame_count == 1  # once for all values
    torch.testing.assert_close(y, expected)
    again = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    torch.testing.assert_close(again, gradients)


# ------------------------------------------------------------------------------ presets


def test_presets_have_the_promised_size():
    for name, make in train.PRESETS.items():
        preset = make()
        assert preset.unet.channels == preset.vae.latent_channels, name
        assert preset.unet.text_width == preset.text.width, name
    for name, low, high in (("ucf101", 40e6, 60e6), ("ucf101-256", 120e6, 180e6)):
        with torch.device("meta"):  # shapes only, in no time
            unet = UNet3D(train.PRESETS[name]().unet)
        assert low < sum(p.numel() for p in unet.parameters()) < high, name
