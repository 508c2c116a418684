"""Text: a sentence becomes tokens, and tokens become the context that the UNet cross-attends to.

`Tokenizer` is byte-level BPE: pair merging as in Sennrich 2016 (arXiv:1508.07909), over bytes as
in Radford 2019 (GPT-2), so no string is ever out of vocabulary. `TextEncoder` is a pre-norm
transformer (Xiong 2020, arXiv:2002.04745), trained from scratch together with the UNet as in
Rombach 2022 (arXiv:2112.10752) section 3.3. There is no causal mask: the sentence is known whole.

    tokenizer = Tokenizer.train(captions)
    tokens, mask = tokenizer.batch(["a red circle moves right, then up", ""], context_length=64)
    context = TextEncoder()(tokens, mask)                    # (2, l, 128); "" is the null caption

Letters used here: `b` batch, `l` text tokens, `c` channels; in attention `n` heads, `i` queries,
`j` keys, `d` width of a head.
"""

import bisect
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Token ids: three specials, then the 256 bytes, then one id per merge in the order learned.
PAD, START, END = 0, 1, 2
FIRST_BYTE = 3
FIRST_MERGE = FIRST_BYTE + 256

# A word or a run of punctuation carries its leading space. The four cases cover every character,
# so joining the pieces gives the text back.
PIECE = re.compile(r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s")
# What a person calls a word: letters and digits only (`\w` without the underscore).
WORD = re.compile(r"[^\W_]+")


def normalize(text: str) -> str:
    """Lower case, and one space before every word: "Red  circle " is " red circle". The first word
    needs it as well, or "red" at the start of a sentence would be other tokens than elsewhere."""
    return "".join(f" {word}" for word in text.lower().split())


def merge_pair(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace each occurrence of `pair` in the list `ids` by `new_id`, from left to right."""
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def byte_ids(piece: str) -> list[int]:
    """The token ids of a string's UTF-8 bytes. A lone surrogate (not valid Unicode) becomes "?"."""
    return [FIRST_BYTE + byte for byte in piece.encode("utf-8", errors="replace")]


class Tokenizer:
    """Byte-level BPE: `decode(encode(text))` is `text` for every Unicode string. `batch`, which the
    model reads, normalizes first.

    merges: (id, id) pairs in the order learned; merge number i makes token id 259 + i.
    words: the words of the training texts, known to `unknown_words`; any case. first_space: does
    the first word of a text carry a space, too? False for models trained when it did not.
    Raises ValueError if a merge uses an id that does not exist before it.
    """

    def __init__(self, merges: list, words: Iterable[str] = (), first_space: bool = True):
        self.first_space = first_space
        self.merges = [tuple(pair) for pair in merges]
        self.words = frozenset(word.lower() for word in words)
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        # token_bytes[id]: the bytes that a token stands for, none for the specials.
        self.token_bytes = [b""] * FIRST_BYTE + [bytes([byte]) for byte in range(256)]
        total = 0
        for a, b in self.merges:
            if not (FIRST_BYTE <= min(a, b) and max(a, b) < len(self.token_bytes)):
                raise ValueError(f"merge ({a}, {b}) uses a token id that does not exist before it")
            total += len(self.token_bytes[a]) + len(self.token_bytes[b])
            if total > 2**24:  # in a damaged file each token may be twice as long as the last
                raise ValueError(f"merge ({a}, {b}) makes more than 16 MiB of tokens")
            self.token_bytes.append(self.token_bytes[a] + self.token_bytes[b])
        self.cache = {}                      # piece -> ids; captions repeat a small set of words

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 512) -> "Tokenizer":
        """Learn merges from an iterable of strings (Sennrich 2016, algorithm 1).

        Repeatedly merges the most frequent adjacent pair, until the vocabulary has `vocab_size`
        tokens (at least 259, else ValueError) or no pair occurs twice.
        """
        if vocab_size < FIRST_MERGE:
            raise ValueError(f"vocab_size is {vocab_size}, but the bytes alone need {FIRST_MERGE}")
        counts, words = Counter(), set()
        for text in map(normalize, texts):
            counts.update(PIECE.findall(text))
            words.update(WORD.findall(text))

        # Each distinct piece is kept once with its count, and `where` says which pieces hold a
        # pair: a merge then touches those pieces only, whatever the number of captions.
        pieces = [(byte_ids(piece), count) for piece, count in counts.items()]
        pair_counts, where = Counter(), defaultdict(set)
        for i, (ids, count) in enumerate(pieces):
            for pair in zip(ids, ids[1:]):
                pair_counts[pair] += count
                where[pair].add(i)

        merges = []
        while pair_counts and FIRST_MERGE + len(merges) < vocab_size:
            # Ties go to the smallest ids, so the order of the texts never matters.
            best = max(pair_counts, key=lambda p: (pair_counts[p], -p[0], -p[1]))
            if pair_counts[best] < 2:
                break
            for i in where.pop(best):
                ids, count = pieces[i]
                merged = merge_pair(ids, best, FIRST_MERGE + len(merges))
                for pair in zip(ids, ids[1:]):
                    pair_counts[pair] -= count
                for pair in zip(merged, merged[1:]):
                    pair_counts[pair] += count
                    where[pair].add(i)
                pieces[i] = (merged, count)
            merges.append(best)
        return cls(merges, words)

    def add_words(self, texts: Iterable[str]) -> None:
        """Count the words of these texts, captions of a fine-tuning set, as known too."""
        self.words |= {word for text in texts for word in WORD.findall(normalize(text))}

    def prepare(self, text: str) -> str:
        """The text as the model has learned to read it."""
        return normalize(text) if self.first_space else normalize(text).removeprefix(" ")

    def encode_piece(self, piece: str) -> list[int]:
        """Apply the merges to one piece, the earliest learned first, as training did."""
        if piece not in self.cache:
            ids = byte_ids(piece)
            while len(ids) > 1:
                pair = min(zip(ids, ids[1:]), key=lambda p: self.ranks.get(p, math.inf))
                if pair not in self.ranks:
                    break
                ids = merge_pair(ids, pair, FIRST_MERGE + self.ranks[pair])
            self.cache[piece] = ids
        return self.cache[piece]

    def encode(self, text: str) -> list[int]:
        """Token ids of any string, from start to end: "" gives [1, 2]."""
        ids = [i for piece in PIECE.findall(text) for i in self.encode_piece(piece)]
        return [START, *ids, END]

    def decode(self, ids: Iterable[int]) -> str:
        """The string of a sequence of token ids; specials vanish, broken UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def unknown_words(self, text: str) -> list[str]:
        """Words of `text`, lower-cased, absent from the training texts; each once, in order."""
        words = dict.fromkeys(WORD.findall(text.lower()))
        return [word for word in words if word not in self.words]

    def words_and_lengths(self, text: str) -> list[tuple[str, int]]:
        """[(word or mark, number of its tokens)] of a text as `batch` encodes it."""
        pieces = PIECE.findall(self.prepare(text))
        return [(piece.strip(), len(self.encode_piece(piece))) for piece in pieces]

    def cut(self, text: str, length: int) -> str:
        """The first words of a text, as many as `batch` takes with this context length; the text
        itself where that is all of them."""
        words = re.findall(" ?[^ ]+", self.prepare(text))
        tokens = map(self.encode, words)
        ends = list(itertools.accumulate(len(ids) - 2 for ids in tokens))  # without start and end
        if not words or ends[-1] <= length - 2:
            return text
        # A word that is longer than all that is cut inside: a token is a byte or more.
        first = words[0].encode(errors="replace")[: length - 2].decode(errors="ignore")
        return "".join(words[: bisect.bisect(ends, length - 2)] or [first]).strip()

    def batch(self, texts: list[str], context_length: int,
              device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Encode a list of strings, normalized, padded to the longest of them.

        Returns tokens (b, l) int64 and mask (b, l) bool, True at real tokens; l <= context_length.
        Raises ValueError if a text needs more than `context_length` tokens: cutting it silently
        would draw another sentence than the user's.
        """
        rows = [self.encode(self.prepare(text)) for text in texts]
        longest = max(len(row) for row in rows)
        if longest > context_length:
            raise ValueError(f"the text is {longest} tokens long and the limit is "
                             f"{context_length}: shorten the prompt")
        rows = [row + [PAD] * (longest - len(row)) for row in rows]
        tokens = torch.tensor(rows, dtype=torch.int64, device=device)
        return tokens, tokens != PAD         # `encode` never emits PAD

    def state_dict(self) -> dict:
        """Plain lists only, so that a checkpoint loads with `weights_only=True`."""
        merges = [list(pair) for pair in self.merges]
        return {"merges": merges, "words": sorted(self.words), "first_space": self.first_space}

    @classmethod
    def from_state_dict(cls, state: dict) -> "Tokenizer":
        first_space = state.get("first_space", False)
        if type(first_space) is not bool:
            raise ValueError(f"first_space cannot be {first_space!r:.40}")
        return cls(state["merges"], state["words"], first_space)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)), (..., i, j): how strongly each query attends to each key, 1 in sum.

    q (..., i, d), k (..., j, d); mask: boolean, broadcastable to (..., i, j), True where a key may
    be seen.
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        # Finite, or a query without any key would become NaN. exp() of either is exactly zero.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, (b, n, i, d), for n heads; Vaswani 2017, eq. 1.

    q (b, n, i, d), k and v (b, n, j, d); mask as above. Every attention of this project comes here.
    """
    if k.shape[2] <= 128:  # faster than a fused kernel, as most sequences here are this short
        return attention_weights(q, k, mask).to(v.dtype) @ v
    # A fused kernel never writes the (i, j) matrix to memory. On CUDA it takes 65,535 sequences.
    parts = [x.split(2**15) for x in (q, k, v)]
    if mask is None:
        masks = itertools.repeat(None)
    else:
        masks = mask.expand(*q.shape[:3], k.shape[2]).split(2**15)
    outputs = [F.scaled_dot_product_attention(*part) for part in zip(*parts, masks)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the tokens of a sentence (Vaswani 2017, section 3.2.2)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        # No bias: one on the keys shifts all scores of a row alike, which the softmax cancels.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (k n d) -> k b n l d", k=3, n=self.heads)
        y = attention(q, k, v, mask[:, None, None, :])
        return self.out(rearrange(y, "b n l d -> b l (n d)"))


# x <- x + Attention(LN(x));  x <- x + MLP(LN(x))                        Xiong 2020, table 1
class TextBlock(nn.Module):
    """Pre-norm transformer block: nothing on the residual path is normalised, so it trains without
    a long warm-up."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


