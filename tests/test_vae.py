"""Tests of vae.py. Oracles: closed forms, PyTorch's own functions, torchvision's layout of VGG."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import train
from vae import (Attention, AutoencoderKL, DiagonalGaussian, GroupNorm, ResBlock, VAEConfig,
                 VAELoss, VAELossConfig, adaptive_weight)

CONFIG = VAEConfig(latent_channels=3, widths=(16, 32), groups=4)  # factor 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def wake(model):
    """Random weights for the layers that start at zero: a sleeping branch would hide mistakes."""
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
    return model


def make_vae(config=CONFIG):
    return wake(AutoencoderKL(config))


def smooth_frames(count, side=16):
    """Blurry random pictures in [-1, 1], (count, 3, side, side)."""
    coarse = 2 * torch.rand(count, 3, 4, 4) - 1
    return F.interpolate(coarse, size=(side, side), mode="bilinear")


def gradients(module):
    return [p.grad for p in module.parameters()]


# ------------------------------------------------------------------------------ the posterior


def test_kl_equals_torch_distributions():
    moments = 2 * torch.randn(2, 6, 4, 5)
    posterior = DiagonalGaussian(moments)
    mean, logvar = moments.chunk(2, dim=1)
    expected = kl_divergence(Normal(mean, logvar.exp().sqrt()), Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-5, atol=1e-5)
    assert not DiagonalGaussian(torch.zeros(1, 2, 1, 1)).kl().any()  # N(0, I) itself


def test_sample_has_the_mean_and_the_variance():
    moments = torch.tensor([1.5, -2.0, -1.0, 0.8])[None, :, None, None].expand(1, 4, 200, 100)
    posterior = DiagonalGaussian(moments)
    assert torch.equal(posterior.sample(torch.zeros_like(posterior.mean)), posterior.mean)
    draws = posterior.sample().flatten(2)[0]
    std = torch.tensor([-0.5, 0.4]).exp()
    assert ((draws.mean(1) - torch.tensor([1.5, -2.0])).abs() < 5 * std / 20_000**0.5).all()
    torch.testing.assert_close(draws.std(1), std, rtol=0.03, atol=0)


def test_extreme_log_variances_stay_finite():
    posterior = DiagonalGaussian(torch.tensor([[0.0, 1e4], [0.0, -1e4]])[:, :, None, None])
    assert posterior.sample().isfinite().all() and posterior.kl().isfinite().all()


# ------------------------------------------------------------------------------ blocks and shapes


def test_a_new_block_is_its_skip():
    x = torch.randn(2, 16, 4, 5)
    assert torch.equal(ResBlock(16, 4)(x), x)
    assert torch.equal(Attention(16, 4)(x), x)


def test_attention_equals_the_fused_kernel():
    layer = wake(Attention(16, groups=4))
    x = torch.randn(2, 16, 3, 5)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, (3, 5))
    torch.testing.assert_close(layer(x), x + layer.out(y), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_the_norm_keeps_bfloat16_on_a_gpu():
    norm, x = GroupNorm(4, 16).cuda(), torch.randn(2, 16, 4, 5, device="cuda").bfloat16()
    nn.init.normal_(norm.weight)
    expected = nn.GroupNorm.forward(norm, x.float())
    with torch.autocast("cuda", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("patch, widths, factor", [
    (1, (16, 16, 32), 4), (2, (16, 32), 4), (1, (16, 16, 16, 32), 8), (2, (16, 16, 32), 8),
])
def test_factor_and_shapes(patch, widths, factor):
    config = VAEConfig(latent_channels=5, patch=patch, widths=widths, groups=4)
    vae = AutoencoderKL(config)
    assert config.factor == factor
    posterior = vae.encode(torch.rand(2, 3, 16, 24))
    assert posterior.mean.shape == posterior.logvar.shape == (2, 5, 16 // factor, 24 // factor)
    assert vae.decode(posterior.sample()).shape == (2, 3, 16, 24)


def test_sides_that_do_not_divide_are_refused():
    vae = AutoencoderKL(CONFIG)
    for height, width in ((18, 16), (16, 18), (2, 2)):
        with pytest.raises(ValueError, match="4$"):
            vae.encode(torch.zeros(1, 3, height, width))
        with pytest.raises(ValueError, match="4$"):
            vae.encode_video(torch.zeros(1, 3, 2, height, width))


# ------------------------------------------------------------------------------ videos


@torch.no_grad()
def test_every_frame_has_its_place_and_depends_on_no_other():
    vae = make_vae()
    video = torch.rand(2, 3, 4, 16, 8)
    changed = video.clone()
    changed[1, :, 2] = torch.rand(3, 16, 8)
    latents, others = vae.encode_video(video), vae.encode_video(changed)
    assert latents.shape == (2, 3, 4, 4, 2) and vae.decode_video(latents).shape == video.shape
    frame = vae.encode(video[1, :, 3][None]).mean[0]
    torch.testing.assert_close(latents[1, :, 3], frame, rtol=1e-5, atol=1e-5)
    hit = torch.zeros(2, 4, dtype=torch.bool)
    hit[1, 2] = True
    for a, b in ((latents, others), (vae.decode_video(latents), vae.decode_video(others))):
        difference = (a - b).abs().amax((1, 3, 4))  # b f
        assert (difference[hit] > 1e-2).all() and (difference[~hit] < 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("height, width, pixels, sizes", [
    (16, 8, 1000, [7, 3]), (8, 8, 2**19, [10]), (16, 8, 1, [1] * 10),
])
def test_memory_is_bounded_in_pixels(monkeypatch, height, width, pixels, sizes):
    vae = make_vae()
    video, seen = torch.rand(2, 3, 5, height, width), []
    latents = vae.encode_video(video)
    decoded = vae.decode_video(latents)
    for name in ("encode", "decode"):
        part = getattr(vae, name)
        monkeypatch.setattr(vae, name, lambda x, part=part: seen.append(len(x)) or part(x))
    torch.testing.assert_close(vae.encode_video(video, pixels), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.decode_video(latents, pixels), decoded, rtol=1e-4, atol=1e-4)
    assert seen == 2 * sizes


@torch.no_grad()
def test_latents_have_zero_mean_and_unit_variance():
    vae = make_vae()
    video = smooth_frames(6 * 4).unflatten(0, (6, 4)).transpose(1, 2)
    before = vae.encode_video(video)
    assert (before.std((0, 2, 3, 4)) - 1).abs().min() > 0.05  # or the test would show nothing
    vae.set_latent_statistics(before)
    after = vae.encode_video(video)
    assert after.mean((0, 2, 3, 4)).abs().max() < 1e-3
    assert (after.std((0, 2, 3, 4)) - 1).abs().max() < 1e-3

    decoded = vae.decode_video(after)  # the normalisation is undone
    frames = video.transpose(1, 2).flatten(0, 1)
    expected = vae.decode(vae.encode(frames).mean).unflatten(0, (6, 4)).transpose(1, 2)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)

    copy = make_vae()  # and a checkpoint carries it
    copy.load_state_dict(vae.state_dict())
    assert torch.equal(copy.encode_video(video), after)


# ------------------------------------------------------------------------------ losses


def reconstruct(vae, side=16):
    """A batch, its reconstruction and its posterior, as in a training step."""
    x = smooth_frames(2, side)
    posterior = vae.encode(x)
    return x, vae.decode(posterior.sample()), posterior


def test_weights_of_the_terms():
    x, x_hat, posterior = reconstruct(make_vae())
    criterion = VAELoss(VAELossConfig(l1_weight=2.0, mse_weight=3.0, kl_weight=0.5))
    loss, terms = criterion.generator_loss(x, x_hat, posterior, None, step=0)
    l1, mse, kl = F.l1_loss(x_hat, x), F.mse_loss(x_hat, x), posterior.kl().mean()
    torch.testing.assert_close(loss, 2 * l1 + 3 * mse + 0.5 * kl)
    assert terms == pytest.approx({"l1": l1.item(), "mse": mse.item(), "kl": kl.item()})


def test_each_step_of_the_gan_moves_its_own_half():
    vae, criterion = make_vae(), VAELoss(VAELossConfig(gan_weight=0.5))
    discriminator = criterion.discriminator
    x, x_hat, posterior = reconstruct(vae, side=32)
    loss, _ = criterion.generator_loss(x, x_hat, posterior, vae.last_layer, step=0)
    loss.backward()
    assert all(g is None for g in gradients(discriminator))
    assert all(g is not None for g in gradients(vae))
    assert all(p.requires_grad for p in discriminator.parameters())

    vae.zero_grad(set_to_none=True)
    x, x_hat, _ = reconstruct(vae, side=32)
    criterion.discriminator_loss(x, x_hat).backward()
    assert all(g is None for g in gradients(vae))
    assert all(g is not None for g in gradients(discriminator))


def test_hinge_loss():
    criterion = VAELoss(VAELossConfig(gan_weight=1.0))
    criterion.discriminator = nn.Identity()  # its logits are its input
    real = torch.tensor([-2.0, 0.5, 1.0, 3.0])  # hinge 3, 0.5, 0, 0
    fake = torch.tensor([-3.0, -1.0, 0.25, 2.0])  # hinge 0, 0, 1.25, 3
    expected = 0.5 * (3.5 / 4 + 4.25 / 4)
    assert criterion.discriminator_loss(real, fake).item() == pytest.approx(expected)


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    layer = nn.Parameter(torch.randn(4))
    a, b = torch.tensor([3.0, 0.0, 4.0, 0.0]), torch.tensor([0.0, 2.0, 0.0, 0.0])
    weight = adaptive_weight((a * layer).sum(), (b * layer).sum(), layer)
    assert weight.item() == pytest.approx(5 / 2, rel=1e-3) and not weight.requires_grad
    capped = adaptive_weight((a * layer).sum(), (0 * layer).sum(), layer)
    assert capped.item() == pytest.approx(1e4)


def test_gan_term_is_balanced_at_the_last_layer():
    vae, criterion = make_vae(), VAELoss(VAELossConfig(gan_weight=0.5, kl_weight=0.0))
    x, x_hat, posterior = reconstruct(vae, side=32)
    loss, _ = criterion.generator_loss(x, x_hat, posterior, vae.last_layer, step=0)
    plain = F.l1_loss(x_hat, x) + F.mse_loss(x_hat, x)
    gan = -criterion.discriminator(x_hat).mean()
    total, rec, adversarial = (
        torch.autograd.grad(y, vae.last_layer, retain_graph=True)[0] for y in (loss, plain, gan)
    )
    expected = rec + 0.5 * rec.norm() / adversarial.norm() * adversarial  # Esser 2021, eq. 6 and 7
    # 2%: the 1e-4 that guards the division is not negligible beside an untrained critic's gradient.
    assert (total - expected).norm() < 0.02 * rec.norm()


def test_gan_start():
    vae, criterion = make_vae(), VAELoss(VAELossConfig(gan_weight=0.5, gan_start=5))
    plain = VAELoss(VAELossConfig())
    batch = reconstruct(vae, side=32)
    before, terms = criterion.generator_loss(*batch, vae.last_layer, step=4)
    assert "gan" not in terms
    assert torch.equal(before, plain.generator_loss(*batch, vae.last_layer, step=4)[0])
    after, terms = criterion.generator_loss(*batch, vae.last_layer, step=5)
    assert "gan" in terms and not torch.equal(before, after)


@pytest.mark.parametrize("more", [[], ["--grad-checkpoint"]])
def test_a_compiled_autoencoder_and_its_discriminator(more):
    """The discriminator's weight goes backward through the last layer before the loss does, which
    compiled code would refuse. One graph each for encoder and decoder, and the same gradients."""
    vae = make_vae(VAEConfig(latent_channels=3, patch=2, widths=(8, 8), groups=4))
    criterion = VAELoss(VAELossConfig(gan_weight=0.5, gan_start=1))
    x, eps, found = smooth_frames(2, 32), torch.randn(2, 3, 8, 8), []
    train.economize(train.parse_args(["vae", "--out", "x", *more]), vae)
    torch._dynamo.reset()
    for backend in (None, CompileCounterWithBackend("aot_eager")):
        if backend is not None:
            vae.encoder.compile(backend=backend, fullgraph=True)
            vae.decoder.compile(backend=backend, fullgraph=True)
        for step in range(2):  # the discriminator joins in at step 1
            vae.zero_grad()
            posterior = vae.encode(x)
            x_hat = vae.decode(posterior.sample(eps))
            loss, _ = criterion.generator_loss(x, x_hat, posterior, vae.last_layer, step)
            loss.backward()
        found.append(gradients(vae))
    assert backend.frame_count == 2
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_weights_in_half_precision(autocast):
    vae = make_vae()
    video = smooth_frames(6, 32).unflatten(0, (2, 3)).transpose(1, 2)
    expected = vae.decode_video(vae.encode_video(video))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = vae.bfloat16().decode_video(vae.encode_video(video))
    error = (y - expected).square().mean().sqrt() / expected.std()
    assert y.dtype == torch.float32 and error < 0.1


def test_one_batch_overfits():
    vae, criterion = AutoencoderKL(CONFIG), VAELoss(VAELossConfig())
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    x, losses = smooth_frames(4), []
    for step in range(30):
        posterior = vae.encode(x)
        x_hat = vae.decode(posterior.sample())
        loss, _ = criterion.generator_loss(x, x_hat, posterior, vae.last_layer, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ------------------------------------------------------------------------------ VGG


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """(torchvision's vgg16.features with random weights, a VAELoss that read them from a file)."""
    torch.manual_seed(0)
    layers, c_in = [], 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            conv = nn.utils.skip_init(nn.Conv2d, c_in, width, 3, padding=1)
            nn.init.normal_(conv.weight, std=(2 / (9 * c_in)) ** 0.5)  # He: the signal survives
            nn.init.normal_(conv.bias, std=0.1)
            layers += [conv, nn.ReLU()]
            c_in = width
        layers.append(nn.MaxPool2d(2))
    reference = nn.Sequential(*layers)
    state = {f"features.{name}": value for name, value in reference.state_dict().items()}
    state |= {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    weights = VAELossConfig(l1_weight=0.0, mse_weight=0.0, kl_weight=0.0, vgg_weight=2.0)
    criterion = VAELoss(weights, path)
    path.unlink()  # 59 MB
    return reference, criterion


@torch.no_grad()
def test_vgg_equals_torchvision_layout(vgg):
    reference, features = vgg[0], vgg[1].vgg

    def stages(x):
        x = (x + 1) / 2  # torchvision's weights want [0, 1], then ImageNet's statistics
        x = x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        x = x / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        outputs = []
        for layer in reference:
            if isinstance(layer, nn.MaxPool2d):
                outputs.append(x / x.norm(dim=1, keepdim=True))
            x = layer(x)
        return outputs

    x, y = smooth_frames(1, 32), smooth_frames(1, 32)
    expected = stages(x)
    assert len(expected) == 5
    torch.testing.assert_close(features.features(x), expected, rtol=1e-3, atol=1e-4)
    distance = sum((p - q).square().sum(1).mean() for p, q in zip(expected, stages(y)))
    torch.testing.assert_close(features(x, y), distance, rtol=1e-3, atol=1e-4)
    assert features(x, x) == 0 and distance > 1e-3
    torch.testing.assert_close(features(x, y), features(y, x))


def test_vgg_weights_get_no_gradient(vgg):
    _, criterion = vgg
    x = smooth_frames(2)
    x_hat = smooth_frames(2).requires_grad_()
    posterior = DiagonalGaussian(torch.zeros(2, 6, 4, 4))
    loss, terms = criterion.generator_loss(x, x_hat, posterior, None, step=0)
    loss.backward()
    assert loss.item() == pytest.approx(2 * terms["vgg"])
    assert x_hat.grad.any() and x_hat.grad.isfinite().all()
    assert all(g is None for g in gradients(criterion.vgg))
    assert not any(p.requires_grad for p in criterion.vgg.parameters())
