#!/bin/sh
# The CIFAR-10 study of nbs/experiments/cifar10.ipynb, restartable: the same command goes on where it was. Some two hours on two cores.
#   sh scripts/cifar_study.sh DIR        DIR: CIFAR-10 as train/CLASS/*.jpg and test/CLASS/*.jpg
# More of everything (a GPU, or some days): add e.g. --train-images 5000 --test-images 1000 --fp-epochs 60 --epochs 30; see python scripts/cifar_study.py --help
set -eu
data=${1:?give the folder of CIFAR-10: sh scripts/cifar_study.sh DIR}; shift
cd "$(dirname "$0")/.."
OMP_NUM_THREADS=1 exec .venv/bin/python scripts/cifar_study.py --data "$data" --out runs/cifar --train-images 800 --test-images 250 --fp-epochs 6 --epochs 2 --keep nbs/experiments/cifar10.json "$@"
