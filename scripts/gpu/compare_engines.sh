#!/usr/bin/env bash
# scripts/gpu/compare_engines.sh VLLM CONFIG WHEELS… [-- arguments of scripts/compare.py]
#
# The general comparison (scripts/compare.py) on one GPU, on a machine with torch and transformers but perhaps no
# network: this engine, vLLM, Hugging Face `generate` and `transformers serve`. VLLM is what scripts/gpu/vllm.sh
# takes, with fastapi for `transformers serve`; CONFIG is the folder of a model's config.json and tokenizer, of
# which a random checkpoint is written. All servers are in the GPU's memory at once, and those whose turn it is
# not are halted; this engine and vLLM have KV caches of the same size. The two from Hugging Face take part in the
# shorter workloads; ENGINES="microvllm vllm" takes only those. Results go to $OUT, or the folder that --out names.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: scripts/gpu/compare_engines.sh VLLM CONFIG WHEELS… [-- arguments]" >&2; exit 2; }
parts=$(realpath "$1") config=$(realpath "$2")
shift 2
folders=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    folders+=("$(realpath "$1")")
    shift
done
[ $# -eq 0 ] || shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=${TMPDIR:-/tmp}/microvllm-compare
model=$work/models/$(basename "$config")

source scripts/gpu/environment.sh "${folders[@]}"
trap 'rm -rf "$site"' EXIT
source scripts/gpu/vllm.sh "$parts" "$work/vllm"
python3 scripts/gpu/write_checkpoint.py "$config" "$model"
# The comparison asks for our version as for that of any package.
python3 - -q egg_info --egg-base "$site" <<<'from setuptools import setup; setup()'
# An interpreter with vLLM's packages in place of ours. Without FlashInfer vLLM samples by its own kernels.
cat >"$work/python" <<END
#!/bin/sh
export PYTHONPATH='$vllm' VLLM_USE_FLASHINFER_SAMPLER=0
exec python3 "\$@"
END
chmod +x "$work/python"

cache='--kv-cache-memory-bytes 23000000000 --max-model-len 4096'
short=single,concurrent35,chat
engines=()
for engine in ${ENGINES:-microvllm vllm hf-generate transformers}; do
    case $engine in
    microvllm) engines+=(--engine "microvllm args='$cache'") ;;
    vllm) engines+=(--engine "vllm args='$cache --gpu-memory-utilization 0.35'") ;;
    transformers) engines+=(--engine "transformers workloads=$short args='--cb-max-memory-percent 0.5'") ;;
    *) engines+=(--engine "$engine workloads=$short") ;;
    esac
done
python3 scripts/compare.py --model "$model" --device cuda --turns halt --warmup-len 64 \
    --vllm-python "$work/python" --hf-python "$work/python" "${engines[@]}" --out "${OUT:-comparison}" "$@"
