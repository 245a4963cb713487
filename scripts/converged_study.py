"""CIFAR-10 until accuracy stands: a RepVGG of 16 convolutions, or a network of your choice, on all 50,000 images, methods and what is added to them at 8 to 2 bits.

    python scripts/converged_study.py --data DIR --keep nbs/experiments/converged.json
    python scripts/converged_study.py --data DIR --model orepa_resnet18_small --fp-epochs 15 --out runs/orepa --keep nbs/experiments/converged_orepa.json

The same command goes on where it was: finished runs are kept, and their rows are in the JSON as soon as they are there.
Compute, for one thread of a processor that multiplies bf16: an epoch of the blocks takes .7 minutes in full precision, .9 quantized with
estimated statistics and 1.5 with exact ones; with 20 and 5 epochs that is 24 minutes a seed for stage one and 5 or 8 for each quantized run.
"""
import json, os
from functools import cache
from pathlib import Path
from torch import nn
from repq import surgery
from repq.cli import keep_freed_memory
from repq.deployment import training_images
from repq.models import create_model
from repq.networks.sites import norms_inside
from repq.recipes import get_recipe
from repq.runs import load_run
from repq.studies import Job, Study, command_line, finished, keep, study_parser, study_results, study_table
from repq.training.run_folders import replace_text
from repq.training.tasks import evaluate, task_of

NETWORK = dict(decouple_wd=False, precision='bf16')
STARTS = 'blocks', 'plain'
FP, QUANTIZED = dict(weight_decay=5e-4, warmup=.1), dict(weight_decay=1e-4)
FP_LRS, LRS, LOW_LRS = (.1, .3), (.01, .02, .04), (.003, .006, .012)
BEYOND = 2 # where the best of these is the least or the greatest, one this many times beyond is tried too
NORM = dict(norm_after=True)
BOUND = dict(bound_steps=True)
NOISE = dict(input_noise=True)
SAFE = NORM | BOUND | NOISE
CENTRED = dict(centred=True)
PEELED = CENTRED | dict(peel=True)
TAUGHT = '+taught' # by the full-precision run that it starts from
LONG, TIMES = '+long', 3 # as many times the epochs, at the same rate
VARIANTS = { # name -> method, fields of the recipe, learning rates tried, bits
    'plain': ('plain', {}, LRS, (8, 4, 3, 2)),
    'merged': ('merged', {}, LOW_LRS, (8, 4, 3, 2)),
    'merged+norm': ('merged', NORM, LRS, (8, 4, 3, 2)),
    'repq-bn': ('repq-bn', {}, LRS, (8, 4, 3, 2)),
    'repq-bnest': ('repq-bnest', {}, LRS, (8, 4, 3, 2)),
    'repq': ('repq', {}, LRS, (8, 4, 3, 2)),
    'plain+bound': ('plain', BOUND, LRS, (4, 3, 2)),
    'plain+centred': ('plain', CENTRED, LRS, (4, 3, 2)),
    'merged+norm+centred': ('merged', NORM | CENTRED, LRS, (4, 3, 2)),
    'repq-bnest+bound': ('repq-bnest', BOUND, LRS, (4, 3, 2)),
    'repq-bnest+bound+noise': ('repq-bnest', BOUND | NOISE, LRS, (4, 3, 2)),
    'repq-bn+safe': ('repq-bn', SAFE, LRS, (4, 3, 2)),
    'repq-bn+safe+centred': ('repq-bn', SAFE | CENTRED, LRS, (4, 3, 2)),
    'merged+norm+peeled': ('merged', NORM | PEELED, LRS, (4, 3, 2)),
    'merged+norm+peeled+bound': ('merged', NORM | PEELED | BOUND, LRS, (4, 3, 2)),
    'repq-bn+safe+peeled': ('repq-bn', SAFE | PEELED, LRS, (4, 3, 2)),
    'repq-bnest+safe+peeled': ('repq-bnest', SAFE | PEELED, LRS, (4, 3, 2)),
    'repq+peeled+bound': ('repq', PEELED | BOUND, LRS, (4, 3, 2))}
