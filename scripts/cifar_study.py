"""The CIFAR-10 study: RepVGG, asymmetric and OREPA blocks, every method, at 32, 8, 4 and 2 bits, learning rates tuned for each on held-out training images.

    sh scripts/cifar_study.sh

Each line of work is what one `repq train` does and ends in a run folder; finished ones are kept and interrupted ones resumed, so the study goes on where it was.
Seeds come one after another: what is written down at any time are whole seeds and a part of the next. nbs/experiments/cifar10.ipynb reads what comes out.
"""
import argparse, os, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

NETWORKS = {'repvgg': dict(model='repvgg_a0_small'), 'ac': dict(model='ac_resnet18_tiny', image_size=24), 'orepa': dict(model='orepa_resnet18_tiny', image_size=24)}
TWINS = {'repvgg': 'repvgg', 'ac': 'resnet', 'orepa': 'resnet'} # their plain network; the ResNets have the same
FP_LRS, LRS, LOW_LRS = (.05, .15), (.003, .01, .03), (.0003, .001, .003)
NORM, NOISE = dict(norm_after=True), dict(norm_after=True, input_noise=True)
VARIANTS = { # name -> method, fields of the recipe, learning rates tried
    'plain': ('plain', {}, LRS), 'merged': ('merged', {}, LOW_LRS), 'merged+norm': ('merged', NORM, LRS),
    **{m: (m, {}, LRS) for m in ('repq-bn', 'repq-bnest', 'repq-bncorrected', 'repq-bnsample')},
    'repq-bn+norm': ('repq-bn', NORM, LRS), 'repq-bnest+norm': ('repq-bnest', NORM, LRS), 'repq-bn+norm+noise': ('repq-bn', NOISE, LRS), 'repq-bnest+norm+noise': ('repq-bnest', NOISE, LRS)}
BOUNDED = 'plain', 'merged+norm', 'repq-bn+norm+noise', 'repq-bnest+norm+noise' # at 2 bits with bounded steps as well, at the same rates
OREPA = {'merged': ('merged', {}, LRS), 'repq': ('repq', {}, LRS)} # batch norms are after its layers anyway
SHORT = {8: 4} # bits -> whose learning rates they take


def jobs_of(net):
    "The quantized variants to be trained for a network"
    return OREPA if net == 'orepa' else VARIANTS

def subset(source, out, train, test):
    "An ImageFolder tree with the first `train` and `test` images of each class, links to those in `source`"
    for split, n in ('train', train), ('test', test):
        for c in sorted(p for p in (source/split).iterdir() if p.is_dir()):
            (out/split/c.name).mkdir(parents=True, exist_ok=True)
            for f in sorted(c.iterdir())[:n]:
                if not (new := out/split/c.name/f.name).exists(): new.symlink_to(f.resolve())
    return out

def quiet():
    import torch
    torch.set_num_threads(1)
    from repq.cli import keep_freed_memory
    keep_freed_memory()

def run(out, net, method, bits, init, kw):
    "Train a run folder, unless it is there; its accuracy, 0 where the loss does not stay finite: its folder then ends in .part and holds `diverged`"
    from repq import recipes, runs
    recipe, diverged = recipes.get_recipe(method=method, weight_bits=bits, **NETWORKS[net], **kw), out.with_name(f'{out.name}.part')/'diverged'
    if diverged.exists(): return 0.
    try: row = runs.train(recipe, out, init, on_epoch=lambda *a: None, timing=0, resume=True)
    except FloatingPointError as e: diverged.write_text(f'{e}\n'); return 0.
    print(f'{out.name:36} lr {recipe.lr:<7g} {row["accuracy"]:.2%}  {row["seconds"]:.0f} s', flush=True)
    return row['accuracy']


