"""What recipes give as they are: small networks on digits at 4, 3 and 2 bits, each method with its default settings and, below 4 bits, as published.

    python scripts/digits_study.py --out runs/digits --keep nbs/experiments/digits.json

Nothing is tuned: it shows what `repq train MODEL --weight-bits 2` does for whoever calls it. The same command goes on where it was.
"""
from pathlib import Path
from repq.cli import keep_freed_memory
from repq.recipes import get_recipe
from repq.studies import Job, Study, command_line, keep, study_parser, study_results, study_table

NETWORKS = {'repvgg_a0_tiny': 'repq-bnest', 'ac_resnet18_tiny': 'repq-bnest', 'mobileone_s0_tiny': 'repq-bnest',
            'orepa_resnet18_tiny': 'repq'} # name -> RepQ's method for it


def full_precision(model, blocks:bool, seed) -> Job:
    "Stage one, of the blocks or of plain convolutions"
    method = NETWORKS[model] if blocks else 'plain'
    return Job(f'{model}-{"blocks" if blocks else "plain"}-s{seed}', get_recipe(model, method, seed=seed))

def quantized(model, method, bits, seed, as_published) -> Job:
    "Stage two"
    name = f'{model}-{method}{"-published" if as_published else ""}-w{bits}-s{seed}'
    start = full_precision(model, method != 'plain', seed).name
    return Job(name, get_recipe(model, method, bits, as_published=as_published, seed=seed), start)

def jobs_of(model, bits, seed) -> list:
    "Plain, merged and RepQ, and what the paper has where recipes add something"
    own = 'merged', NETWORKS[model]
    jobs = [quantized(model, m, bits, seed, False) for m in ('plain', *own)]
    published = [quantized(model, m, bits, seed, True) for m in own]
    return jobs + [p for p, j in zip(published, jobs[1:]) if p.recipe != j.recipe]

def main():
    p = study_parser(__doc__.splitlines()[0], out=Path('runs/digits'), bits=[2, 3, 4], jobs=2)
    args = p.parse_args()
    def done(): args.keep and keep(args.keep, study_results(args.out, command_line('scripts/digits_study.py')))
    with Study(args.out, args.jobs, keep_freed_memory) as study:
        for seed in args.seeds:
            study.run([full_precision(n, blocks, seed) for n in NETWORKS for blocks in (True, False)], done)
            study.run([j for bits in args.bits for n in NETWORKS for j in jobs_of(n, bits, seed)], done)
    print(study_table(args.out))


if __name__ == '__main__': main()
