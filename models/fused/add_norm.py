"""Triton kernels of the addition of a branch with layer norm: ``AddNorm`` of a model compiled for CUDA."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch's CUDA builds alone
    triton = None


class AddNormByTriton(torch.autograd.Function):
    """What ``AddNorm.forward`` does, the norm in the dtype asked for."""

    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype):
        """x + branch and its norm; keeps the sum, and two numbers a row."""
        total, y, mean, rstd = add_norm(x, branch, weight, eps, dtype)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.branch_dtype = branch.dtype
        return total, y

    @staticmethod
    def backward(ctx, dtotal: Tensor, dy: Tensor):
        """The gradients of x, of branch (the same, rounded) and of weight."""
        dx, dbranch, dweight = add_norm_backward(dtotal, dy, *ctx.saved_tensors, ctx.branch_dtype)
        return dx, dx if dx.dtype == ctx.branch_dtype else dbranch, dweight, None, None


if triton is not None:
    VECTOR = 4  # adjacent channels of a thread: 16 bytes of float32, the widest access there is
    WARP_CHANNELS = 1024  # at most: 32 a thread of each of five tensors, which the backward has in registers
    ROWS = 4  # of a program of the forward, which reads the weight once for them
    PROGRAMS = 2048  # of the backward, 16 a multiprocessor of an H100, each with a row of partial sums of dweight

    # One warp, if not too wide, has a row: it is summed in registers and by shuffles. Its tile is (GROUPS, VECTOR)
    # because Triton would have a thread of a flat one load eight adjacent channels for the sake of the 16-bit tensors,
    # and then move those of float32 through shared memory.

    @triton.jit
    def _add_norm_kernel(
        x, branch, weight, total, y, mean, rstd,
        rows, eps,
        WIDTH: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """ROWS rows a program: total = x + branch, y = its norm."""
        channel = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)
        inside = channel < WIDTH
        gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        row = tl.program_id(0).to(tl.int64) * ROWS  # offsets may pass 2^31
        end = tl.minimum(row + ROWS, rows)
        while row < end:
            at = row * WIDTH + channel
            sums = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            sums += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            rounded = sums.to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=inside)
            sums = rounded.to(tl.float32)  # what the backward reads
            center = tl.sum(sums) / WIDTH
            centered = tl.where(inside, sums - center, 0.0)
            scale = tl.rsqrt(tl.sum(centered * centered) / WIDTH + eps)
            tl.store(y + at, (centered * scale * gain).to(y.dtype.element_ty), mask=inside)
            tl.store(mean + row, center)
            tl.store(rstd + row, scale)
            row += 1

    @triton.jit
    def _add_norm_backward_kernel(
        dtotal, dy, total, weight, mean, rstd, dx, dbranch, partial,
        rows,
        WIDTH: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
    ):  # fmt: skip
        """A share of the rows a program: dx, its rounded copy dbranch, and one row of partial sums of dweight."""
        channel = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)
        inside = channel < WIDTH
        gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        dgain = tl.zeros((GROUPS, VECTOR), tl.float32)
        row = tl.program_id(0).to(tl.int64)
        while row < rows:
            at = row * WIDTH + channel
            sums = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
            beside = tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
            scale = tl.load(rstd + row)
            normal = tl.where(inside, (sums - tl.load(mean + row)) * scale, 0.0)
            dgain += grad * normal
            grad *= gain
            beside += grad * scale  # before the sums, so that dtotal is read along with the rest
            offset, along = tl.sum(grad) * (scale / WIDTH), tl.sum(grad * normal) * (scale / WIDTH)
            beside -= offset + normal * along
            tl.store(dx + at, beside.to(dx.dtype.element_ty), mask=inside)
            if dbranch.dtype.element_ty != dx.dtype.element_ty:
                tl.store(dbranch + at, beside.to(dbranch.dtype.element_ty), mask=inside)
            row += tl.num_programs(0)
        tl.store(partial + tl.program_id(0) * WIDTH + channel, dgain, mask=inside)

    def _tile(width: int) -> dict[str, int]:
        """Sizes of a tile, and the warps that share it."""
        channels = max(VECTOR, triton.next_power_of_2(width))
        return {"GROUPS": channels // VECTOR, "VECTOR": VECTOR, "num_warps": max(1, channels // WARP_CHANNELS)}

    @torch.library.triton_op("flash_cosine_sim_models::add_norm", mutates_args=())
    def add_norm(
        x: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sum in x's dtype, its norm in dtype, and the mean and reciprocal deviation of each row in float32."""
        x, branch = x.contiguous(), branch.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        total, y = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
        mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        torch.library.wrap_triton(_add_norm_kernel)[(triton.cdiv(rows, ROWS),)](
            x, branch, weight, total, y, mean, rstd, rows, eps, WIDTH=width, ROWS=ROWS, **_tile(width)
        )
        return total, y, mean, rstd

    @torch.library.triton_op("flash_cosine_sim_models::add_norm_backward", mutates_args=())
    def add_norm_backward(
        dtotal: Tensor, dy: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, branch_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, of branch, empty if its dtype is that of x, and of weight, summed in a fixed order."""
        dtotal, dy = dtotal.contiguous(), dy.contiguous()
        width = total.shape[-1]
        rows = total.numel() // width
        dx = torch.empty_like(total)
        dbranch = torch.empty_like(total, dtype=branch_dtype) if branch_dtype != dx.dtype else dx.new_empty(0)
        programs = min(PROGRAMS, rows)
        partial = torch.empty(programs, width, dtype=torch.float32, device=total.device)
        torch.library.wrap_triton(_add_norm_backward_kernel)[(programs,)](
            dtotal, dy, total, weight, mean, rstd, dx, dbranch, partial, rows, WIDTH=width, **_tile(width)
        )
        return dx, dbranch, partial.sum(0).to(weight.dtype)
