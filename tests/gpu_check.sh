#!/usr/bin/env bash
# What to run first on a machine with an NVIDIA GPU, from the repository: the kernels under compute-sanitizer, the GPU
# tests, tuning, the benchmark. It goes on after a failure, and its exit status is the number of steps that failed.
#
#   tests/gpu_check.sh [DIR]      figures and logs go to DIR (default: gpu-check)
#
# The package and its [test] extra must be installed, with a torch that has CUDA, and DSA_TVM_LIBRARY must name a library
# with CUDA kernels where the installed one has none: dsa-tvm build --target cuda ... --out DIR
# STEPS="memcheck tests bench" picks some of the steps, TUNE_SECONDS bounds the tuning (3600).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-check} failed=0
mkdir -p "$out"

step() { # NAME COMMAND...
  local name=$1
  shift
  [[ " ${STEPS:-memcheck racecheck tests tune tune_sparse_mla tune_sparse_mla_fp8 bench} " == *" $name "* ]] || return 0
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.log" || { failed=$((failed + 1)) && echo "== $name failed: see $out/$name.log"; }
}

# Each tensor in an allocation of its own, so that an access behind its end is seen.
sanitize() { # TOOL
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 --target-processes application-only \
    python -m pytest -x tests/test_cuda_memory.py -k "every_kernel and not cpu"
}

nvidia-smi 2>/dev/null || { echo "gpu_check: nvidia-smi finds no GPU" && exit 1; }
dsa-tvm env | tee "$out/env.txt"
step memcheck sanitize memcheck
step racecheck sanitize racecheck
step tests python -m pytest -k "not cpu" tests/test_topk.py tests/test_lightning_indexer.py tests/test_sparse_mla.py \
  tests/test_sparse_mla_fp8.py tests/test_element_types.py tests/test_torch_ops.py tests/test_ort.py \
  tests/test_cuda_memory.py tests/test_cuda_device.py tests/test_gpu_bench.py
step tune dsa-tvm tune all --target cuda --timeout "${TUNE_SECONDS:-3600}" --output "$out/tuning_logs"
for op in sparse_mla sparse_mla_fp8; do # for few heads, what tensor parallelism leaves
  step "tune_$op" dsa-tvm tune "$op" --target cuda --preset deepseek-v3.2-tp8 --output "$out/tuning_logs" \
    --timeout "$((${TUNE_SECONDS:-3600} / 6))"
done
step bench dsa-tvm bench --suite cuda --json "$out/bench.json"
echo "== $failed steps failed"
exit "$failed"
