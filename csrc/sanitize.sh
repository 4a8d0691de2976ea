#!/usr/bin/env bash
# Builds the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer and runs its tests
# (make sanitize):
#   csrc/sanitize.sh [python] [arguments of pytest]
# The interpreter is not instrumented, so libasan is preloaded; leaks are not looked for, since
# CPython and torch keep memory until the process ends.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
shift || true
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

read -r torch < <("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')
flags="-std=c++20 -O1 -g -fPIC -fvisibility=hidden -Wno-uninitialized
       -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
       -DTORCH_TARGET_VERSION=0x020a000000000000ULL -isystem $torch/include"
for source in csrc/*.cpp csrc/*/*.cpp; do
  ${CXX:-g++} $flags -c "$source" -o "$build/$(basename "$source" .cpp).o" &
done
wait
${CXX:-g++} -shared -fsanitize=address,undefined "$build"/*.o -o "$build/_cpp_sanitized.so" \
  -L"$torch/lib" -ltorch_cpu -ltorch -lc10

libasan=$(${CXX:-g++} -print-file-name=libasan.so)
libstdcxx=$(${CXX:-g++} -print-file-name=libstdc++.so)
VPS_CPP_LIBRARY="$build/_cpp_sanitized.so" LD_PRELOAD="$libasan:$libstdcxx" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" -m pytest -q -p no:cacheprovider tests/backends/test_csrc.py tests/algorithm/test_coupling.py "$@"
