"""How the tokens of an optimizer step are cut into micro-batches."""

import logging

log = logging.getLogger(__name__)


def micro_batches(
    tokens_per_step: int, micro_batch_tokens: int, seq_len: int, devices: int, num_nodes: int = 1
) -> tuple[int, int]:
    """Cuts a step of tokens_per_step tokens into equal micro-batches.

    The step holds tokens_per_step // seq_len sequences, shared by the devices and accumulated over as few
    micro-batches of at most micro_batch_tokens tokens (but at least one sequence) as divide them evenly.

    Returns:
        (sequences in a micro-batch of one device, micro-batches in a step).
    """
    if devices < 1:
        raise ValueError(f"trainer.devices must be at least 1, got {devices}")
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    sequences = tokens_per_step // seq_len
    if sequences < 1:
        raise ValueError(
            f"tokens_per_step must be at least seq_len = {seq_len}, one sequence a step, got {tokens_per_step}"
        )
    processes = devices * num_nodes
    if sequences % processes:
        nodes = f" * trainer.num_nodes = {devices} * {num_nodes}" if num_nodes > 1 else f" = {devices}"
        raise ValueError(
            f"tokens_per_step // seq_len = {sequences} sequences a step must be a multiple of trainer.devices{nodes}"
        )
    if micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be at least 1, got {micro_batch_tokens}")
    if sequences * seq_len != tokens_per_step:
        log.warning(
            "tokens_per_step=%d is no multiple of seq_len=%d: a step has %d",
            tokens_per_step,
            seq_len,
            sequences * seq_len,
        )
    per_device = sequences // processes
    largest = max(1, micro_batch_tokens // seq_len)
    size = next(size for size in range(min(largest, per_device), 0, -1) if per_device % size == 0)
    fewest = -(-per_device // largest)
    if size < per_device // fewest / 2:
        log.warning(
            "%d sequences a step make %d micro-batches of %d each on a device, which trains slowly: "
            "tokens_per_step=%d makes %d of %d",
            *(sequences, per_device // size, size),
            *(per_device // fewest * fewest * processes * seq_len, fewest, per_device // fewest),
        )
    return size, per_device // size


def default_micro_batch_tokens(*, cuda: bool) -> int:
    """What keeps a large GPU busy, or fits the memory of a small CPU machine at model=small."""
    return 65536 if cuda else 8192
