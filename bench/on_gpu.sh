#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the suite and the tests, then the launch table, then the timings.
#
#     bench/on_gpu.sh                results in bench/results/
#     OUT=folder bench/on_gpu.sh     results there
#
# Installs nothing: needs a python3 of 3.11 or later with torch, triton, transformers, rich and typer, and pytest,
# pytest-xdist and hypothesis for the tests; nearly all their time is Triton's compiler, so more CPU cores help.
# The table that is tuned is used for the timings and copied to the results; put it in kernels/gpu/ to keep it.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-bench/results}")
python=${PYTHON:-python3}
package=build/gpu
mkdir -p "$out"
rm -rf "$package"
mkdir -p "$package"
cp -r rewriter "$package/"
cp -r kernels passes export "$package/rewriter/"
export PYTHONPATH=$PWD/$package
failed=0
# -P: the package and not the folder of the same name here.
"$python" -P -m rewriter.cli verify --device cuda --examples 20 --junit "$out/verify-cuda.xml" | tee "$out/verify-cuda.txt" || failed=1
"$python" -P -m pytest -q -n auto -p no:cacheprovider tests/rewriter/test_on_gpu.py tests/kernels \
    --ignore tests/kernels/gpu/test_compiled.py | tail -20 || failed=1
"$python" bench/tune.py && cp "$package/rewriter/kernels/gpu/launch_table.json" "$out/launch_table.json" || failed=1
"$python" bench/attention.py --device cuda --out "$out/attention-cuda.json" || failed=1
exit $failed
