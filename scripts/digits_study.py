"""What recipes give as they are: small networks on digits at 8 to 2 bits, each method with its default settings;
and what is tried beside them: as published, a teacher, progressive bits, twice the epochs, no training.

    python scripts/digits_study.py --out runs/digits --keep nbs/experiments/digits.json

Nothing is tuned: it shows what `repq train MODEL --weight-bits 2` does for whoever calls it. The same command goes on where it was.
Compute: a run takes 5 to 10 seconds of a processor of 2024; a seed has some 100.
"""
from pathlib import Path
from repq.cli import keep_freed_memory
from repq.deployment import post_training
from repq.recipes import get_recipe
from repq.studies import Job, Study, command_line, keep, study_parser, study_results

NETWORKS = {'repvgg_a0_tiny': 'repq-bnest', 'ac_resnet18_tiny': 'repq-bnest', 'mobileone_s0_tiny': 'repq-bnest',
            'orepa_resnet18_tiny': 'repq'} # name -> RepQ's method for it


def full_precision(model, blocks:bool, seed) -> Job:
    "Stage one, of the blocks or of plain convolutions"
    method = NETWORKS[model] if blocks else 'plain'
    return Job(f'{model}-{"blocks" if blocks else "plain"}-s{seed}', get_recipe(model, method, seed=seed))

def quantized(model, method, bits, seed, more='', init=None, teacher=None, **fields) -> Job:
    "Stage two"
    init = init or full_precision(model, method != 'plain', seed).name
    return Job(f'{model}-{method}{more}-w{bits}-s{seed}', get_recipe(model, method, bits, seed=seed, **fields), init, teacher)

def as_recipes_are(model, bits, seed) -> list:
    "Plain, merged and RepQ, and plain with the grid that recipes give the others"
    jobs = [quantized(model, m, bits, seed) for m in ('plain', 'merged', NETWORKS[model])]
    return jobs + ([quantized(model, 'plain', bits, seed, '-centred', as_published=True, centred=True)] if bits < 4 else [])

def as_published(model, seed) -> list:
    "Where recipes add something"
    few = [(m, b) for b in (4, 2) for m in ('merged', NETWORKS[model])] + [('plain', 3), ('plain', 2)]
    return [quantized(model, m, b, seed, '-published', as_published=True) for m, b in few]

def tried(model, seed) -> list:
    "At 2 bits a teacher, steps from 4 bits, and as many epochs in one go"
    jobs, start = [], full_precision(model, True, seed).name
    for m in 'merged', NETWORKS[model]:
        jobs += [quantized(model, m, 2, seed, '-taught', teacher=start),
                 quantized(model, m, 2, seed, '-progressive', init=quantized(model, m, 4, seed).name),
                 quantized(model, m, 2, seed, '-long', epochs=2*get_recipe(model, m, 2).epochs)]
    return jobs

def without_training(folder, model, bits, seed):
    "Quantized without training, as `repq quantize --ptq` does it, and by MinError alone"
    start = folder/full_precision(model, True, seed).name
    for more, alone in ('', False), ('-published', True):
        out = folder/f'{model}-ptq{more}-w{bits}-s{seed}'
        if not out.exists(): post_training(start, out, bits, as_published=alone)

def main():
    p = study_parser(__doc__.splitlines()[0], out=Path('runs/digits'), bits=[2, 3, 4, 8], jobs=2)
    args = p.parse_args()
    command = command_line('scripts/digits_study.py', hidden=[args.out])
    def done(): args.keep and keep(args.keep, study_results(args.out, command))
    with Study(args.out, args.jobs, keep_freed_memory) as study:
        for seed in args.seeds:
            study.run([full_precision(n, blocks, seed) for n in NETWORKS for blocks in (True, False)], done)
            study.run([j for bits in args.bits for n in NETWORKS for j in as_recipes_are(n, bits, seed)], done)
            study.run([j for n in NETWORKS for j in as_published(n, seed) + tried(n, seed)], done)
            for n in NETWORKS:
                for bits in args.bits: without_training(args.out, n, bits, seed)
            done()
    print(f'{args.out}: each run is a folder; nbs/experiments/low_bits.ipynb has the table of what --keep writes')


if __name__ == '__main__': main()
