#!/usr/bin/env bash
# scripts/gpu/test.sh WHEELS… [-- arguments of scripts/gpu/checks.py]
#
# On a machine with an NVIDIA GPU and torch, but perhaps no network: installs the wheels of the folders WHEELS
# beside torch, then tests the engine there, looks at its kernels with compute-sanitizer, times them, and
# prints one table. Exit status 1 if anything failed.
set -euo pipefail
folders=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    folders+=("$(realpath "$1")")
    shift
done
[ $# -eq 0 ] || shift
[ "${#folders[@]}" -gt 0 ] || { echo "usage: scripts/gpu/test.sh WHEELS… [-- arguments]" >&2; exit 2; }
arguments=("$@")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/gpu/environment.sh "${folders[@]}"
trap 'rm -rf "$site"' EXIT
python3 scripts/gpu/checks.py "${arguments[@]}"
