#!/usr/bin/env bash
# scripts/gpu/turns.sh BASE ROUNDS ARGUMENTS…
#
# Runs `python3 ARGUMENTS` in another checkout of this repository and in this one, in turns, ROUNDS times each.
# BASE is its folder, or an archive of it (git archive COMMIT | xz >base.tar.xz).
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: scripts/gpu/turns.sh BASE ROUNDS ARGUMENTS…" >&2; exit 2; }
base=$(realpath "$1") rounds=$2
shift 2
head=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -f "$base" ]; then
    mkdir "$work/base"
    tar -C "$work/base" -xf "$base"
    base=$work/base
fi
mkdir "$work/base-site" "$work/head-site"
ln -s "$base" "$work/base-site/microvllm"
ln -s "$head" "$work/head-site/microvllm"
for ((round = 1; round <= rounds; round++)); do
    for name in base head; do
        echo "== $name, round $round"
        cd "${!name}"
        PYTHONPATH="$work/$name-site${PYTHONPATH:+:$PYTHONPATH}" python3 "$@"
    done
done
