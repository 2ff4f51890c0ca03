"""Every kernel that the engine can launch."""

from minidsv.kernels import (
    absorb_triton,
    argmax_triton,
    embedding_triton,
    gemm_triton,
    gemv_triton,
    indexer_logits_triton,
    indexer_prep_triton,
    mla_prep_triton,
    moe_plan_triton,
    moe_triton,
    norm_triton,
    quant_triton,
    rope_quant_triton,
    rope_triton,
    router_triton,
    set_mla_kv_buffer_triton,
    sparse_mla_triton,
    topk_long_triton,
    topk_triton,
)
from minidsv.kernels.launch import KernelSpec

FAMILIES = (
    absorb_triton,
    argmax_triton,
    embedding_triton,
    gemm_triton,
    gemv_triton,
    indexer_logits_triton,
    indexer_prep_triton,
    mla_prep_triton,
    moe_plan_triton,
    moe_triton,
    norm_triton,
    quant_triton,
    rope_quant_triton,
    rope_triton,
    router_triton,
    set_mla_kv_buffer_triton,
    sparse_mla_triton,
    topk_long_triton,
    topk_triton,
)
SPECS: tuple[KernelSpec, ...] = tuple(spec for family in FAMILIES for spec in family.SPECS)
