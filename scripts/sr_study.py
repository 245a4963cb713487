"""The super-resolution study: ECBSR-m4c8 ×2 by every method at 8, 4 and 2 bits, learning rates tuned per method on held-out training photographs.

    OMP_NUM_THREADS=1 python scripts/sr_study.py --data sr_train --benchmarks sr_test_x2 --out runs/sr --keep nbs/experiments/superres.json

Each line of work is one `repq train`; finished ones are kept, so an interrupted study goes on where it was. nbs/experiments/superres.ipynb reads what comes out.
"""
import argparse, json, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FULL_PRECISION = {'plain': (.002, .005, .01), 'repq': (.002, .005, .01)}  # method: learning rates tried
QUANTIZED = {m: (.0005, .002) for m in ('plain', 'merged', 'repq')}


def train(args, name, method, lr, epochs, seed, bits=32, init=None, benchmarks=None):
    "One `repq train` into args.out/name, unless it is there; its PSNR on the first benchmark"
    out = args.out/name
    if not out.exists():
        cmd = [sys.executable, '-c', 'from repq.cli import main; main()', 'train', 'ecbsr_m4c8', '--data', args.data, '--method', method, '--weight-bits', bits, '--lr', lr, '--epochs', epochs,
               '--iterations', args.iterations, '--batch-size', args.batch_size, '--crop', args.crop, '--seed', seed, '--timing', 0, '--out', out, '--schedule', 'cosine', '--set', 'sqr_mom=.99', '--set', 'eps=1e-5']
        cmd += ['--init', args.out/init] if init else []
        cmd += ['--benchmarks', benchmarks] if benchmarks else []
        with open(f'{out}.log', 'w') as log: p = subprocess.run(list(map(str, cmd)), stdout=log, stderr=subprocess.STDOUT)
        if p.returncode: raise SystemExit(f'{name} failed: see {out}.log')
    r = json.loads((out/'results.json').read_text())[0]
    print(f'{name:28} lr {lr:<7g} seed {seed}  ' + ', '.join(f'{n} {v:.2f}' for n, v in r['psnr'].items()) + f'  ({r["seconds"]:.0f} s)', flush=True)
    return next(iter(r['psnr'].values()))


