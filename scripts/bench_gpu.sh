#!/bin/sh
# Everything that `repq bench` measures of training, on one GPU, into one JSON file: sh scripts/bench_gpu.sh [FILE]
set -eu
out=${1:-bench_gpu.json}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("bench_gpu.sh needs a CUDA device; on a CPU: repq bench train-step")'
repq bench train-step ac_resnet18 orepa_resnet18 --device cuda --json "$dir/train-step.json"
repq bench peers --device cuda --batch-size 64 --json "$dir/peers.json"
repq bench scaling --device cuda --json "$dir/scaling.json"
python - "$dir" "$out" <<'PY'
import json, sys
from pathlib import Path
from repq.runs import write_json
folder, out = Path(sys.argv[1]), sys.argv[2]
write_json(out, {f.stem: json.loads(f.read_text()) for f in sorted(folder.glob('*.json'))})
print(f'written: {out}')
PY
