#!/usr/bin/env bash
# scripts/gpu/compare.sh VLLM CONFIGS WHEELS…
#
# This engine and vLLM side by side on one GPU, on a machine with torch but perhaps no network. VLLM is a
# folder that vLLM is installed in (pip install --target), or one that holds its wheels and, in pieces, a tar.xz
# of what is no wheel (vllm.part.*). Installs the wheels of the folders WHEELS for us, writes a random checkpoint
# of each model of CONFIGS (their config.json and so on; a tokenizer.json there or beside it), drives both
# engines in turn with vLLM's own client, and prints one table. Takes some 15 minutes. $OUT, or the folder of the
# logs, gets compare.json; a row that is in it already is not measured again. ROWS="7b-1 …" measures only those.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: scripts/gpu/compare.sh VLLM CONFIGS WHEELS…" >&2; exit 2; }
parts=$(realpath "$1") configs=$(realpath "$2")
shift 2
mapfile -t wheels < <(realpath "$@")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=${TMPDIR:-/tmp}/microvllm-compare
vllm=$work/vllm
result=${OUT:-$work}/compare.json
mkdir -p "$vllm"

compare() {
    python3 scripts/gpu/compare.py "$@" --folder "$work" --site "$vllm"
}

source scripts/gpu/environment.sh "${wheels[@]}"
trap 'compare stop || true; rm -rf "$site"' EXIT
source scripts/gpu/vllm.sh "$parts" "$vllm"

# measure ENGINES -- ROWS: only rows that are wanted, and engines only for them.
measure() {
    local engines=() rows=() row
    while [ "$1" != -- ]; do
        engines+=("$1")
        shift
    done
    shift
    for row in "$@"; do
        [[ " ${ROWS:-$*} " == *" $row "* ]] && rows+=("$row")
    done
    [ "${#rows[@]}" -gt 0 ] || return 0
    compare prepare --configs "$configs" $(printf '%s\n' "${engines[@]#*:}" | sort -u)
    compare start "${engines[@]}" # all at once: their start takes minutes
    compare measure "${rows[@]}" --out "$result"
    compare stop "${engines[@]}"
}

measure {vllm,microvllm}:{qwen3-0.6b,qwen2.5-0.5b} -- 0.6b-1 0.6b-256 0.5b-256
measure {vllm,microvllm}-offline:qwen3-0.6b -- 0.6b-offline
measure {vllm,microvllm}:qwen2-7b -- 7b-1 7b-35
python3 scripts/gpu/compare.py table "$result" | tee "${result%.json}.md"
