#!/usr/bin/env bash
# Builds, tests and times everything on a GPU machine that needs no network: torch, cmake, ninja, pybind11 and nvcc are
# taken as they are. A step that fails does not stop the others; the exit status is nonzero when any failed.
#
#   benchmarks/run_gpu.sh [STEP ...]        all steps, in this order, when none is named:
#     build      the compiled core, in place
#     peers      unpack the wheels in .whl/, when there are any
#     doctor     which backend runs each op, with its self-check
#     tests      the tests marked gpu, and the kernel tests on the GPU
#     sanitizer  compute-sanitizer: memcheck of all kernels, racecheck of the compiled ones
#     bench      all suites against every installed peer
#     parity     the model against transformers
#
# Environment: OUT (default benchmarks/results/<gpu>) gets log.txt, bench.json and summary.txt; LIMIT_S (default 570)
# bounds the whole run; SUITES, PEERS, WORKERS (parallel pytest processes, default 4), PYTHON, SITE (where peers are
# unpacked), QWEN3_COMMIT (recorded when there is no git), QWEN3_CUDA_ARCHS (default: this GPU's).
set -uo pipefail
cd "$(dirname "$0")/.."

ALL=(build peers doctor tests sanitizer bench parity)
steps=("${@:-${ALL[@]}}")
for step in "${steps[@]}"; do
  case " ${ALL[*]} " in
    *" $step "*) ;;
    *) echo "run_gpu.sh: unknown step '$step'; expected some of: ${ALL[*]}" >&2; exit 2 ;;
  esac
done

PYTHON=${PYTHON:-python3}
gpu=$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
if [ -z "$gpu" ]; then
  echo "run_gpu.sh: nvidia-smi shows no GPU; on a CPU use: $PYTHON -m benchmarks SUITE --device cpu" >&2
  exit 2
fi
slug=$(echo "${gpu%,*}" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]\n' '-')
arch=$(echo "${gpu##*,}" | tr -d ' .')
[ "$arch" = 90 ] && arch=90a # the instructions that Hopper alone has

export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false COLUMNS=150
export QWEN3_CUDA=1 QWEN3_CUDA_ARCHS="${QWEN3_CUDA_ARCHS:-$arch}"
SITE=${SITE:-/tmp/site}
if [ -d .whl ] || [ -d "$SITE" ]; then
  export PYTHONPATH="$SITE:$SITE/nvidia_cutlass_dsl/python_packages${PYTHONPATH:+:$PYTHONPATH}"
fi
OUT=${OUT:-benchmarks/results/$slug}
mkdir -p "$OUT"
log="$OUT/log.txt"
: >"$log"
deadline=$((SECONDS + ${LIMIT_S:-570}))

# limit SECONDS COMMAND...: at most so long, and never past the deadline of the whole run.
limit() {
  local left=$((deadline - SECONDS)) most=$1
  shift
  if [ "$left" -lt 5 ]; then
    echo "not started: the run's time (LIMIT_S) is used up"
    return 124
  fi
  timeout -k 10 $((left < most ? left : most)) "$@"
}

step_build() {
  limit 240 "$PYTHON" setup.py build_ext --inplace --build-temp build/gpu
}

step_peers() {
  local status=0
  if [ ! -d .whl ]; then
    echo "no .whl/: only the peers that are installed already"
    return 0
  fi
  mkdir -p "$SITE"
  for archive in .whl/*.tar.xz; do
    [ -e "$archive" ] && { limit 120 tar xJf "$archive" -C "$SITE" || status=1; }
  done
  limit 120 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" .whl/*.whl ||
    status=1
  return $status
}

step_doctor() {
  limit 120 "$PYTHON" -m qwen3_kernels doctor
}

step_tests() {
  local status=0 parallel=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "${WORKERS:-4}")
  limit 300 "$PYTHON" -m pytest tests/kernels -q -p no:cacheprovider "${parallel[@]}" || status=1
  # Others by file: collecting them all would want packages that only the CPU tests need.
  local others
  others=$(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v '^tests/kernels/')
  # shellcheck disable=SC2086
  [ -z "$others" ] || limit 120 "$PYTHON" -m pytest $others -m gpu -q -p no:cacheprovider || status=1
  return $status
}

step_sanitizer() {
  local status=0
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # an overrun of one tensor is one of an allocation
  limit 150 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m benchmarks.sanitize || status=1
  limit 150 compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" -m benchmarks.sanitize --backend cuda || status=1
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  return $status
}

step_bench() {
  # shellcheck disable=SC2086
  limit 400 "$PYTHON" -m benchmarks ${SUITES:-pointwise qk_norm_rope attention generate} --device cuda \
    --peers "${PEERS:-all}" --json "$OUT/bench.json"
}

step_parity() {
  limit 150 "$PYTHON" -m benchmarks.parity --device cuda
}

declare -A lines=([build]=3 [peers]=3 [doctor]=40 [tests]=12 [sanitizer]=8 [bench]=90 [parity]=30)
summary=() failed=0
echo "$gpu; logs and results in $OUT" | tee -a "$log"
for step in "${steps[@]}"; do
  echo "== $step" | tee -a "$log"
  begin=$SECONDS from=$(($(wc -l <"$log") + 1))
  "step_$step" >>"$log" 2>&1
  status=$?
  show=${lines[$step]}
  [ $status -ne 0 ] && [ "$show" -lt 30 ] && show=30
  tail -n "+$from" "$log" | tail -n "$show"
  case $status in
    0) word=ok ;;
    124 | 137) word="out of time" failed=1 ;;
    *) word="FAILED ($status)" failed=1 ;;
  esac
  summary+=("$(printf '%-10s %5ds  %s' "$step" $((SECONDS - begin)) "$word")")
done
{
  echo "== summary: ${gpu%,*}, ${SECONDS}s"
  printf '%s\n' "${summary[@]}"
} | tee -a "$log" "$OUT/summary.txt"
exit $failed