@dataclass(frozen=True)
class TextEncoderConfig:
    """`vocab_size` may exceed the tokenizer's; `width` is a multiple of `heads`."""

    vocab_size: int = 512
    context_length: int = 64                 # tokens, start and end included
    width: int = 128
    depth: int = 3
    heads: int = 4


class TextEncoder(nn.Module):
    """Transformer encoder over the tokens of a caption (Rombach 2022, section 3.3: tau_theta)."""

    def __init__(self, config: TextEncoderConfig = TextEncoderConfig()):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"width {config.width} is not a multiple of heads {config.heads}")
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        # Attention alone sees a bag of words: the position tells "right, then up" from its reverse.
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(
            TextBlock(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers: Normal(0, 1 / fan-in); those that add to the residual path are smaller by
        1 / sqrt(2 depth), so that its variance does not grow with depth (Radford 2019, sec. 2.3).

        Embeddings keep PyTorch's Normal(0, 1), far wider than in language models: with small ones,
        what words share soon outgrows what tells "left" from "right".
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for linear in (block.attention.out, block.mlp[-1]):
                linear.weight.data.mul_((2 * self.config.depth) ** -0.5)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (b, l) int64, mask (b, l) bool, True at real tokens -> context (b, l, c).

        The context is exactly zero at padding. Token ids are below the config's vocab_size: whoever
        joins a tokenizer and an encoder checks that they fit. Raises ValueError if l exceeds the
        config's context_length.
        """
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise ValueError(f"the text is {length} tokens long and the limit is "
                             f"{self.config.context_length}: shorten the prompt")
        positions = torch.arange(length, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)    # (b, l, c)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) * mask.unsqueeze(-1)
