"""What recipes give as they are: small networks on digits at 4, 3 and 2 bits, each method
with its default settings and, below 4 bits, as published.

    python scripts/digits_study.py --out runs/digits --keep nbs/experiments/digits.json

Nothing is tuned: it shows what `repq train MODEL --weight-bits 2` does for whoever calls it. The same command goes on where it was.
"""
from pathlib import Path
from repq.cli import keep_freed_memory
from repq.recipes import get_recipe
from repq.studies import Job, Study, command_line, keep, study_parser, study_results

NETWORKS = {'repvgg_a0_tiny': 'repq-bnest', 'ac_resnet18_tiny': 'repq-bnest', 'mobileone_s0_tiny': 'repq-bnest',
            'orepa_resnet18_tiny': 'repq'} # name -> RepQ's method for it


def full_precision(model, blocks:bool, seed) -> Job:
    "Stage one, of the blocks or of plain convolutions"
    method = NETWORKS[model] if blocks else 'plain'
    return Job(f'{model}-{"blocks" if blocks else "plain"}-s{seed}', get_recipe(model, method, seed=seed))

def quantized(model, method, bits, seed, more='', **fields) -> Job:
    "Stage two"
    start = full_precision(model, method != 'plain', seed).name
    return Job(f'{model}-{method}{more}-w{bits}-s{seed}', get_recipe(model, method, bits, seed=seed, **fields), start)

def as_recipes_are(model, bits, seed) -> list:
    "Plain, merged and RepQ, and plain with the grid that recipes give the others"
    jobs = [quantized(model, m, bits, seed) for m in ('plain', 'merged', NETWORKS[model])]
    return jobs + [quantized(model, 'plain', bits, seed, '-centred', centred=True)]

def as_published(model, bits, seed) -> list:
    "The same where recipes add something"
    methods = ('merged', NETWORKS[model]) if bits < 4 else ()
    return [quantized(model, m, bits, seed, '-published', as_published=True) for m in methods]

def main():
    p = study_parser(__doc__.splitlines()[0], out=Path('runs/digits'), bits=[2, 3, 4], jobs=2)
    args = p.parse_args()
    command = command_line('scripts/digits_study.py', hidden=[args.out, args.keep])
    def done(): args.keep and keep(args.keep, study_results(args.out, command))
    with Study(args.out, args.jobs, keep_freed_memory) as study:
        for seed in args.seeds:
            study.run([full_precision(n, blocks, seed) for n in NETWORKS for blocks in (True, False)], done)
            study.run([j for bits in args.bits for n in NETWORKS for j in as_recipes_are(n, bits, seed)], done)
        study.run([j for seed in args.seeds for bits in args.bits for n in NETWORKS for j in as_published(n, bits, seed)], done)
    print(f'{args.out}: each run is a folder; nbs/experiments/converged.ipynb has the table of what --keep writes')


if __name__ == '__main__': main()
