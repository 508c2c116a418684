"""Tests of text_encoder.py: the tokenizer loses nothing, and padding never leaks."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import text_encoder
from text_encoder import (FIRST_MERGE, PAD, TextEncoder, TextEncoderConfig, Tokenizer, attention,
                          attention_weights)

CAPTIONS = [
    f"a {colour} {shape} moves {first}, then {second}"
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square", "star")
    for first in ("left", "right", "up", "down")
    for second in ("left", "right", "up", "down")
]

STRINGS = [
    "",
    " ",
    "a red circle moves right, then up",
    "  two  spaces,\ttabs\t\tand\r\nlines \n ",
    "snake_case don't --- ___ 3.14!?",
    "emoji 🎬🟥 family 👨‍👩‍👧‍👦 flag 🇨🇭",
    "一个红色的圆圈向右移动,然后向上。",
    "cafe\u0301 is not caf\u00e9; n\u0303 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\x00\x01\x1f\x7f\x85\u200b\u2028\ufeff\U0010ffff",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TextEncoder(TextEncoderConfig(context_length=32, width=32, depth=2, heads=4)).eval()


# Tokenizer


def test_any_string_round_trips(tokenizer):
    rng = random.Random(0)
    points = [p for p in range(0x3000) if not 0xD800 <= p < 0xE000] + [0x1F600, 0x10FFFF]
    texts = STRINGS + ["".join(map(chr, rng.choices(points, k=40))) for _ in range(20)]
    for tokenizer in (tokenizer, Tokenizer([]), Tokenizer.train(texts)):
        tokens = [tokenizer.encode(text) for text in texts]
        assert [tokenizer.decode(ids) for ids in tokens] == texts
        assert not any(PAD in ids for ids in tokens)


def test_special_tokens(tokenizer):
    assert tokenizer.encode("") == [1, 2]
    assert Tokenizer([]).encode("A") == [1, 3 + 65, 2]
    assert tokenizer.decode([1, 3 + 65, 2, 0, 0]) == "A"
    assert tokenizer.decode([3 + 0xFF]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud800")) == "?"      # a lone surrogate


def test_merges_never_cross_words(tokenizer):
    # "a red" is in a third of the captions, so a merge across the space would be learned.
    for token in tokenizer.token_bytes[FIRST_MERGE:]:
        assert b" " not in token[1:], token
        assert token.isascii() and (token.strip().isalpha() or token == b","), token


def test_first_merges_by_hand():
    # " ab" x 3 and " cab": (a, b) occurs 4 times, then (space, ab) 3 times, then nothing is left.
    tokenizer = Tokenizer.train(["ab cab ab ab"])
    a, b, space = 3 + ord("a"), 3 + ord("b"), 3 + ord(" ")
    assert tokenizer.merges == [(a, b), (space, FIRST_MERGE)]
    assert tokenizer.encode("ab ab") == [1, FIRST_MERGE, FIRST_MERGE + 1, 2]


def test_incremental_counts_equal_recounting():
    """Training keeps its pair counts up to date; counting afresh at each merge agrees."""
    rng = random.Random(1)
    texts = [" ".join("".join(rng.choices("aab", k=rng.randint(1, 9))) for _ in range(8))
             for _ in range(20)]
    merges = Tokenizer.train(texts, vocab_size=FIRST_MERGE + 40).merges
    for n in range(len(merges)):
        partial = Tokenizer(merges[:n])
        counts = {}
        for text in texts:
            for word in text.split(" "):
                ids = partial.encode_piece(" " + word)
                for pair in zip(ids, ids[1:]):
                    counts[pair] = counts.get(pair, 0) + 1
        assert merges[n] == min(counts, key=lambda p: (-counts[p], p))


def test_training_is_deterministic_and_shortens(tokenizer):
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    again = Tokenizer.train(iter(shuffled))
    assert again.state_dict() == tokenizer.state_dict()
    # Every training word became one token: a, red, circle, moves, right, the comma, then, up.
    text = "a red circle moves right, then up"
    assert len(tokenizer.encode(text)) == 8 + 2 < len(Tokenizer([]).encode(text)) == len(text) + 2


def test_vocab_size(tokenizer):
    assert Tokenizer([]).vocab_size == FIRST_MERGE == 259
    assert tokenizer.vocab_size == FIRST_MERGE + len(tokenizer.merges) <= 512
    assert Tokenizer.train(CAPTIONS, vocab_size=270).vocab_size == 270
    assert Tokenizer.train([]).vocab_size == Tokenizer.train(["abc"]).vocab_size == 259
    with pytest.raises(ValueError, match="259"):
        Tokenizer.train(CAPTIONS, vocab_size=100)
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer([(3, 259)])
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer([(PAD, 5)])


def test_state_dict_round_trip(tokenizer, tmp_path):
    torch.save({"tokenizer": tokenizer.state_dict()}, tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)["tokenizer"]
    loaded = Tokenizer.from_state_dict(state)
    assert loaded.state_dict() == tokenizer.state_dict()
    assert loaded.words == tokenizer.words and loaded.vocab_size == tokenizer.vocab_size
    for text in STRINGS:
        assert loaded.encode(text) == tokenizer.encode(text)


def test_unknown_words(tokenizer):
    assert tokenizer.unknown_words("A RED circle, moves: up!") == []
    assert tokenizer.unknown_words("a Dragon and a red cat; the dragon") == [
        "dragon", "and", "cat", "the"]
    assert tokenizer.unknown_words("") == [] and "circle" in tokenizer.words


def test_batch(tokenizer):
    texts = ["a red circle", "", "a red circle moves right, then up"]
    tokens, mask = tokenizer.batch(texts, context_length=64)
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
    assert tokens.shape == mask.shape == (3, len(tokenizer.encode(texts[2])))
    for row, keep, text in zip(tokens, mask, texts):
        assert row[keep].tolist() == tokenizer.encode(text and " " + text)
        assert (row[~keep] == PAD).all()


def test_a_word_is_the_same_wherever_it_stands(tokenizer):
    first, later = tokenizer.batch(["red circle", "Red  red"], context_length=64)[0]
    assert first[1] == later[1] == later[2]  # one token each: the word with its space
    assert tokenizer.words_and_lengths("red circle") == [("red", 1), ("circle", 1)]


def test_tokenizers_of_before_encode_as_they_did(tokenizer):
    """Models were trained on first words without a space; their checkpoints say nothing of it."""
    state = tokenizer.state_dict()
    assert state.pop("first_space") is True
    old = Tokenizer.from_state_dict(state)
    assert old.batch(["Red red"], 64)[0].tolist() == [old.encode("red red")]
    assert old.batch(["Red red"], 64)[0].tolist() != tokenizer.batch(["Red red"], 64)[0].tolist()
    assert Tokenizer.from_state_dict(old.state_dict()).first_space is False


def test_too_long_text_raises(tokenizer):
    text = "a red circle moves right, then up"
    length = len(tokenizer.encode(" " + text))
    tokenizer.batch([text], context_length=length)
    with pytest.raises(ValueError, match=rf"{length} tokens .*{length - 1}: shorten the prompt$"):
        tokenizer.batch(["", text], context_length=length - 1)


# TextEncoder


def test_padding_never_changes_the_output(tokenizer, encoder):
    texts = ["a red circle", "a blue star moves left, then down", ""]
    tokens, mask = tokenizer.batch(texts, 32)
    with torch.no_grad():
        context = encoder(tokens, mask)
        for row, keep, text in zip(context, mask, texts):
            torch.testing.assert_close(
                row[keep], encoder(*tokenizer.batch([text], 32))[0], rtol=0, atol=1e-6)
            assert (row[~keep] == 0).all()
        noisy = torch.where(mask, tokens, torch.randint_like(tokens, 1, 259))
        assert torch.equal(encoder(noisy, mask), context) and not mask.all()
        assert not encoder(tokens[:1], torch.zeros_like(mask[:1])).any()  # nothing but padding


def test_word_order_changes_the_encoding(tokenizer, encoder):
    # The same tokens in another order. Without positions the start token could not tell them
    # apart, but for rounding; and it is reached by the last word too: nothing is causal.
    tokens, mask = tokenizer.batch(["moves right then up", "moves up then right"], 32)
    assert sorted(tokens[0].tolist()) == sorted(tokens[1].tolist())
    other = torch.tensor([[1, 10, 11, 12, 2], [1, 10, 11, 13, 2]])
    for first, second in (encoder(tokens, mask), encoder(other, other > 0)):
        assert (first[0] - second[0]).abs().max() > 1e-3


def test_bad_sizes_raise(encoder):
    for length in (32, 33):
        tokens = torch.full((1, length), 511)
        if length == 32:
            assert encoder(tokens, tokens > 0).shape == (1, 32, 32)
        else:
            with pytest.raises(ValueError, match="33 tokens long and the limit is 32"):
                encoder(tokens, tokens > 0)
    with pytest.raises(ValueError, match="multiple"):
        TextEncoder(TextEncoderConfig(width=10, heads=4))


def test_the_encoder_compiles_into_one_graph(encoder):
    tokens = torch.tensor([[1, 10, 11, 2, 0], [1, 10, 11, 13, 2]])
    expected = encoder(tokens, tokens > 0)
    torch._dynamo.reset()
    counter = CompileCounter()
    encoder.compile(backend=counter, fullgraph=True)
    encoder(tokens + 1, tokens > -1)
    torch.testing.assert_close(encoder(tokens, tokens > 0), expected)
    assert counter.frame_count == 1


# Attention


MASKS = [None, (2, 1, 1, 7), (5, 7), (2, 3, 5, 7)]


@pytest.mark.parametrize("mask_shape", MASKS)
def test_attention_equals_the_fused_kernel(mask_shape, device="cpu", tolerance=1e-5):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    mask = None
    if mask_shape:
        mask = torch.rand(mask_shape) < 0.5
        mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    mask = mask if mask is None else mask.to(device)
    y = attention(q.to(device), k.to(device), v.to(device), mask).cpu()
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("mask_shape", MASKS)
def test_attention_is_the_same_on_a_gpu(mask_shape):
    test_attention_equals_the_fused_kernel(mask_shape, "cuda", 1e-3)  # it may multiply in TF32


@torch.no_grad()
@pytest.mark.parametrize("sequences, width, mask_shape", [
    (2, 8, None), (2, 8, (2, 1, 1, 200)), (70_000, 2, None), (70_000, 2, (70_000, 1, 1, 200)),
])
def test_long_sequences_never_make_the_matrix_of_weights(
    monkeypatch, sequences, width, mask_shape
):
    """And go to the fused kernel in as many parts as CUDA needs."""
    torch.manual_seed(0)
    q = torch.randn(sequences, 1, 1, width)
    k, v = torch.randn(2, 1, 1, 200, width).expand(2, sequences, 1, 200, width)
    mask = None if mask_shape is None else torch.rand(mask_shape) < 0.5
    picked = slice(None, None, 1 + sequences // 100)
    few = q[picked], k[picked], v[picked], mask if mask is None else mask[picked]
    expected = attention_weights(few[0], few[1], few[3]) @ few[2]
    sizes, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(text_encoder.F, "scaled_dot_product_attention",
                        lambda q, *rest: sizes.append(len(q)) or fused(q, *rest))
    monkeypatch.setattr(text_encoder, "attention_weights", None)
    y = attention(q, k, v, mask)
    assert sum(sizes) == sequences and max(sizes) < 65_536
    torch.testing.assert_close(y[picked], expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter(tokenizer, encoder):
    tokens, mask = tokenizer.batch(["a red circle", "a blue star moves left, then down"], 32)
    context = encoder(tokens, mask)
    (context * torch.randn_like(context)).sum().backward()
    for name, parameter in encoder.named_parameters():
        rows = parameter.grad.reshape(len(parameter), -1).abs().sum(dim=1)
        if name == "token_embedding.weight":
            used = torch.zeros(len(rows), dtype=torch.bool)
            used[tokens[mask]] = True         # PAD is not among them: padding learns nothing
        elif name == "position_embedding.weight":
            used = torch.arange(len(rows)) < tokens.shape[1]
        else:
            used = torch.ones(len(rows), dtype=torch.bool)
        assert (rows[used] > 0).all() and (rows[~used] == 0).all(), name


def test_initialisation():
    config = TextEncoderConfig()
    encoder = TextEncoder(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 2:
            residual = "attention.out" in name or "mlp.2" in name
            std = 1.0 if "embedding" in name else parameter.shape[1] ** -0.5
            std *= (2 * config.depth) ** -0.5 if residual else 1
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name


def test_bf16_autocast(tokenizer, encoder):
    tokens, mask = tokenizer.batch(["a red circle", "a blue star moves left, then down"], 32)
    exact = encoder(tokens, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = encoder(tokens, mask)
    context.float().sum().backward()
    assert (context[~mask] == 0).all()
    torch.testing.assert_close(context.float(), exact, rtol=0, atol=0.05)
    half = encoder.bfloat16()(tokens, mask)   # and with bf16 weights, without autocast
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_a_long_text_is_cut_after_a_word():
    tokenizer = Tokenizer.train(["a red circle moves right, then up"] * 2)
    text = "a red circle moves right, then up, says żółć  and ends"
    whole = text_encoder.normalize(text).strip()
    for length in range(3, 60):
        short = tokenizer.cut(text, length)
        encoded = tokenizer.encode(text_encoder.normalize(short))
        if short == text:
            break
        assert len(encoded) <= length and (whole.startswith(f"{short} ") or length < 5)
        more = " ".join(whole.split()[: len(short.split()) + 1])
        assert len(tokenizer.encode(more)) > length or length < 5
    assert short == text and length > 20  # the text itself, two spaces and all
    assert tokenizer.cut("żółć" * 50, 7) == "żó"  # inside a word where nothing else is left
    assert tokenizer.cut("", 2) == "" and tokenizer.cut("\ud800" * 9, 6) == "???"
