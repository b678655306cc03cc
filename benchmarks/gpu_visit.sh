#!/bin/bash
# All that is worth knowing of lorakit on a GPU, in less than ten minutes: tests, the table of modes, where the time goes.
#
#     bash benchmarks/gpu_visit.sh            # on the machine with the GPU; results are printed and in $OUT
#     TINY=1 bash benchmarks/gpu_visit.sh     # a tiny model and few steps, to try the script on any machine
#
# What a machine without network lacks is installed from wheels in the folder .gpu, if there are any:
#
#     python -m pip download --no-deps --only-binary=:all: -d .gpu diffusers cattrs tomlkit
#     python -m pip wheel --no-deps -w .gpu .
set -u
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OUT=${OUT:-$(mktemp -d)}
work=$(mktemp -d) began=$SECONDS sizes=() steps=20
best=("floor bf16 graphs" "bf16 graphs") large=(--model sdxl --size 1024) batch=16
rows=(float32 "floor bf16" bf16 "floor bf16 graphs" "bf16 graphs" "bf16 auto" "bf16 graphs channels_last"
    "bf16 graphs flash" "bf16 recomputed graphs" "bf16 nf4" "bf16 streamed recomputed")
if [ "${TINY:-}" ]; then
    sizes=(--model tiny --size 64) large=(--model tiny-sdxl --size 64) steps=2 batch=2
    rows=(float32 "floor bf16" bf16 "bf16 graphs") best=("floor bf16" bf16)
fi
title() { echo "=== $((SECONDS - began)) s: $*"; }
left() { echo $((580 - SECONDS + began)); }
modes() {
    timeout "$(left)" python3 benchmarks/modes.py --work "$work" --steps $steps "$@" 2>&1 |
        grep -v "^ \|warn" | tee -a "$OUT/modes.md"
}

ls .gpu/*.whl > /dev/null 2>&1 && python3 -m pip install -q --no-deps --no-index .gpu/*.whl 2>&1 | tail -2
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -c "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'cuDNN', torch.backends.cudnn.version())"
if [ ! "${TINY:-}" ]; then
    title models
    make() { timeout 180 python3 benchmarks/make_model.py "$work/$1.safetensors" --dtype bf16 --architecture "$2"; }
    { make model sd15 && make sdxl sdxl; } > "$OUT/make.log" 2>&1 &
    title tests
    timeout 170 python3 -m pytest -q -n 6 -p no:cacheprovider -m "not slow" -k cuda tests/training/test_cuda_graphs.py \
        tests/attention tests/models/test_streaming.py tests/data/test_batches.py tests/data/test_encoding.py 2>&1 |
        tail -30 | tee "$OUT/tests.log"
    wait
fi
title modes
modes "${sizes[@]}" --only "${rows[@]}"
title breakdown
for graphs in false auto; do
    timeout 60 python3 benchmarks/breakdown.py --work "$work" --steps $steps training.mixed_precision=auto \
        training.cuda_graphs=$graphs 2>&1 | tail -40 | tee "$OUT/breakdown_graphs_$graphs.txt"
done
title batches
modes "${sizes[@]}" --batch $batch --only "${best[@]}"
title SDXL
modes "${large[@]}" --only "${best[@]}"
title compiling
[ ! "${TINY:-}" ] && [ "$(left)" -gt 100 ] && modes --only float32 "bf16 compile graphs channels_last"
title "done: $OUT"
