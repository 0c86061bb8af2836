# source scripts/gpu/environment.sh WHEELS…
#
# Makes the checkout importable as `microvllm` on a machine that has torch but no network: installs the
# wheels of the folders WHEELS (made where there is a network: pip download --no-deps --python-version 3.12 …)
# beside torch, and links the checkout under its package name.
site=$(mktemp -d)
files=()
for folder in "$@"; do files+=("$folder"/*.whl); done
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "${files[@]}"
ln -s "$(pwd)" "$site/microvllm"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
