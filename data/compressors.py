"""What general compressors need per byte of a split: the bar that a trained model has to clear."""

import lzma
import zlib
from concurrent.futures import ThreadPoolExecutor

from data.bytes import Corpus

GZIP_WINDOW = 1 << 15  # deflate refers back at most 32 KiB
XZ_WINDOW = 64 << 20  # the dictionary of preset 9


def compressor_bits_per_byte(corpus: Corpus, split: str = "val") -> dict[str, float]:
    """Return bits per byte of `split` ("val" or "test") under gzip -9 and xz -9e, alone and given train.

    Keys: gzip_9, gzip_9_given_train, xz_9e, xz_9e_given_train. "Given train", the fair bar for a model
    trained on train, is (size(train + x) - size(train)) * 8 / len(x). Only the end of train that the
    compressor can refer to counts: 32 KiB for gzip, 64 MiB for xz. xz takes about 1 s per MB of train, in
    two threads of up to 0.7 GB.
    """
    if split not in ("val", "test"):
        raise ValueError(f"split must be 'val' or 'test', got {split!r}")
    content = getattr(corpus, split).tobytes()
    gzip_context = corpus.train[-GZIP_WINDOW:].tobytes()
    xz_context = corpus.train[-XZ_WINDOW:].tobytes()
    with ThreadPoolExecutor(max_workers=2) as pool:  # lzma works outside the interpreter's lock
        xz_joined, xz_before, xz_alone = pool.map(_xz_size, (xz_context + content, xz_context, content))
    sizes = {
        "gzip_9": _gzip_size(content),
        "gzip_9_given_train": _gzip_size(content, gzip_context),
        "xz_9e": xz_alone,
        "xz_9e_given_train": xz_joined - xz_before,
    }
    return {name: 8 * size / len(content) for name, size in sizes.items()}


def _gzip_size(content: bytes, context: bytes = b"") -> int:
    """Size of the raw deflate stream (a .gz file adds 18 bytes) with `context` already in the window."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=context)
    return len(deflate.compress(content)) + len(deflate.flush())


def _xz_size(content: bytes) -> int:
    return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
