"""The CIFAR-10 study: every method on a deep plain-style network, learning rates tuned per method on held-out training images.

    OMP_NUM_THREADS=1 python scripts/cifar10_study.py --data cifar10 --out runs/cifar10 --keep nbs/experiments/cifar10.json

Each line of work is one `repq train`; finished ones are kept, so an interrupted study goes on where it was. nbs/experiments/cifar10.ipynb reads what comes out.
"""
import argparse, json, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FULL_PRECISION = {'plain': (.1, .3), 'repq-bn': (.1, .3)}                     # method: learning rates tried
QUANTIZED = {m: (.005, .02) for m in ('plain', 'repq-bn', 'repq-bnest', 'repq-bnsample')} | {'merged': (.0005, .002, .006, .02)}


def train(args, name, method, lr, epochs, seed, bits=32, init=None, valid=None):
    "One `repq train` into args.out/name, unless it is there; its accuracy"
    out = args.out/name
    if not out.exists():
        cmd = [sys.executable, '-c', 'from repq.cli import main; main()', 'train', args.model, '--data', args.data, '--method', method, '--weight-bits', bits, '--lr', lr,
               '--epochs', epochs, '--seed', seed, '--timing', 0, '--out', out]
        cmd += ['--init', args.out/init] if init else []
        cmd += ['--valid', valid] if valid else []
        with open(f'{out}.log', 'w') as log: p = subprocess.run(list(map(str, cmd)), stdout=log, stderr=subprocess.STDOUT)
        if p.returncode: raise SystemExit(f'{name} failed: see {out}.log')
    acc = json.loads((out/'results.json').read_text())[0]['accuracy']
    print(f'{name:32} lr {lr:<7g} seed {seed}  {acc:.2%}', flush=True)
    return acc


def statistics(args, name):
    "How far the estimates are from the truth in a trained network: V / V_exact per layer and branch, medians over channels"
    import torch
    from repq.data import get_dls
    from repq.blocks import Block
    from repq.plots import branch_statistics
    from repq.runs import load_run
    _, model, info = load_run(args.out/name)
    x, rows = get_dls(args.data, bs=128, augment=False, seed=0, normalize=info['stats'], device='cpu').one_batch()[0], []
    def note(layer, inputs):
        for bn, stats in branch_statistics(layer, inputs[0]).items():
            rows.append(dict(layer=names[layer], branch=bn, **{k: (v[1]/stats['exact'][1]).median().item() for k, v in stats.items() if k != 'exact'}))
    names = {m: n for n, m in model.named_modules() if isinstance(m, Block)}
    hooks = [m.register_forward_pre_hook(note) for m in names]
    with torch.no_grad(): model.eval()(x)
    for h in hooks: h.remove()
    return rows


def timing(args, bits, rounds=12):
    "Step time of every method relative to plain, the models taking turns on one thread"
    import torch
    from repq.runs import load_run, step_times
    torch.set_num_threads(1)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    res = {}
    for stage, runs in {'full-precision': {m: f'fp-{m}-s{args.seeds[0]}' for m in FULL_PRECISION}, **{f'{b} bits': {m: f'{m}-w{b}-s{args.seeds[0]}' for m in QUANTIZED} for b in bits}}.items():
        times = step_times({m: load_run(args.out/r)[1] for m, r in runs.items()}, x, y, rounds)
        res[stage] = {m: sorted(a/b for a, b in zip(t, times['plain'])) for m, t in times.items()}
    return res


def summary(args):
    "All rows, curves and tuning results in one file, for the notebook"
    from repq.runs import environment, read_history
    runs = sorted(p.parent for p in args.out.glob('*/results.json'))
    rows = {r.name: json.loads((r/'results.json').read_text())[0] for r in runs}
    return dict(command=' '.join(['python scripts/cifar10_study.py', *sys.argv[1:]]), environment=environment(), model=args.model, rows={n: r for n, r in rows.items() if not n.startswith('tune')},
                tuning={n: dict(lr=r['lr'], accuracy=r['accuracy']) for n, r in rows.items() if n.startswith('tune')},
                histories={r.name: read_history(r) for r in runs if not r.name.startswith('tune')},
                statistics=statistics(args, f'fp-repq-bn-s{args.seeds[0]}'), timing=timing(args, args.bits))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', default='cifar10', help='ImageFolder tree or a name')
    p.add_argument('--out', type=Path, default=Path('runs/cifar10'))
    p.add_argument('--model', default='repvgg_a0_small')
    p.add_argument('--bits', type=int, nargs='+', default=[4])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    p.add_argument('--fp-epochs', type=int, default=4)
    p.add_argument('--epochs', type=int, default=3, help='of the quantized stage')
    p.add_argument('--tune-epochs', type=int, default=1, help='of every tuning run')
    p.add_argument('--jobs', type=int, default=2, help='runs at a time')
    p.add_argument('--keep', type=Path, help='write a summary of everything to this JSON file')
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        def each(jobs): return list(pool.map(lambda j: train(args, **j), jobs))
        def best(tried):
            accs = each([dict(name=f'tune-{k}-{lr:g}', lr=lr, **kw) for k, lrs, kw in tried for lr in lrs])
            it = iter(accs)
            return {k: max((next(it), -lr) for lr in lrs)[1]*-1 for k, lrs, _ in tried}
        lr = best([(f'fp-{m}', lrs, dict(method=m, epochs=args.tune_epochs, seed=100, valid=.1)) for m, lrs in FULL_PRECISION.items()])
        each([dict(name=f'fp-{m}-s{s}', method=m, lr=lr[f'fp-{m}'], epochs=args.fp_epochs, seed=s) for s in args.seeds for m in FULL_PRECISION])
        init = lambda m: 'plain' if m == 'plain' else 'repq-bn'
        # the tuning of the quantized stage starts from networks that have not seen the images held out
        each([dict(name=f'tune-fp-{m}', method=m, lr=lr[f'fp-{m}'], epochs=args.fp_epochs, seed=100, valid=.1) for m in FULL_PRECISION])
        for b in args.bits:
            lr_q = best([(f'{m}-w{b}', lrs, dict(method=m, epochs=args.tune_epochs, seed=100, bits=b, valid=.1, init=f'tune-fp-{init(m)}')) for m, lrs in QUANTIZED.items()])
            each([dict(name=f'{m}-w{b}-s{s}', method=m, lr=lr_q[f'{m}-w{b}'], epochs=args.epochs, seed=s, bits=b, init=f'fp-{init(m)}-s{s}') for s in args.seeds for m in QUANTIZED])
    if args.keep: args.keep.write_text(json.dumps(summary(args), indent=1))


if __name__ == '__main__': main()
