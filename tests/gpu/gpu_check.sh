#!/usr/bin/env bash
# What to run first on a machine with an NVIDIA GPU, from the repository: the kernels under compute-sanitizer, the GPU
# tests, tuning, the benchmark. It goes on after a failure, and its exit status is the number of steps that failed.
#
#   tests/gpu/gpu_check.sh [DIR]      figures and logs go to DIR (default: gpu-check)
#
# The package and its [test] extra must be installed, with a torch that has CUDA, and DSA_TVM_LIBRARY must name a library
# with CUDA kernels where the installed one has none: dsa-tvm build --target cuda ... --out DIR
# STEPS="memcheck tests bench" picks some of the steps, TUNE_SECONDS bounds the tuning (3600), STEP_SECONDS each step
# (1800): a kernel that hangs ends with its step. What one step breaks on the GPU ends with its process too.
set -uo pipefail
cd "$(dirname "$0")/../.."
# The installed package, not the checkout.
export PYTHONSAFEPATH=1
out=${1:-gpu-check} failed=0
mkdir -p "$out"

step() { # NAME[:DETAIL] COMMAND...
  local log="$out/${1/:/.}.log" name=${1%%:*}
  shift
  [[ " ${STEPS:-memcheck tests tune bench racecheck} " == *" $name "* ]] || return 0
  echo "== $*"
  timeout -k 10 "${STEP_SECONDS:-1800}" "$@" > >(tee "$log") 2>&1 &
  running=$!
  wait "$running" || { failed=$((failed + 1)) && echo "== failed: see $log"; }
  running=
}
# A step has a process group of its own, which Ctrl-C on the terminal does not reach.
running=
trap '[[ -z $running ]] || kill "$running"; exit 130' INT TERM

# Each tensor in an allocation of its own, so that an access behind its end is seen. Looking for what a driver has makes
# calls that fail.
sanitize() { # TOOL
  step "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 --report-api-errors no \
    --target-processes application-only python -m pytest -x tests/gpu/test_cuda_memory.py -k "every_kernel and not cpu"
}

tune() { # OPERATOR PRESET
  step "tune:$1.$2" dsa-tvm tune "$1" --target cuda --preset "$2" --output "$out/tuning_logs" \
    --timeout "$((${TUNE_SECONDS:-3600} / 6))"
}

nvidia-smi 2>/dev/null || { echo "gpu_check: nvidia-smi finds no GPU" && exit 1; }
dsa-tvm env | tee "$out/env.txt"
sanitize memcheck
for test in cuda_memory topk lightning_indexer sparse_mla sparse_mla_fp8 element_types cuda_device torch_ops ort gpu_bench; do
  step "tests:$test" python -m pytest -rs -k "not cpu" -o faulthandler_timeout=300 tests/*/"test_$test.py"
done
for op in topk sparse_mla sparse_mla_fp8 lightning_indexer; do tune "$op" deepseek-v3.2; done
# Few heads, what tensor parallelism leaves a GPU.
for op in sparse_mla sparse_mla_fp8; do tune "$op" deepseek-v3.2-tp8; done
for op in lightning_indexer topk indexer_topk sparse_mla sparse_mla_fp8 dsa_attention; do
  step "bench:$op" dsa-tvm bench "$op" --suite cuda --json "$out/bench.$op.json"
done
# Last, because it is slow, and hazards that it sees among bulk copies and their barriers need not be any.
sanitize racecheck
echo "== $failed steps failed"
exit "$failed"
