"""A GPT over bytes with cosine-sim attention, in plain PyTorch: python examples/char_gpt.py [TEXT_FILE]

Without a file it learns the text of Python's own standard library. The defaults suit two CPU cores (a minute or two);
a GPU takes more: --layers 8 --width 512 --heads 8 --seq-len 1024 --batch 32 --steps 2000 --lr 1e-3
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_cosine_sim_attention import flash_cosine_sim_attention

DEFAULTS = {"steps": 600, "layers": 4, "width": 128, "heads": 4, "seq_len": 128, "batch": 16, "lr": 2e-3}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (batch, heads, n, head_dim); cos and sin (n, head_dim / 2) of the positions' angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        # The softmax's inverse temperature. |cos| <= 1: with a scale of 1, no key could get more than e^2 times the
        # weight of another. Its logarithm is learned: the scale stays positive and changes in proportion to itself.
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(12.0)))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # keeps norms: the same before or after the library's l2norm
        o = flash_cosine_sim_attention(q, k, v, scale=self.log_scale.exp(), causal=True)  # (batch, heads, n, head_dim)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int):
        super().__init__()
        self.embedding = nn.Embedding(256, width)  # a token is a byte
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, 256, bias=False)
        nn.init.zeros_(self.head.weight)  # every byte equally likely: the first loss is exactly 8 bits
        frequency = 10_000.0 ** -torch.linspace(0, 1, width // heads // 2 + 1)[:-1]  # (head_dim / 2,)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, n), integers below 256 -> logits (batch, n, 256) of the next ones."""
        angle = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), self.frequency)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angle.cos(), angle.sin())
        return self.head(self.norm(x))


def mean_loss(gpt: GPT, windows: Tensor) -> Tensor:
    """Mean of -ln p over all bytes of windows (batch, n + 1) but each one's first; matrix products in bf16 on a GPU."""
    windows = windows.long()
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
        logits = gpt(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(gpt: GPT, data: Tensor, seq_len: int, batch: int) -> float:
    windows = data.unfold(0, seq_len + 1, seq_len)  # the last byte of each is the first of the next: all are scored
    return sum(mean_loss(gpt, part).item() * len(part) for part in windows.split(batch)) / len(windows) / math.log(2)


@torch.no_grad()
def sample(gpt: GPT, prompt: bytes, num_bytes: int, seq_len: int, temperature: float = 0.8) -> str:
    tokens = torch.tensor([list(prompt)], device=gpt.frequency.device)
    for _ in range(num_bytes):  # without a key/value cache: simple, and slow where texts are long
        logits = gpt(tokens[:, -seq_len:])[:, -1] / temperature
        tokens = torch.cat((tokens, torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text_file", nargs="?", type=Path, help="default: Python's standard library")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"= {default}")
    args = parser.parse_args()
    for name in DEFAULTS:
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.width % (8 * args.heads) or args.width // args.heads > 256:
        parser.error(f"--width / --heads must be a multiple of 8 up to 256, got {args.width} / {args.heads}")
    files = [args.text_file] if args.text_file else sorted(Path(os.__file__).parent.glob("*.py"))
    text = b"".join(path.read_bytes() for path in files if path.is_file())
    if len(text) < 20 * args.seq_len:  # a tenth is for validation: two windows
        parser.error(f"text_file must be a file of 20 * --seq-len = {20 * args.seq_len} bytes or more, got {len(text)}")

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    train, val = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :][:32_768]
    share = data.bincount() / len(data)
    print(f"{len(text):,} bytes; byte frequencies alone: {-(share * share.log2()).nansum():.3f} bits per byte")
    gpt = GPT(args.layers, args.width, args.heads).to(device)
    # Who adds weight decay leaves log_scale out of it: it would pull every scale to 1.
    optimizer = torch.optim.AdamW(gpt.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, args.steps + 1):
        optimizer.param_groups[0]["lr"] = args.lr * min(step / 50, 1 - (step - 1) / args.steps)  # warmup, linear decay
        first = torch.randint(len(train) - args.seq_len, (args.batch, 1), device=device)
        loss = mean_loss(gpt, train[first + torch.arange(args.seq_len + 1, device=device)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        for block in gpt.blocks:  # above 60, the library's bound, a scale would have no gradient
            block.log_scale.data.clamp_(max=math.log(60) - 1e-6)
        if step % math.ceil(args.steps / 6) == 0 or step == args.steps:
            bits = bits_per_byte(gpt, val, args.seq_len, args.batch)
            print(f"step {step:4}: validation loss {bits:.3f} bits per byte", flush=True)
    print("sample:", sample(gpt, b"def ", 300, args.seq_len), sep="\n")


if __name__ == "__main__":
    main()
