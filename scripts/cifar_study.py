"""The CIFAR-10 study: RepVGG, asymmetric and OREPA blocks, every method, at 32, 8, 4 and 2 bits, learning rates tuned for each on held-out training images.

    sh scripts/cifar_study.sh

Each line of work is what one `repq train` does and ends in a run folder; finished ones are kept and interrupted ones resumed, so the study goes on where it was.
Seeds come one after another: what is written down at any time are whole seeds and a part of the next. nbs/experiments/cifar10.ipynb reads what comes out.
"""
import os
from pathlib import Path
from repq.cli import keep_freed_memory
from repq.recipes import get_recipe
from repq.studies import Job, Study, command_line, keep, study_parser, study_results, study_table

NETWORKS = {'repvgg': dict(model='repvgg_a0_small'), 'ac': dict(model='ac_resnet18_tiny', image_size=24),
            'orepa': dict(model='orepa_resnet18_tiny', image_size=24)}
STARTS = {'repvgg-blocks': ('repvgg', 'repq-bn'), 'ac-blocks': ('ac', 'repq-bn'), 'orepa-blocks': ('orepa', 'repq'),
          'repvgg-plain': ('repvgg', 'plain'), 'resnet-plain': ('ac', 'plain')} # stage one -> network, method; the ResNets have the same plain one
PLAIN = {'repvgg': 'repvgg-plain', 'ac': 'resnet-plain'}
FP_LRS, LRS, LOW_LRS = (.05, .15), (.003, .01, .03), (.0003, .001, .003)
NORM, NOISE = dict(norm_after=True), dict(norm_after=True, input_noise=True)
VARIANTS = { # name -> method, fields of the recipe, learning rates tried
    'plain': ('plain', {}, LRS), 'merged': ('merged', {}, LOW_LRS), 'merged+norm': ('merged', NORM, LRS),
    **{m: (m, {}, LRS) for m in ('repq-bn', 'repq-bnest', 'repq-bncorrected', 'repq-bnsample')},
    'repq-bn+norm': ('repq-bn', NORM, LRS), 'repq-bnest+norm': ('repq-bnest', NORM, LRS),
    'repq-bn+norm+noise': ('repq-bn', NOISE, LRS), 'repq-bnest+norm+noise': ('repq-bnest', NOISE, LRS)}
OREPA = {'merged': ('merged', {}, LRS), 'repq': ('repq', {}, LRS)} # batch norms are after its layers anyway
GRID = {'repvgg': VARIANTS, 'ac': VARIANTS, 'orepa': OREPA}
BOUNDED = 'plain', 'merged+norm', 'repq-bn+norm+noise', 'repq-bnest+norm+noise' # at 2 bits with bounded steps as well, at the same rates
SHORT = {8: 4} # bits -> whose learning rates they take
TUNING = 100   # the seed of tuning runs


class Cifar:
    "The runs of the study"
    def __init__(self, args): self.args, self.lr = args, {} # key -> learning rate: of a start, or of (network, variant, bits)

    def recipe(self, net, method, lr, epochs, seed, bits=32, **fields):
        return get_recipe(method=method, weight_bits=bits, as_published=True, **NETWORKS[net], data=str(self.args.out/'data'), lr=lr, epochs=epochs,
                          batch_size=self.args.batch_size, seed=seed, **fields)

    def tune_start(self, key, lr):
        return Job(f'tune-{key}-fp-lr{lr:g}-s{TUNING}', self.recipe(*STARTS[key], lr, self.args.fp_epochs, TUNING, valid=.1))

    def start(self, key, seed): return Job(f'{key}-fp-s{seed}', self.recipe(*STARTS[key], self.lr[key], self.args.fp_epochs, seed))

    def tune_variant(self, key, lr):
        "One epoch of a variant, validated on training images that no stage has seen"
        net, variant, bits = key
        method, fields, _ = GRID[net][variant]
        start = self.start_of(net, method)
        return Job(f'tune-{net}-{variant}-w{bits}-lr{lr:g}', self.recipe(net, method, lr, self.args.tune_epochs, TUNING, bits, valid=.1, **fields),
                   f'tune-{start}-fp-lr{self.lr[start]:g}-s{TUNING}')

    def variant(self, net, variant, bits, seed, more='', **kwargs):
        method, fields, _ = GRID[net][variant]
        lr = self.lr[net, variant, SHORT.get(bits, bits)]
        return Job(f'{net}-{variant}{more}-w{bits}-s{seed}', self.recipe(net, method, lr, self.args.epochs, seed, bits, **fields, **kwargs),
                   f'{self.start_of(net, method)}-fp-s{seed}')

    def start_of(self, net, method): return PLAIN[net] if method == 'plain' else f'{net}-blocks'

    def tune(self, study):
        "Learning rates of both stages; at 2 bits from the best at 4 bits and a quarter of it"
        self.lr |= study.tune({k: FP_LRS for k in STARTS}, self.tune_start)
        pairs = [(net, v) for net, variants in GRID.items() for v in variants]
        self.lr |= study.tune({(net, v, 4): GRID[net][v][2] for net, v in pairs}, self.tune_variant, beyond=3.2)
        self.lr |= study.tune({(net, v, 2): (self.lr[net, v, 4], self.lr[net, v, 4]/4) for net, v in pairs}, self.tune_variant, beyond=3.2)

    def quantized(self, seed):
        jobs = [self.variant(net, v, bits, seed) for bits in self.args.bits for net in GRID for v in GRID[net]]
        if 2 not in self.args.bits: return jobs
        return jobs + [self.variant(net, v, 2, seed, '+bound', bound_steps=True) for net in ('repvgg', 'ac') for v in BOUNDED]


def subset(source, out, train, test):
    "An ImageFolder tree with the first `train` and `test` images of each class, links to those in `source`"
    for split, n in ('train', train), ('test', test):
        for c in sorted(p for p in (source/split).iterdir() if p.is_dir()):
            (out/split/c.name).mkdir(parents=True, exist_ok=True)
            for f in sorted(c.iterdir())[:n]:
                if not (new := out/split/c.name/f.name).exists(): new.symlink_to(f.resolve())

def main():
    p = study_parser(__doc__.splitlines()[0], out=Path('runs/cifar'), bits=[4, 2, 8], fp_epochs=20, epochs=8, batch_size=64, jobs=os.cpu_count())
    p.add_argument('--data', type=Path, required=True, help='CIFAR-10 as an ImageFolder tree, train/CLASS/*.jpg and test/')
    p.add_argument('--train-images', type=int, default=5000, help='of each class')
    p.add_argument('--test-images', type=int, default=1000, help='of each class')
    args = p.parse_args()
    if not (args.data/'train').is_dir(): p.error(f'{args.data}/train is no folder: give CIFAR-10 as an ImageFolder tree')
    data = args.out/'data'
    subset(args.data, data, args.train_images, args.test_images)
    images = {split: len(list((data/split).glob('*/*'))) for split in ('train', 'test')}
    command, runs = command_line('scripts/cifar_study.py', hidden=[args.data]), Cifar(args)
    with Study(args.out, args.jobs, keep_freed_memory) as study:
        runs.tune(study)
        for seed in args.seeds:
            study.run(runs.start(k, seed) for k in STARTS)
            study.run(runs.quantized(seed))
            if args.keep: keep(args.keep, study_results(args.out, command, images=images))
    print(study_table(args.out))


if __name__ == '__main__': main()
