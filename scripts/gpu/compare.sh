#!/usr/bin/env bash
# scripts/gpu/compare.sh VLLM MODEL WHEELS… [-- arguments of scripts/compare.py]
#
# scripts/compare.py on one GPU, on a machine with torch and transformers but perhaps no network. VLLM is what
# scripts/gpu/vllm.sh takes, with fastapi for `transformers serve`; MODEL is a folder with a config.json and a
# tokenizer, which gets random weights if it has none. All servers are in the GPU's memory at once, and those whose
# turn it is not are halted; this engine and vLLM have KV caches of $KV_BYTES. ENGINES="microvllm vllm" takes only
# those; hf-generate and transformers take part in the shorter workloads, and microvllm-offline and vllm-offline in
# `--workload offline256` alone. Results go to $OUT, or the folder that --out names.
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

source scripts/gpu/environment.sh "${folders[@]}"
source scripts/gpu/vllm.sh "$parts" "$work/vllm"
# The comparison asks for our version as for that of any package.
python3 - -q egg_info --egg-base "$site" <<<'from setuptools import setup; setup()'
# An interpreter with vLLM's packages in place of ours. Without FlashInfer vLLM samples by its own kernels.
cat >"$work/python" <<END
#!/bin/sh
export PYTHONPATH='$vllm' VLLM_USE_FLASHINFER_SAMPLER=0
exec python3 "\$@"
END
chmod +x "$work/python"

engines=()
for engine in ${ENGINES:-microvllm vllm hf-generate transformers}; do
    case $engine in
    hf-generate | transformers) engines+=(--engine "$engine workloads=single,concurrent35,chat") ;;
    *) engines+=(--engine "$engine") ;;
    esac
done
python3 scripts/compare.py --model "$model" --device cuda --turns halt --warmup-len 64 --keep "$work/models" \
    --kv-cache-memory-bytes "${KV_BYTES:-23000000000}" --vllm-python "$work/python" --hf-python "$work/python" \
    "${engines[@]}" --out "${OUT:-comparison}" "$@"
