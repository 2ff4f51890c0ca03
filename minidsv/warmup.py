"""Steps that make Triton compile, before the first request, all that a request may launch."""

from collections.abc import Iterator, Sequence

import torch

from minidsv.batch import StepBatch
from minidsv.block_manager import pages_for
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.scheduler import MAX_LOGIT_ROWS


def warm_up_steps(
    bounds: Sequence[int],
    most_requests: int,
    most_tokens: int,
    dummy_page: int,
    device: torch.device,
) -> Iterator[StepBatch]:
    """Steps of 1, 2, 3, 4, 6, 8, 12, ... tokens, of one request and of one each.

    bounds: the largest context of each path (`minidsv/graph.py`). The largest step comes first, so
    that memory that does not suffice shows at once. All is read from and written to `dummy_page`,
    which no request owns.
    """
    powers = [2**power for power in range(31)]
    sizes = {size for size in (*powers, *(3 * p for p in powers)) if size < most_tokens}
    shorter = [p for p in (1, *powers[6:]) if p < bounds[-1] and p not in bounds]
    for bound in (*reversed(bounds), *shorter):  # tiles and splits change at powers of 2
        for tokens in sorted({*sizes, most_tokens}, reverse=True):
            for requests in {1, min(tokens, most_requests)}:
                if requests in (1, tokens):
                    yield _step(tokens, requests, bound, dummy_page, device)


def _step(
    tokens: int, requests: int, max_seq_len: int, dummy_page: int, device: torch.device
) -> StepBatch:
    zeros = torch.zeros(tokens, dtype=torch.int64, device=device)
    rows = torch.arange(tokens, device=device)
    return StepBatch(
        input_ids=zeros,
        positions=zeros.clone(),
        slot_mapping=zeros + dummy_page * PAGE_SIZE,
        seq_lens=zeros + 1,
        request_index=rows if requests == tokens else zeros.clone(),
        block_table=torch.full((requests, pages_for(max_seq_len)), dummy_page, device=device),
        logits_index=rows[:MAX_LOGIT_ROWS].clone(),
        max_seq_len=max_seq_len,
    )
