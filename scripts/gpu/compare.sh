#!/usr/bin/env bash
# scripts/gpu/compare.sh VLLM MODEL WHEELS… [-- arguments of scripts/compare.py]
#
# scripts/compare.py on one GPU, on a machine with torch and transformers but perhaps no network. VLLM is what
# scripts/gpu/vllm.sh takes, with fastapi for `transformers serve`, and an env.sh if it needs one; MODEL is a folder with a config.json and a
# tokenizer, which gets random weights if it has none. All servers are in the GPU's memory at once, and those whose
# turn it is not are halted; this engine and vLLM have KV caches of $KV_BYTES. ENGINES="microvllm vllm" takes only
# those; hf-generate and transformers take part in the shorter workloads, and microvllm-offline and vllm-offline in
# `--workload offline256` alone. VLLM_ARGS are further flags of vLLM's server. Results go to $OUT, or the folder that
# --out names. What a run leaves behind ends with it; after a SIGKILL, with the next one.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: scripts/gpu/compare.sh VLLM MODEL WHEELS… [-- arguments]" >&2; exit 2; }
parts=$(realpath "$1") model=$(realpath "$2")
shift 2
folders=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    folders+=("$(realpath "$1")")
    shift
done
[ $# -eq 0 ] || shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=${TMPDIR:-/tmp}/microvllm-compare
mkdir -p "$work"

# A server that has left its session, or whose starter was killed, would keep its part of the GPU's memory. All that a
# run starts has its id in the environment: this shell's process and the moment of its start.
moment_of() { cut -d' ' -f22 "/proc/$1/stat" 2>/dev/null || true; }
end_leftovers() { # of this run, and of those whose shell has ended
    local file pid run
    for file in /proc/[0-9]*/environ; do
        pid=${file//[!0-9]/}
        # A line within another variable is no variable.
        run=$({ sed -zn 's/^MICROVLLM_COMPARE_RUN=//p' "$file" | tr -d '\0'; } 2>/dev/null) || continue
        [[ $run =~ ^[0-9]+\.[0-9]+$ ]] || continue
        if [ "$run" = "$1" ] || [ "$(moment_of "${run%.*}")" != "${run#*.}" ]; then
            echo "Ending process $pid, left over from run $run" >&2
            kill -KILL "$pid" 2>/dev/null || true
        fi
    done
}
end_leftovers none
run=$$.$(moment_of $$)
trap 'end_leftovers "$run"' EXIT

source scripts/gpu/environment.sh "${folders[@]}"
source scripts/gpu/vllm.sh "$parts" "$work/vllm"
# The comparison asks for our version as for that of any package.
python3 - -q egg_info --egg-base "$site" <<<'from setuptools import setup; setup()'
# An interpreter with vLLM's packages in place of ours. Without FlashInfer vLLM samples by its own kernels. Its caches
# are its own and lie together: what it has compiled names files in Triton's cache by their path.
caches=${VLLM_CACHES:-$work/caches}
cat >"$work/python" <<END
#!/bin/sh
unset PYTHONPATH
[ ! -f '$vllm/env.sh' ] || . '$vllm/env.sh'
export PYTHONPATH='$vllm' VLLM_USE_FLASHINFER_SAMPLER=0
export VLLM_CACHE_ROOT='$caches/vllm' TRITON_CACHE_DIR='$caches/triton' TORCHINDUCTOR_CACHE_DIR='$caches/inductor'
exec python3 "\$@"
END
chmod +x "$work/python"

engines=()
for engine in ${ENGINES:-microvllm vllm hf-generate transformers}; do
    case $engine in
    hf-generate | transformers) engines+=(--engine "$engine workloads=single,concurrent35,chat") ;;
    vllm) engines+=(--engine "vllm${VLLM_ARGS:+ args='$VLLM_ARGS'}") ;;
    *) engines+=(--engine "$engine") ;;
    esac
done
MICROVLLM_COMPARE_RUN=$run python3 scripts/compare.py --model "$model" --device cuda --turns halt --warmup-len 64 \
    --keep "$work/models" --kv-cache-memory-bytes "${KV_BYTES:-23000000000}" --vllm-python "$work/python" \
    --hf-python "$work/python" "${engines[@]}" --out "${OUT:-comparison}" "$@"
