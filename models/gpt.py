"""A GPT over bytes: embedding, blocks, logits, and generation with a key/value cache."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import InnerAttention, KVCache, SelfAttention
from models.blocks import MLP, Block
from models.positions import POSITIONS, position_bias_of
from models.rotary import Rotary
from models.windows import mean_visible_keys

VOCABULARY = 256  # one token a byte
LEAST_TEMPERATURE = 1e-20  # below it logits / temperature may overflow; only the likeliest byte is left by then


class GPT(nn.Module):
    """A decoder-only transformer over bytes.

    Args:
        num_layers: blocks.
        width: channels of the residual stream; a multiple of num_heads.
        num_heads: attention heads.
        num_kv_heads: key/value heads, dividing num_heads; None for num_heads.
        seq_len: the longest context, in bytes.
        attention: builds a layer's inner attention from num_heads, head_dim, layer (from 0), num_layers and
            position_bias.
        block: builds a block from width, num_layers, attention and mlp; says how the stream is normalised.
        positions: "rotary" (relative, in q and k), "learned" (absolute, added to the embedding), or added to the
            logits by distance: "alibi" (a slope a head) or "dynamic" (a learned network a layer).
        tied_head: share the embedding's weights with the head.
        dropout: probability, after the embedding, each attention and each MLP.
        activation: of the MLPs, "gelu" or "relu2".
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        num_heads: int,
        num_kv_heads: int | None,
        seq_len: int,
        attention: Callable[..., InnerAttention],
        block: Callable[..., Block],
        positions: str,
        tied_head: bool,
        dropout: float,
        activation: str = "gelu",
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(num_layers, width, num_heads, num_kv_heads, seq_len, positions, dropout)
        head_dim = width // num_heads
        self.seq_len = seq_len
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.embedding_scale = width**0.5 if tied_head else 1.0
        self.positions = nn.Embedding(seq_len, width) if positions == "learned" else None
        rotary = Rotary(head_dim, seq_len) if positions == "rotary" else None
        self.dropout = nn.Dropout(dropout)

        def build_layer(layer: int) -> Block:
            bias = position_bias_of(positions, num_heads=num_heads, seq_len=seq_len)
            place = {"layer": layer, "num_layers": num_layers}
            inner = attention(num_heads=num_heads, head_dim=head_dim, **place, position_bias=bias)
            around = SelfAttention(width, num_heads, num_kv_heads, inner=inner, rotary=rotary, dropout=dropout)
            mlp = MLP(width, dropout=dropout, activation=activation)
            return block(width=width, num_layers=num_layers, attention=around, mlp=mlp)

        self.blocks = nn.ModuleList(build_layer(layer) for layer in range(num_layers))
        self.norm = self.blocks[0].final_norm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self._init_weights(tied_head)
        self.register_load_state_dict_post_hook(_fill_tables)

    def _init_weights(self, tied_head: bool) -> None:
        # The stream starts with variance 1. GPT-2's 0.02 makes narrow models learn far slower, and DeepNorm
        # implementations that start at 1e-5 live on LayerNorm's epsilon in the first block.
        nn.init.normal_(self.embedding.weight)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight)
        if tied_head:
            # as a head the rows must be short; multiplied by sqrt(width) they make the same stream
            nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
            self.head.weight = self.embedding.weight
        else:
            nn.init.zeros_(self.head.weight)  # every byte equally likely: the first loss is exactly 8 bits

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: list[KVCache] | None = None) -> Tensor:
        """Logits, or the mean loss when targets are given.

        Args:
            tokens: (batch, n) integers below 256, n <= seq_len less what the cache holds.
            targets: (batch, n) the byte after each token, -100 where nothing is scored.
            cache: one ``KVCache`` a block, filled by the earlier tokens; tokens continue them.

        Returns:
            float32 logits (batch, n, 256), or the mean of -ln p over scored targets, a float32 scalar in nats.
        """
        start = cache[0].length if cache else 0
        if start + tokens.shape[1] > self.seq_len:
            raise ValueError(
                f"tokens reach position {start + tokens.shape[1]}, accepted: up to seq_len = {self.seq_len}"
            )
        x = self.embedding(tokens) * self.embedding_scale  # (batch, n, width)
        if self.positions is not None:
            x = x + self.positions.weight[start : start + tokens.shape[1]]
        x, branch = self.dropout(x), None  # their sum is the stream, in the weights' dtype
        for index, block in enumerate(self.blocks):
            x, branch = block(x, branch, cache[index] if cache else None)
        if branch is not None:
            x = x + branch
        logits = self.head(self.norm(x)).float()  # (batch, n, 256)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def new_cache(self, batch: int, dtype: torch.dtype | None = None) -> list[KVCache]:
        """An empty cache for every block; dtype defaults to the weights'."""
        weight = self.embedding.weight
        shape = (batch, self.num_kv_heads, self.seq_len, self.head_dim)
        return [KVCache(shape, device=weight.device, dtype=dtype or weight.dtype) for _ in self.blocks]

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        num_bytes: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continues prompt (batch, n >= 1) by num_bytes sampled bytes and returns them, (batch, num_bytes).

        When seq_len positions are full, the oldest half of the context is dropped and the rest starts again at
        position 0; with and without the cache alike, so that both give the same bytes.

        Args:
            temperature: divides the logits; 0 takes the most likely byte.
            top_k: sample among the k most likely bytes only.
            top_p: sample among the fewest most likely bytes only whose probabilities sum to at least top_p (nucleus
                sampling); after temperature and top_k.
            generator: source of randomness on the model's device.
            use_cache: keep keys and values instead of computing the context anew for each byte.
        """
        _check_sampling(prompt, num_bytes, temperature, top_k, top_p)
        was_training = self.training
        self.eval()
        context = prompt[:, -self.seq_len :]
        cache, generated = None, []
        for _ in range(num_bytes):
            if context.shape[1] > self.seq_len:
                context, cache = context[:, -max(1, self.seq_len // 2) :], None
            if use_cache and cache is None:
                cache, new = self.new_cache(len(prompt), self._activation_dtype()), context
            else:
                new = context[:, -1:] if use_cache else context
            # forward, not __call__: a compiled model would be compiled again for every length
            logits = self.forward(new, cache=cache)[:, -1]
            generated.append(_sample(logits, temperature, top_k, top_p, generator))
            context = torch.cat((context, generated[-1]), dim=1)
        self.train(was_training)
        return torch.cat(generated, dim=1) if generated else prompt[:, :0]

    def _activation_dtype(self) -> torch.dtype:
        device_type = self.embedding.weight.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.embedding.weight.dtype

    def num_parameters(self) -> int:
        """All parameters, a shared one counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations a token of one training step, forward and backward.

        6 a weight of every matrix product (the embedding is a look-up), and for attention 12 * width a visible key:
        QK^T and PV are 4 * width a key forward, twice that backward (PaLM, Chowdhery et al. 2022, appendix B). A causal
        token sees half of the keys, seq_len / 2; one with a window of w keys w (1 - w / (2 seq_len)) of them.
        """
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        keys = sum(mean_visible_keys(seq_len, block.attention.inner.window) for block in self.blocks)
        return 6.0 * weights + 12.0 * self.embedding.embedding_dim * keys


def _fill_tables(gpt: GPT, _incompatible_keys: object) -> None:
    """Gives a model that was built on the meta device its rotary tables, once weights are assigned to it."""
    device = gpt.embedding.weight.device
    for module in gpt.modules():
        if isinstance(module, Rotary) and module.cos.device != device:
            module.fill(device)


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One byte a row of logits (batch, 256) -> (batch, 1)."""
    if temperature < LEAST_TEMPERATURE:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        best = logits.topk(min(top_k, VOCABULARY))  # so many, also of equal ones
        logits = torch.full_like(logits, float("-inf")).scatter(-1, best.indices, best.values)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        probabilities = nucleus(probabilities, top_p)
    return torch.multinomial(probabilities, num_samples=1, generator=generator)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero for each byte that a sum of top_p does without, taken in descending order; not renormalised.

    Args:
        probabilities: (batch, 256).
    """
    if top_p == 1:  # whatever the sum below rounds to
        return probabilities
    descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
    likelier = descending.cumsum(dim=-1) - descending  # their sum: 0 for the first byte, which therefore stays
    kept = descending.masked_fill(likelier >= top_p, 0.0)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _check_sizes(
    num_layers: int, width: int, num_heads: int, num_kv_heads: int, seq_len: int, positions: str, dropout: float
) -> None:
    for name, value in (
        ("model.num_layers", num_layers),
        ("model.width", width),
        ("model.num_heads", num_heads),
        ("model.num_kv_heads", num_kv_heads),
        ("seq_len", seq_len),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if width % num_heads:
        raise ValueError(f"model.num_heads must divide model.width = {width}, got {num_heads}")
    if num_heads % num_kv_heads:
        raise ValueError(f"model.num_kv_heads must divide model.num_heads = {num_heads}, got {num_kv_heads}")
    if positions not in POSITIONS:
        raise ValueError(f"model.positions must be {', '.join(POSITIONS[:-1])} or {POSITIONS[-1]}, got {positions!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"model.dropout must be in [0, 1), got {dropout}")


def _check_sampling(prompt: Tensor, num_bytes: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must be (batch, n) with n >= 1, got {tuple(prompt.shape)}")
    if num_bytes < 0:
        raise ValueError(f"num_bytes must be at least 0, got {num_bytes}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
