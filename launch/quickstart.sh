#!/usr/bin/env bash
# The whole of SEED on the pictures that come with the package: trains tokenizer and language model,
# turns the held-out pictures into codes, evaluates, captions, draws. Ten to twenty minutes on two CPU cores.
#
#     bash launch/quickstart.sh [OUT]      results go to OUT (default: out)
#
# Started again with the same OUT, it goes on where it stopped. PYTHON picks the interpreter.
set -euo pipefail
mkdir -p "${1:-out}"
out=$(cd "${1:-out}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh requirements.txt
started=$(date +%s)

# Keep memory between steps: asking the kernel for it anew costs a quarter of a step's time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1

# A JAX device a core, up to the four that divide the batches: small layers do not fill the
# threads of one. Half as fast again on two cores. In program order, lest devices that are short of
# threads each wait for another's part of a sum.
cores=$(getconf _NPROCESSORS_ONLN)
devices=$((cores >= 4 ? 4 : cores >= 2 ? 2 : 1))
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
XLA_FLAGS+=" --xla_cpu_enable_concurrency_optimized_scheduler=false"

# Shows a command as a user would type it, and runs it.
run() {
    echo
    echo "\$ .venv/bin/python -m $*"
    .venv/bin/python -m "$@"
}

run seed_jax.train --config configs/tiny_causal_qformer.py --workdir "$out/causal_qformer"
run seed_jax.train --config configs/tiny_codebook.py --workdir "$out/codebook" \
    --config.init="$out/causal_qformer/model"
run seed_jax.train --config configs/tiny_seed_opt.py --workdir "$out/language_model" \
    --config.init="$out/codebook/model"
rm -rf "$out/tokenizer" "$out/seed_opt"
cp -r "$out/codebook/model" "$out/tokenizer"
cp -r "$out/language_model/model" "$out/seed_opt"

# Codes of an earlier model in the same folder would not be of this one.
rm -f "$out/codes.jsonl"
for split in style concept; do
    run seed_jax.tokenize --model "$out/tokenizer" --images embedded --split $split \
        --output "$out/codes.jsonl"
done
# A few pictures in every suite; figures of an earlier model would not be of this one.
run seed_jax.evaluate --model "$out/seed_opt" --suite all --data embedded --output "$out/results" \
    --overwrite
# Captions with as many tags as stage 1 draws on average.
run seed_jax.report --run "$out" --max-tags 4 --started "$started"
