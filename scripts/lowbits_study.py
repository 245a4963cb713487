"""Do a penalty against oscillating weights, a lower rate for steps, or rates that follow transitions help at 3 and 2 bits? Small networks on digits, all else as recipes have it.

    python scripts/lowbits_study.py --out runs/lowbits --keep nbs/experiments/lowbits.json

Every run counts how often integers of weights change and change back. The same command goes on where it was.
"""
from itertools import product
from pathlib import Path
from digits_study import NETWORKS, full_precision, quantized
from repq.cli import keep_freed_memory
from repq.networks.schemas import COUNTED
from repq.studies import Study, command_line, finished, keep, study_parser, study_results
from repq.training.oscillation import read_oscillation
from repq.training.run_folders import read_history

MODELS = ('repvgg_a0_tiny', 'ac_resnet18_tiny')
VARIANTS = {'': {}, '-dampen0.01': dict(dampen=.01), '-dampen0.1': dict(dampen=.1), '-steps0.1': dict(step_lr=.1),
            '-transitions0.01': dict(transitions=.01)}


def variants(model, bits, seed) -> list:
    "Merged and RepQ, each as recipes have it and with one thing changed"
    return [quantized(model, m, bits, seed, more, oscillation=True, **fields)
            for m in ('merged', NETWORKS[model]) for more, fields in VARIANTS.items()]

def counted(out) -> dict:
    "Of each run that counted: its columns of the history by epoch, and its layers at the end"
    runs = {n: (read_history(out/n), read_oscillation(out/n)) for n in finished(out)}
    return {n: dict(epochs={k: [float(r[k]) for r in h] for k in COUNTED}, layers=layers)
            for n, (h, layers) in runs.items() if layers}

def main():
    p = study_parser(__doc__.splitlines()[0], out=Path('runs/lowbits'), bits=[2, 3], jobs=2)
    args = p.parse_args()
    command = command_line('scripts/lowbits_study.py', hidden=[args.out, args.keep])
    def done(): args.keep and keep(args.keep, study_results(args.out, command, counted=counted(args.out)))
    with Study(args.out, args.jobs, keep_freed_memory) as study:
        for bits, model, seed in product(args.bits, MODELS, args.seeds):
            study.run([full_precision(model, True, seed)], done)
            study.run(variants(model, bits, seed), done)
    print(f'{args.out}: each run is a folder; nbs/experiments/oscillation.ipynb has the tables of what --keep writes')


if __name__ == '__main__': main()
