"""What the indexers selected for output tokens, for requests with `return_indexer_topk`.

A step that draws a token for such a request carries a SelectionRecorder (`minidsv/batch.py`); all
others carry None and pay nothing. The indexers choose physical slots; a request is told positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minidsv.batch import SelectionRecorder
from minidsv.config import ModelConfig
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.request import IndexerTopk, Request
from minidsv.scheduler import Chunk


def selection_recorder(
    chunks: Sequence[Chunk], config: ModelConfig, device: torch.device
) -> SelectionRecorder | None:
    """A recorder for the chunks' last tokens, if some chunk asks and has something to choose."""
    rows, end = list[int](), 0
    for chunk in chunks:
        end += chunk.num_tokens
        if _asks(chunk) and chunk.end > config.index_topk:
            rows.append(end - 1)
    return SelectionRecorder(torch.tensor(rows, device=device)) if rows else None


def read_selections(
    chunks: Sequence[Chunk], recorder: SelectionRecorder | None, config: ModelConfig
) -> dict[Request, IndexerTopk]:
    """The selections of the chunks that ask, brought to the host.

    To be called while the requests hold the pages that the step ran with.
    """
    asking = [chunk for chunk in chunks if _asks(chunk)]
    selections = {chunk.request: IndexerTopk(chunk.end, "all") for chunk in asking}
    if recorder is not None:
        choosing = [chunk for chunk in asking if chunk.end > config.index_topk]
        slots = torch.stack(recorder.slots, 1).cpu()  # [S, layers with an indexer, K], none is -1
        for chunk, chosen in zip(choosing, slots, strict=True):
            positions = _positions(chosen, chunk.request.page_ids).sort(-1).values.tolist()
            layers = _of_all_layers(positions, config.indexer_types)
            selections[chunk.request] = IndexerTopk(chunk.end, layers)
    return selections


def _asks(chunk: Chunk) -> bool:
    return chunk.samples and chunk.request.params.return_indexer_topk


def _positions(slots: Tensor, page_ids: Sequence[int]) -> Tensor:
    """Physical slots, of any shape -> positions in the request that holds `page_ids`."""
    pages, order = torch.tensor(page_ids).sort()
    return order[torch.searchsorted(pages, slots // PAGE_SIZE)] * PAGE_SIZE + slots % PAGE_SIZE


def _of_all_layers(
    positions: list[list[int]], indexer_types: Sequence[str]
) -> list[list[int] | int]:
    """The full layers' positions, and for each shared layer the number of the one it follows."""
    layers: list[list[int] | int] = []
    source, of_full_layers = 0, iter(positions)
    for layer, kind in enumerate(indexer_types):
        if kind == "full":
            source = layer
            layers.append(next(of_full_layers))
        else:
            layers.append(source)
    return layers