class Study:
    def __init__(self, args, pool): self.args, self.pool, self.lr = args, pool, {}

    def run(self, name, net, method, lr, epochs, seed, bits=32, init=None, **kw):
        kw = dict(data=str(self.args.out/'data'), lr=lr, epochs=epochs, batch_size=self.args.batch_size, seed=seed, **kw)
        return self.pool.submit(run, self.args.out/name, net, method, bits, init and self.args.out/init, kw)

    def best(self, tried): # key -> {lr: future}
        "The learning rate of the highest accuracy, the lower one of equals"
        for k, runs in tried.items(): self.lr[k] = max(runs, key=lambda lr: (runs[lr].result(), -lr))

    def full_precision(self, seed, prefix='', lrs=lambda k: None, **kw):
        "Stage one of every network: key -> {lr: future}"
        nets = {**{f'{n}-blocks': (n, 'repq' if n == 'orepa' else 'repq-bn') for n in NETWORKS}, **{f'{TWINS[n]}-plain': (n, 'plain') for n in ('repvgg', 'ac')}}
        return {k: {lr: self.run(f'{prefix}{k}-fp-lr{lr:g}-s{seed}' if prefix else f'{k}-fp-s{seed}', n, m, lr, self.args.fp_epochs, seed, **kw) for lr in lrs(k)} for k, (n, m) in nets.items()}

    def start(self, net, method, seed, tuned=False):
        k = f'{TWINS[net]}-plain' if method == 'plain' else f'{net}-blocks'
        return f'tune-{k}-fp-lr{self.lr[k]:g}-s{seed}' if tuned else f'{k}-fp-s{seed}'

    def tune(self, bits, lrs):
        "One epoch of every variant at each of `lrs(key, its own)`, validated on training images that no stage has seen; where the best is the least or the greatest, one more beyond it"
        todo = {(n, v, bits): o for n in NETWORKS for v, o in jobs_of(n).items()}
        def job(key, lr):
            (n, v, _), (m, fields, _) = key, todo[key]
            return self.run(f'tune-{n}-{v}-w{bits}-lr{lr:g}', n, m, lr, self.args.tune_epochs, 100, bits, self.start(n, m, 100, True), valid=.1, **fields)
        tried = {k: {lr: job(k, lr) for lr in lrs(k[:2], own)} for k, (_, _, own) in todo.items()}
        self.best(tried)
        for k, runs in tried.items():
            if self.lr[k] in (ends := (min(runs), max(runs))): runs |= {lr: job(k, lr) for lr in [float(f'{self.lr[k]*(3.2 if self.lr[k] == ends[1] else 1/3.2):.1g}')]}
        self.best(tried)

    def quantized(self, seed):
        def job(n, v, b, more='', **kw):
            m, fields, _ = jobs_of(n)[v]
            return self.run(f'{n}-{v}{more}-w{b}-s{seed}', n, m, self.lr[n, v, SHORT.get(b, b)], self.args.epochs, seed, b, self.start(n, m, seed), **fields, **kw)
        return [job(n, v, b) for b in self.args.bits for n in NETWORKS for v in jobs_of(n)] + \
               [job(n, v, 2, '+bound', bound_steps=True) for n in ('repvgg', 'ac') for v in BOUNDED if 2 in self.args.bits]


def summary(out, command):
    "All finished rows in one value, for the notebook"
    from repq.runs import environment, read_json
    rows = {p.parent.name: read_json(p)[0] for p in sorted(out.glob('*/results.json'))}
    keep = ('method', 'weight_bits', 'seed', 'accuracy', 'merged_accuracy', 'lr', 'epochs', 'model', 'seconds', 'size_bytes', 'skipped_steps')
    rows = {n: {k: r[k] for k in keep} for n, r in rows.items()}
    count = lambda s: len(list((out/'data'/s).glob('*/*')))
    diverged = sorted(p.parent.name.removesuffix('.part') for p in out.glob('*.part/diverged'))
    return dict(command=command, environment={**environment(), 'threads': 1}, images=dict(train=count('train'), test=count('test')),
                diverged=diverged,
                rows={n: r for n, r in rows.items() if not n.startswith('tune')}, tuning={n: dict(lr=r['lr'], accuracy=r['accuracy']) for n, r in rows.items() if n.startswith('tune')})


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--data', type=Path, required=True, help='CIFAR-10 as an ImageFolder tree, train/CLASS/*.jpg and test/')
    p.add_argument('--out', type=Path, default=Path('runs/cifar'), help='folder of the runs')
    p.add_argument('--train-images', type=int, default=5000, help='of each class')
    p.add_argument('--test-images', type=int, default=1000, help='of each class')
    p.add_argument('--bits', type=int, nargs='+', default=[4, 2, 8])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--fp-epochs', type=int, default=20)
    p.add_argument('--epochs', type=int, default=8, help='of the quantized stage')
    p.add_argument('--tune-epochs', type=int, default=1, help='of every tuning run of the quantized stage')
    p.add_argument('--batch-size', type=int, default=64)
    p.add_argument('--jobs', type=int, default=os.cpu_count(), help='runs at a time, one thread each')
    p.add_argument('--keep', type=Path, help='write all rows to this JSON file, after each seed')
    args = p.parse_args()
    if not (args.data/'train').is_dir(): p.error(f'{args.data}/train is no folder: give CIFAR-10 as an ImageFolder tree')
    subset(args.data, args.out/'data', args.train_images, args.test_images)
    command = 'python scripts/cifar_study.py ' + ' '.join('DIR' if a == str(args.data) else a for a in sys.argv[1:])
    with ProcessPoolExecutor(args.jobs, initializer=quiet) as pool:
        study = Study(args, pool)
        study.best(study.full_precision(100, 'tune-', lambda k: FP_LRS, valid=.1))
        study.tune(4, lambda key, own: own)
        study.tune(2, lambda key, own: (study.lr[*key, 4], study.lr[*key, 4]/4))
        for seed in args.seeds:
            for runs in study.full_precision(seed, lrs=lambda k: (study.lr[k],)).values(): [f.result() for f in runs.values()]
            for f in study.quantized(seed): f.result()
            if args.keep:
                from repq.runs import write_json
                write_json(args.keep, summary(args.out, command))


if __name__ == '__main__': main()
