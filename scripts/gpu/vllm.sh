# source scripts/gpu/vllm.sh VLLM SITE
#
# Sets `vllm` to a folder for PYTHONPATH that has vLLM: VLLM, if vLLM is installed in it (pip install --target);
# else SITE, after VLLM's wheels and, in pieces, a tar.xz of what is no wheel (vllm.part.*) went there.
parts=$(realpath "$1") vllm=$2
if [ -d "$parts/vllm" ]; then
    vllm=$parts
elif [ ! -e "$vllm/.complete" ]; then
    echo "Installing vLLM into $vllm"
    mkdir -p "$vllm"
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$vllm" "$parts"/*.whl
    if compgen -G "$parts/vllm.part.*" >/dev/null; then
        cat "$parts"/vllm.part.* | tar xJ -C "$vllm"
    fi
    touch "$vllm/.complete"
fi
