# source scripts/gpu/environment.sh WHEELS…
#
# Makes the checkout importable as `microvllm` on a machine that has torch but no network: installs the
# wheels of the folders WHEELS (scripts/gpu/wheels.py downloads them, where there is a network) beside torch,
# and links the checkout under its package name, beside its metadata, where its version stands. The folder `site`
# that has all of it stays for the next time, and for what still runs.
files=()
for folder in "$@"; do files+=("$folder"/*.whl); done
site=${TMPDIR:-/tmp}/microvllm-site-$UID-$({ pwd; ls -l --time-style=+ "${files[@]}"; } | cksum | tr ' ' -)
if [ ! -e "$site/.complete" ]; then
    mkdir -p "$site"
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "${files[@]}"
    ln -sfn "$(pwd)" "$site/microvllm"
    python3 -c 'from setuptools import setup; setup()' --quiet egg_info --egg-base "$site"
    touch "$site/.complete"
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