VARIANTS |= {v + more: VARIANTS[v] for v in ('plain+bound', 'plain+centred', 'merged+norm+peeled', 'merged+norm+peeled+bound', 'repq-bnest+safe+peeled') for more in (TAUGHT, LONG)}
LIKE = {8: 4, 3: 2} # bits -> whose learning rates they take
TUNING = 100        # the seed of tuning runs


class Converged:
    "The runs of the study"
    def __init__(self, args):
        self.args, self.lr = args, {} # (stage one) or (variant, bits) -> learning rate
        self.inside = bool(norms_inside(create_model(args.model)))
        self.starts = {'blocks': 'repq-bn' if self.inside else 'repq', 'plain': 'plain'} # stage one -> method

    def fits(self, variant):
        "Is a variant for the blocks of the network? Statistics are for norms inside"
        method = VARIANTS[variant][0]
        return not method.startswith('repq') or self.inside == (method != 'repq')

    def full_precision(self, key, lr, seed, epochs, **fields):
        a = self.args
        return get_recipe(a.model, self.starts[key], **NETWORK, **FP, data=str(a.data), lr=lr, epochs=epochs, batch_size=a.batch_size, seed=seed, **fields)

    def quantized(self, variant, bits, lr, epochs, seed, **fields):
        a, (method, own, *_) = self.args, VARIANTS[variant]
        return get_recipe(a.model, method, bits, as_published=True, **NETWORK, **QUANTIZED, **own, data=str(a.data), lr=lr, epochs=epochs, batch_size=a.batch_size, seed=seed, **fields)

    def tune_start(self, key, lr): return Job(f'tune-{key}-fp-lr{lr:g}', self.full_precision(key, lr, TUNING, self.args.tune_fp_epochs, valid=.1))

    def start(self, key, seed):
        lr = self.lr[key]
        return Job(f'{key}-fp-lr{lr:g}-s{seed}', self.full_precision(key, lr, seed, self.args.fp_epochs))

    def tune_variant(self, key, lr):
        "A short run of a variant, validated on training images that no stage has seen, with running statistics averaged anew"
        variant, bits = key
        start = start_of(variant)
        return self._job(f'tune-{variant}-w{bits}-lr{lr:g}', variant, f'tune-{start}-fp-lr{self.lr[start]:g}',
                         self.quantized(variant, bits, lr, self.args.tune_epochs, TUNING, valid=.1, reestimate=32))

    def variant(self, variant, bits, seed):
        lr, start, epochs = self.lr[rate_of(variant, bits)], start_of(variant), self.args.epochs*(TIMES if variant.endswith(LONG) else 1)
        return self._job(f'{variant}-w{bits}-lr{lr:g}-s{seed}', variant, f'{start}-fp-lr{self.lr[start]:g}-s{seed}',
                         self.quantized(variant, bits, lr, epochs, seed))

    def _job(self, name, variant, start, recipe):
        return Job(name, recipe, start, teacher=start if variant.endswith(TAUGHT) else None)


def averaged_before(folder) -> dict: # run -> accuracy
    "What `average_anew` has found so far"
    file = Path(folder)/'reestimated.json'
    return json.loads(file.read_text()) if file.exists() else {}

def average_anew(folder, batches=32):
    "Accuracies of quantized runs with running statistics averaged anew, as `reestimate` of recipes does it; kept beside them"
    res = averaged_before(folder)
    for name in finished(folder):
        if '-w' not in name or name in res or name.startswith('tune'): continue
        recipe, model, _ = load_run(Path(folder)/name)
        dls = task_of(recipe).data()
        surgery.calibrate(model, training_images(dls, batches))
        res[name] = evaluate(model, dls.valid)
        replace_text(Path(folder)/'reestimated.json', json.dumps(res, indent=1))

@cache
def kernel_sizes(run) -> list: # root mean squares, by layer
    "How large the merged kernels of a full-precision run are; those of 1×1 shortcuts left out"
    model = surgery.merge(load_run(run)[1], verbose=False)
    return [round(m.weight.square().mean().sqrt().item(), 5) for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]

