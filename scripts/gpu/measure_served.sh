#!/usr/bin/env bash
# scripts/gpu/measure_served.sh MODEL_DIR [flags of serve]
#
# Starts the server on a free port, measures it with scripts/bench_serve.py at 1, 35 and 256 streams of
# 128 prompt and 500 output tokens, shows its graph counters, and ends it.
set -euo pipefail
model=$1
shift
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
log=$(mktemp)
started=$(date +%s.%N)
python3 -m microvllm.cli serve --model "$model" --host 127.0.0.1 --port "$port" --disable-uvicorn-access-log \
    "$@" >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" || true' EXIT
until curl -sf -o /dev/null "http://127.0.0.1:$port/health"; do
    kill -0 "$server" 2>/dev/null || { tail -30 "$log"; exit 1; }
    sleep 0.2
done
echo "ready after $(python3 -c "import time; print(round(time.time() - $started, 1))") s"
for streams in ${STREAMS:-1 35 256}; do
    python3 scripts/bench_serve.py "http://127.0.0.1:$port" --streams "$streams" --input-len 128 --output-len 500
done
curl -s "http://127.0.0.1:$port/metrics" | grep -E '^microvllm:|^vllm:prompt_tokens_total|^vllm:generation_tokens_total'
