"""Inputs of the registered operators."""

import torch


def inputs(
    dtype=torch.float32,
    requires_grad=True,
    mask=True,
    bias=True,
    seq_len_q=7,
    seq_len_k=9,
    number=False,
    by_distance=False,
):
    """Return q, k, v, mask, attn_bias, scale, cu_seqlens_q, cu_seqlens_k, distance_bias, alibi_slopes, scale_value, as
    the operators take them; by_distance: with the two, of distances from 0 on.
    """
    torch.manual_seed(0)
    options = {"dtype": dtype, "requires_grad": requires_grad}
    q = torch.randn(2, 4, seq_len_q, 16, **options)
    k, v = (torch.randn(2, 2, seq_len_k, 16, **options) for _ in range(2))
    key_mask = torch.rand(2, seq_len_k) > 0.3
    key_mask[1] = False
    attn_bias = torch.randn(1, 4, seq_len_q, seq_len_k, **options)
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=scale_dtype, requires_grad=requires_grad)
    scale, scale_value = (None, 1.5) if number else (scale, 60.0)
    table = torch.randn(4, seq_len_k + 1, dtype=scale_dtype).requires_grad_(requires_grad)
    by_distance = (table, torch.rand(2, 4, dtype=scale_dtype)) if by_distance else (None, None)
    biases = key_mask if mask else None, attn_bias if bias else None
    return q, k, v, *biases, scale, None, None, *by_distance, scale_value


def settings(groups=1, causal=True, l2norm_qk=True, window_size=(-1, -1), first_distance=0):
    """Return groups, causal, window_left, window_right, first_distance, l2norm_qk, allow_tf32."""
    left, right = window_size
    right = 0 if causal else right
    return groups, right == 0, left, right, first_distance, l2norm_qk, False


def packed_inputs(lengths_q, lengths_k, behind=0, dtype=torch.float32, requires_grad=True):
    """The same as inputs() for packed sequences of these lengths, with `behind` rows that belong to none."""
    torch.manual_seed(0)
    options = {"dtype": dtype, "requires_grad": requires_grad}
    q = torch.randn(1, 4, sum(lengths_q) + behind, 16, **options)
    k, v = (torch.randn(1, 2, sum(lengths_k) + behind, 16, **options) for _ in range(2))
    return q, k, v, None, None, None, cu_seqlens(lengths_q), cu_seqlens(lengths_k), None, None, 1.5


def cu_seqlens(lengths):
    """Where each sequence of these lengths begins, and the last one ends: int32 (num_sequences + 1,)."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def seq_first(tensor):
    """The same values in (batch, seq_len, heads, head_dim) storage."""
    return tensor.detach().transpose(1, 2).contiguous().transpose(1, 2)
