"""How many bytes a step's activations take at most, by formulas over the operators' allocations.

Each stage counts the tensors that are alive together at its fullest, for T tokens whose contexts
reach max_model_len. FP8 activations take no more: x as e4m3 fits in what h then saves or, where h
is small, in the room that the experts' sum takes later. `tests/test_memory.py` holds the formulas
to what the operators allocate.
"""

from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig
from minidsv.kernels.indexer_logits import CHUNK_SCORES
from minidsv.kernels.sparse_mla import CHUNK_ELEMENTS
from minidsv.kernels.tiles_indexer import CHUNK
from minidsv.scheduler import MAX_LOGIT_ROWS
from minidsv.tensor_table import tensor_table

SAFETY = 1.1  # the allocator's rounding, and what libraries take inside an operator
SMALL = 32 << 20  # step metadata, angles, split sums, the expert plan
SAMPLER_BYTES = 64  # a logit of a sampled row: edits, penalties, sorts, noise (minidsv/sampler.py)


def forward_bytes(model: ModelConfig, config: EngineConfig, tokens: int, rows: int) -> int:
    """The most that a forward holds beside weights and caches, with logits of `rows` tokens.

    `config` is resolved.
    """
    stages = _reference_stages if config.backend == "torch" else _triton_stages
    return int(SAFETY * (SMALL + max(stages(model, config, tokens, rows).values())))


def workspace_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """The most that a step holds: its forward, or choosing the tokens of a full batch after it."""
    tokens, requests = config.max_num_batched_tokens, config.max_num_seqs
    rows = min(tokens, MAX_LOGIT_ROWS + requests)
    sampling = (4 * rows + SAMPLER_BYTES * min(tokens, requests)) * model.vocab_size
    return max(forward_bytes(model, config, tokens, rows), int(SAFETY * sampling))


class _Sizes:
    """Bytes of the tensors of a step, named as in the model."""

    def __init__(self, c: ModelConfig, config: EngineConfig, tokens: int, rows: int):
        t, b, heads = tokens, 4 if config.dtype == "float32" else 2, c.num_attention_heads
        assert config.max_model_len is not None
        self.keys = config.max_model_len
        self.scores = self.keys > c.index_topk
        self.hidden = t * c.hidden_size * b
        self.qr = t * (c.q_lora_rank + c.latent_dim + c.index_head_dim) * b
        self.q = t * heads * c.qk_head_dim * b
        self.index_q = t * c.index_n_heads * c.index_head_dim * b if self.scores else 0
        self.gate = 4 * t * c.index_n_heads if self.scores else 0
        self.slots = 8 * t * min(c.index_topk, self.keys)
        self.latent = t * heads * c.kv_lora_rank * b
        self.q_pe = t * heads * c.qk_rope_head_dim * b
        self.values = t * heads * c.v_head_dim * b
        self.chosen = t * c.num_experts_per_tok
        self.logits = rows * (4 * c.vocab_size + 4 * c.hidden_size * b)


def _triton_stages(c: ModelConfig, config: EngineConfig, tokens: int, rows: int) -> dict[str, int]:
    """Bytes at the fullest point of each part of the forward on Triton's kernels."""
    s = _Sizes(c, config, tokens, rows)
    projected = 5 * s.hidden + s.qr + s.q + s.index_q + s.gate  # x and sums of two blocks
    score = 12 if s.keys > CHUNK else 4  # bytes: with its place where it survives the sifting
    scored = min(tokens, max(1, CHUNK_SCORES // s.keys))
    selection = score * scored * s.keys if s.scores else 0
    inner = c.moe_intermediate_size * 2
    routed = s.chosen * (c.hidden_size * 2 + inner) + s.hidden + tokens * inner * c.n_shared_experts
    router = 4 * tokens * c.n_routed_experts + 12 * s.chosen
    return {
        "selection": projected + s.index_q + s.gate + 3 * s.slots + selection,
        "attention": projected + 2 * s.slots + 2 * s.latent + s.q_pe + s.values,
        "experts": 6 * s.hidden + s.slots + routed + router + s.hidden,
        "dense": 7 * s.hidden + s.slots + tokens * c.intermediate_size * 2,
        "logits": 6 * s.hidden + s.slots + s.logits,
    }


def _reference_stages(
    c: ModelConfig, config: EngineConfig, tokens: int, rows: int
) -> dict[str, int]:
    """The same in PyTorch, where fp32 copies of operands and of one weight come and go."""
    s, t = _Sizes(c, config, tokens, rows), tokens
    live = 6 * s.hidden + s.qr + s.q + s.index_q + s.gate + 2 * s.slots
    matrices = [spec.shape for spec in tensor_table(c).values() if spec.may_be_fp8]
    weight = 6 * max(rows * columns for rows, columns in matrices)  # e4m3 by int16 to fp32
    head = 4 * c.vocab_size * c.hidden_size if config.dtype != "float32" else 0
    widest = max(c.num_attention_heads * max(c.qk_head_dim, c.v_head_dim), c.hidden_size)
    query = 4 * t * c.num_attention_heads * c.latent_dim
    row = c.index_n_heads * c.index_head_dim
    dots = 4 * (1 << 20) + 4 * s.keys * (c.index_n_heads + 8)
    keys = 16 * s.keys * c.index_head_dim
    inner = max(c.intermediate_size, c.moe_intermediate_size * c.n_shared_experts)
    return {
        "selection": live + 16 * t * row + 2 * s.slots + keys + dots if s.scores else 0,
        "projections": live + 2 * s.latent + weight + 12 * t * widest,
        "attention": live + 2 * query + 2 * s.latent + s.q_pe + s.values + 16 * CHUNK_ELEMENTS,
        "experts": 8 * s.hidden + s.slots + weight + t * (20 * inner + 24 * c.hidden_size),
        "logits": 6 * s.hidden + s.slots + s.logits + head + 4 * rows * c.hidden_size,
    }
