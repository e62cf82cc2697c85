"""The clock of a GPU's multiprocessors, by counting their cycles.

nvidia-smi shows the clock that was asked for; at the power limit that is 10 to 15 % more than the one that is kept.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

CYCLES = 300_000  # some 0.2 ms: the timer's resolution may be a microsecond


@triton.jit
def _count_cycles(result, cycles):
    counted, nanoseconds = tl.inline_asm_elementwise(
        asm="""
        {
            .reg .u64 first_cycle, first_time, time;
            .reg .pred more;
            mov.u64 first_time, %globaltimer;
            mov.u64 first_cycle, %clock64;
        again:
            mov.u64 $0, %clock64;
            sub.u64 $0, $0, first_cycle;
            setp.lt.u64 more, $0, $2;
            @more bra again;
            mov.u64 time, %globaltimer;
            sub.u64 $1, time, first_time;
        }
        """,
        constraints="=&l,=&l,l",
        args=[cycles.to(tl.int64)],
        dtype=(tl.int64, tl.int64),
        is_pure=False,
        pack=1,
    )
    tl.store(result, counted)
    tl.store(result + 1, nanoseconds)


def start_sm_clock(device: torch.device) -> Callable[[], float]:
    """Queue a count of cycles behind what the GPU is doing. Returns a function that waits for it: the clock in GHz."""
    result = torch.empty(2, dtype=torch.int64, device=device)
    _count_cycles[(1,)](result, CYCLES, num_warps=1)

    def clock_ghz() -> float:
        cycles, nanoseconds = result.tolist()
        return cycles / nanoseconds

    return clock_ghz
