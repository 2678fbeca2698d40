#!/usr/bin/env bash
# Builds the module under AddressSanitizer and UBSan into a temporary folder, and runs the fuzzer with it:
#   tests/sanitized.sh [arguments of tests/fuzzer.py]
# The sanitizers see torch's memory as well, which comes from malloc and posix_memalign.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
folder=${SANITIZED_FOLDER:-$(mktemp -d)}
[ -n "${SANITIZED_FOLDER:-}" ] || trap 'rm -rf "$folder"' EXIT

# A folder that is given is built into once.
if [ ! -e "$folder/lib" ]; then
  SIGNADAM_SANITIZE=address,undefined "$python" setup.py -q build --build-base "$folder/build"
  ln -sfn "$(dirname "$(dirname "$(find "$folder/build" -name '_C*.so' -path '*lib*' | head -n 1)")")" "$folder/lib"
fi

# Freed memory is kept apart for long; what C++ throws must be found in the libstdc++ that the sanitizers wrap.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS="detect_leaks=0:quarantine_size_mb=64:detect_stack_use_after_return=0:handle_segv=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"
"$python" tests/fuzzer.py --package "$(readlink -f "$folder/lib")" "$@"
