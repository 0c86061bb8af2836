#!/usr/bin/env bash
# scripts/gpu/test.sh WHEELS… [-- arguments of scripts/gpu/window.py]
#
# On a machine with NVIDIA GPUs and torch, but perhaps no network: installs the wheels of the folders WHEELS beside
# torch, then runs the jobs of scripts/gpu/jobs.yaml, those that need no other files if nothing else is said: tests,
# compute-sanitizer over every kernel, timings of kernels. Exit status 1 if anything failed.
set -euo pipefail
folders=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    folders+=("$(realpath "$1")")
    shift
done
[ $# -eq 0 ] || shift
[ "${#folders[@]}" -gt 0 ] || { echo "usage: scripts/gpu/test.sh WHEELS… [-- arguments]" >&2; exit 2; }
[ $# -gt 0 ] || set -- --only 'test-*' 'sanitize-*' 'time-*' --limit 3600
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/gpu/environment.sh "${folders[@]}"
exec python3 scripts/gpu/window.py "$@"
