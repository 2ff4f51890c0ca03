# untracked: one lent-GPU round; bash gpu_round.sh
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1; L=$OUT/log; mkdir -p /tmp/l; T0=$(date +%s)
python3 -m pip install -q --no-deps --no-build-isolation --disable-pip-version-check -e . 2>&1 | tail -1
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader
S=${TEST_S:-230}
run() { n=$1; shift; timeout $S python3 -m pytest -q --tb=short -p no:cacheprovider -m gpu "$@" > /tmp/l/$n.txt 2>&1; echo "rc $? after $(( $(date +%s)-T0 )) s" >> /tmp/l/$n.txt; }
K=tests/kernels
run gemm $K/test_gemm_triton.py & run logits $K/test_indexer_logits_triton.py & run moe $K/test_moe_triton.py &
run prep $K/test_prep_triton.py & run router $K/test_router_triton.py & run setmla $K/test_set_mla_kv_buffer_triton.py &
run small $K/test_small_triton.py & run sparse $K/test_sparse_mla_triton.py & run topk $K/test_topk_triton.py &
run eng_ds $K/test_engine_triton.py -k "test_logits and dsv32" & run eng_glm $K/test_engine_triton.py -k "test_logits and glm" &
run eng_ret $K/test_engine_triton.py -k "retrieval" & run eng_chain $K/test_engine_triton.py -k "captured" &
run ran $K/test_ran.py & run gpu tests/test_gpu.py & run graph tests/test_gpu_graph.py &
wait
for f in /tmp/l/*.txt; do echo "== $(basename $f): $(tail -2 $f | tr '\n' ' ' | cut -c1-150)"; grep -E "^(FAILED|ERROR)" $f | cut -c1-200 | head -6; done
for m in 1 8; do
timeout ${BENCH_S:-110} python3 scripts/bench_kernels.py --dims full --tokens $m --json /tmp/l/bench_$m.json > /tmp/l/bench_$m.out 2>&1; echo "bench $m rc $? after $(( $(date +%s)-T0 )) s"; grep -v "^{" /tmp/l/bench_$m.out | tail -50 | cut -c1-170
done
tar czf $OUT/all.tgz -C /tmp/l . ; ls -la $OUT
