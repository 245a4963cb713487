#!/bin/sh
# What only a GPU can tell, for whoever has one for a quarter of an hour: sh scripts/gpu_session.sh OUT [PART...]
#   parts: tests      what is flagged cuda, against the CPU (with a processor's integer tests beside)
#          bench      repq bench train-step at 224 pixels: exact, estimated, sampled, OREPA; other people's quantizers
#          study      CIFAR-10 (CIFAR=folder with train/ and test/): python scripts/converged_study.py with STUDY's options
# Without parts: all of them. Each has a limit (TESTS=120, BENCH=90, STUDY_SECONDS=420 seconds) and is left with a word when it is over.
# Needs no network; packages come from where PYTHONPATH says. Nothing is lost when it is called again: a finished run of the study is kept.
# To try it on a CPU: DEVICE=cpu sh scripts/gpu_session.sh OUT tests
set -u
out=${1:?give a folder for what comes out: sh scripts/gpu_session.sh OUT}; shift
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
parts=${*:-tests bench study}
device=${DEVICE:-cuda}
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore

timed() { # name, seconds, command...
    name=$1 limit=$2; shift 2
    began=$(date +%s)
    timeout -s INT -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
    rc=$?
    took=$(($(date +%s) - began))
    case $rc in
        0) echo "$name: $took s" ;;
        124|130|137) echo "$name: over after $limit s, unfinished" ;;
        *) echo "$name: failed ($rc) after $took s"; tail -n 12 "$out/$name.log" ;;
    esac
}

for part in $parts; do case $part in
    tests)
        REPQ_TEST_DEVICE=$device timed tests "${TESTS:-120}" "$python" -m pytest -q -p no:cacheprovider ${WORKERS:+-n $WORKERS} tests/test_cuda.py
        tail -n 15 "$out/tests.log" ;;
    bench|bench_steps)
        for m in ac_resnet18 orepa_resnet18; do
            timed "steps-$m" "${BENCH:-90}" "$python" -m repq.cli bench train-step $m --device "$device" --rounds "${ROUNDS:-5}" --json "$out/steps-$m.json" --overwrite
            tail -n 20 "$out/steps-$m.log"
        done
        [ $part = bench ] && timed peers "${BENCH:-90}" "$python" -m repq.cli bench peers --device "$device" --batch-size 64 --json "$out/peers.json" --overwrite
        [ $part = bench ] && tail -n 20 "$out/peers.log" ;;
    study)
        [ -n "${CIFAR:-}" ] || { echo 'study: left out, CIFAR names no folder'; continue; }
        timed study "${STUDY_SECONDS:-420}" "$python" scripts/converged_study.py --data "$CIFAR" --out "$out/study" --keep "$out/converged.json" ${STUDY:-}
        tail -n 40 "$out/study.log" ;;
    *) echo "no part '$part': tests, bench or study"; exit 2 ;;
esac; done
