#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the suite and the kernels' tests, then the launch table, then the timings.
#
#     bench/on_gpu.sh                results in bench/results/
#     OUT=folder bench/on_gpu.sh     results there
#
# Installs nothing: needs a python3 with torch, triton, transformers, rich and typer, and pytest and hypothesis for the tests.
# The table that is tuned is used for the timings and copied to the results; put it in kernels/gpu/ to keep it.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
python=${PYTHON:-python3}
package=build/gpu
mkdir -p "$out"
rm -rf "$package"
mkdir -p "$package"
cp -r rewriter "$package/"
cp -r kernels passes "$package/rewriter/"
export PYTHONPATH=$PWD/$package
failed=0
"$python" -m rewriter.cli verify --device cuda --junit "$out/verify-cuda.xml" | tee "$out/verify-cuda.txt" || failed=1
"$python" -m pytest -q -p no:cacheprovider tests/kernels --ignore tests/kernels/gpu/test_compiled.py | tail -20 || failed=1
"$python" bench/tune.py && cp "$package/rewriter/kernels/gpu/launch_table.json" "$out/launch_table.json" || failed=1
"$python" bench/attention.py --device cuda --out "$out/attention-cuda.json" || failed=1
exit $failed