def timing(args, rounds=12):
    "Step time of every method relative to plain, the models taking turns on one thread"
    import torch, torch.nn.functional as F
    from repq.recipes import build, get_recipe
    from repq.runs import load_run, step_times
    torch.set_num_threads(1)
    x, y = torch.rand(args.batch_size, 1, args.crop//2, args.crop//2)*219 + 16, torch.rand(args.batch_size, 1, args.crop, args.crop)*219 + 16
    s = args.seeds[0]
    stages = {'full precision': {m: load_run(args.out/f'fp-{m}-s{s}')[1] for m in FULL_PRECISION} | {'repq, branched': build(get_recipe('ecbsr_m4c8', 'repq', full_precision='branched'))},
              '4 bits': {m: load_run(args.out/f'{m}-w4-s{s}')[1] for m in QUANTIZED}}
    return {stage: {m: sorted(a/b for a, b in zip(t, times['plain'])) for m, t in times.items()} for stage, models in stages.items() if (times := step_times(models, x, y, rounds, F.l1_loss))}


def details(args, size=72):
    "A detail of one of scikit-image's photographs by every method at every width, first seed: grey levels and the whole photograph's PSNR"
    import torch
    from repq.runs import load_run
    from repq.superres import UNIT, bicubic, embedded_photos, load_pairs, psnr
    p = load_pairs([f for f in embedded_photos() if f[0] == 'camera'])[0]
    lr, hr = (t[None].float()/UNIT for t in (p.lr, p.hr))
    names = [f'fp-{m}' for m in FULL_PRECISION] + [f'{m}-w{b}' for b in args.bits for m in QUANTIZED]
    with torch.no_grad(): images = {'ground truth': hr, 'bicubic': bicubic(lr, hr.shape[-2:])} | {n: load_run(args.out/f'{n}-s{args.seeds[0]}')[1].eval()(lr) for n in names}
    top, left = 80, 190
    return {n: dict(psnr=psnr(i, hr) if n != 'ground truth' else None, image=i[0, 0, top:top + size, left:left + size].round().clamp(0, 255).int().tolist()) for n, i in images.items()}


def summary(args):
    "All rows, curves and tuning results in one file, for the notebook"
    from repq.runs import environment, read_history
    runs = sorted(p.parent for p in args.out.glob('*/results.json'))
    rows = {r.name: json.loads((r/'results.json').read_text())[0] for r in runs}
    return dict(command=' '.join(['python scripts/sr_study.py', *sys.argv[1:]]), environment=environment(), iterations=args.iterations, batch_size=args.batch_size, crop=args.crop, rows={n: r for n, r in rows.items() if not n.startswith('tune')},
                tuning={n: dict(lr=r['lr'], psnr=r['psnr']) for n, r in rows.items() if n.startswith('tune')}, histories={r.name: read_history(r) for r in runs if not r.name.startswith('tune')}, timing=timing(args), details=details(args))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', default='sr_train', help='folder of photographs, or DIV2K')
    p.add_argument('--benchmarks', default='sr_test_x2', help='folder of Set5, Set14, ...')
    p.add_argument('--out', type=Path, default=Path('runs/sr'))
    p.add_argument('--bits', type=int, nargs='+', default=[8, 4, 2])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--iterations', type=int, default=500, help='batches in an epoch')
    p.add_argument('--batch-size', type=int, default=16)
    p.add_argument('--crop', type=int, default=96)
    p.add_argument('--fp-epochs', type=int, default=6)
    p.add_argument('--epochs', type=int, default=3, help='of the quantized stage')
    p.add_argument('--tune-epochs', type=int, default=1, help='of every tuning run')
    p.add_argument('--jobs', type=int, default=2, help='runs at a time')
    p.add_argument('--keep', type=Path, help='write a summary of everything to this JSON file')
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        def each(jobs): return list(pool.map(lambda j: train(args, **j), jobs))
        def best(tried): # (name, rates, arguments of train): the rate with the best PSNR on held-out photographs
            scores = iter(each([dict(name=f'tune-{k}-{lr:g}', lr=lr, epochs=args.tune_epochs, seed=100, **kw) for k, lrs, kw in tried for lr in lrs]))
            return {k: max((next(scores), -lr) for lr in lrs)[1]*-1 for k, lrs, _ in tried}
        lr = best([(f'fp-{m}', lrs, dict(method=m)) for m, lrs in FULL_PRECISION.items()])
        # the tuning of the quantized stage starts from networks that have not seen the photographs held out
        each([dict(name=f'tune-fp-{m}', method=m, lr=lr[f'fp-{m}'], epochs=args.fp_epochs//2, seed=100) for m in FULL_PRECISION])
        each([dict(name=f'fp-{m}-s{s}', method=m, lr=lr[f'fp-{m}'], epochs=args.fp_epochs, seed=s, benchmarks=args.benchmarks) for s in args.seeds for m in FULL_PRECISION])
        init = lambda m: 'plain' if m == 'plain' else 'repq'
        lr = best([(f'{m}-w{b}', lrs, dict(method=m, bits=b, init=f'tune-fp-{init(m)}')) for b in args.bits for m, lrs in QUANTIZED.items()])
        each([dict(name=f'{m}-w{b}-s{s}', method=m, lr=lr[f'{m}-w{b}'], epochs=args.epochs, seed=s, bits=b, init=f'fp-{init(m)}-s{s}', benchmarks=args.benchmarks) for s in args.seeds for b in args.bits for m in QUANTIZED])
    if args.keep: args.keep.write_text(json.dumps(summary(args)))


if __name__ == '__main__': main()