def rate_of(variant, bits) -> tuple: # a variant and bits
    "Whose learning rate a run takes"
    return variant.removesuffix(LONG), LIKE.get(bits, bits)

def start_of(variant): return 'plain' if VARIANTS[variant][0] == 'plain' else 'blocks'

def main():
    p = study_parser(__doc__.splitlines()[0], out=Path('runs/converged'), bits=[4, 2, 3, 8], fp_epochs=20, epochs=5, batch_size=128, jobs=os.cpu_count())
    p.add_argument('--data', type=Path, required=True, help='CIFAR-10 as an ImageFolder tree, train/CLASS/*.jpg and test/')
    p.add_argument('--model', default='repvgg_b0_cifar', help='of `repq list`')
    p.add_argument('--fp-lrs', type=float, nargs='+', default=FP_LRS, help='learning rates of stage one to choose from')
    p.add_argument('--tune-fp-epochs', type=int, default=5, help='of the full-precision networks from which tuning runs start')
    p.add_argument('--full-precision-only', action='store_true', help='stop after stage one')
    p.add_argument('--tune-bits', type=int, nargs='*', choices=(2, 4), default=[4, 2], help='bits at which learning rates are tuned; 8 bits take those of 4, and 3 those of 2')
    p.add_argument('--lr', type=float, default=.02, help='the learning rate at other bits')
    p.add_argument('--only', nargs='+', choices=[*VARIANTS, *(f'{v}-w{b}' for v, (*_, bits) in VARIANTS.items() for b in bits)], metavar='VARIANT',
                   help='these variants, at all bits or at some, as plain merged+norm-w8; all that fit the network if left out')
    args = p.parse_args()
    if not (args.data/'train').is_dir(): p.error(f'{args.data}/train is no folder: give CIFAR-10 as an ImageFolder tree')
    runs = Converged(args)
    only = args.only or [v for v in VARIANTS if runs.fits(v)]
    misfits = [v for v in only if not runs.fits(v.partition('-w')[0])]
    if misfits: p.error(f'{" ".join(misfits)}: repq is for blocks without batch norms, repq-bn and repq-bnest are for blocks with them; {args.model} has them {"inside" if runs.inside else "after blocks"}')
    images = {split: len(list((args.data/split).glob('*/*'))) for split in ('train', 'test')}
    command = command_line('scripts/converged_study.py', hidden=[args.data, args.out])
    def done():
        if not args.keep: return
        sizes = {n: kernel_sizes(args.out/n) for n in finished(args.out) if n.startswith(tuple(f'{k}-fp-' for k in STARTS))}
        keep(args.keep, study_results(args.out, command, images=images, reestimated=averaged_before(args.out), kernels=sizes))
    with Study(args.out, args.jobs, keep_freed_memory) as study:
        tuned = len(args.fp_lrs) > 1
        if tuned: runs.lr |= study.tune(dict.fromkeys(STARTS, args.fp_lrs), runs.tune_start)
        else: runs.lr |= dict.fromkeys(STARTS, args.fp_lrs[0])
        study.run([runs.start(k, seed) for seed in args.seeds for k in STARTS], done)
        if not args.full_precision_only:
            wanted = [(v, b) for b in args.bits for v, (*_, bits) in VARIANTS.items() if b in bits and {v, f'{v}-w{b}'} & set(only)]
            rates = {rate_of(v, b): VARIANTS[v][2] for v, b in wanted}
            tune = {k: lrs for k, lrs in rates.items() if k[1] in args.tune_bits}
            if tune and not tuned: study.run([runs.tune_start(k, args.fp_lrs[0]) for k in dict.fromkeys(start_of(v) for v, _ in tune)], done)
            runs.lr |= dict.fromkeys(rates, args.lr) | study.tune(tune, runs.tune_variant, BEYOND)
            study.run([runs.variant(v, b, seed) for b in args.bits for seed in args.seeds for v, bits in wanted if bits == b], done)
    average_anew(args.out)
    done()
    print(study_table(args.out))


if __name__ == '__main__': main()
