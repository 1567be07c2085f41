#!/usr/bin/env bash
# Everything that needs a GPU, in one call of counted minutes; see bench/gpu_session.py.
#
#     bench/on_gpu.sh [--budget SECONDS] [--only SECTION,...]   results in bench/results/gpu-<card>.json
#     bench/on_gpu.sh --rehearse                                each section at tiny sizes, without a GPU
#     OUT=folder bench/on_gpu.sh                                results there, going on from those in bench/results/
#
# Installs nothing: needs a python3 of 3.11 or later with torch, triton, transformers, rich and typer, and pytest,
# pytest-xdist and hypothesis for the tests. Kernels that `make gpu-cache` compiled beforehand are used where they fit.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-bench/results}")
python=${PYTHON:-python3}
mkdir -p "$out" build
# A folder of this call alone: another call at the same time must not take the sources away from under it.
package=$(mktemp -d build/gpu.XXXXXX)
trap 'rm -rf "$package"' EXIT
cp -r rewriter "$package/"
cp -r kernels passes export "$package/rewriter/"
if [ "$out" != "$(realpath bench/results)" ]; then cp -n bench/results/gpu-*.json "$out/" 2>/dev/null || true; fi
export PYTHONPATH=$PWD/$package:$PWD/bench
case " $* " in
*" --rehearse "*) export TRITON_INTERPRET=1 ;;
*)
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton-cache}
    "$python" -P -c 'import gpu_cache, os, pathlib
print("compiled beforehand:", gpu_cache.install(gpu_cache.FOLDER, pathlib.Path(os.environ["TRITON_CACHE_DIR"])), flush=True)'
    ;;
esac
# -P: the package and not the folder of the same name here.
"$python" -P bench/gpu_session.py --out "$out" "$@"
