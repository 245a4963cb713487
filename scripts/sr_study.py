"""The super-resolution study: ECBSR-m4c8 ×2 by every method at 8, 4 and 2 bits, learning rates tuned per method on held-out training photographs.

    OMP_NUM_THREADS=1 python scripts/sr_study.py --data sr_train --benchmarks sr_test_x2 --out runs/sr --keep nbs/experiments/superres.json

Grids without zero and what else may help at few bits: `--only plain plain+centred ...`; colour photographs: `--model ecbsr_m4c8_rgb`.
Each line of work is one `repq train`; finished ones are kept and interrupted ones resumed, so the study goes on where it was.
nbs/experiments/superres.ipynb reads what comes out.
"""
import json, re
from pathlib import Path
import torch, torch.nn as nn, torch.nn.functional as F
from repq.cli import keep_freed_memory
from repq.method.peeled import own_taps
from repq.recipes import build, get_recipe
from repq.runs import load_run, read_history, step_times
from repq.studies import Job, Study, command_line, finished, keep, study_parser, study_results, study_table
from repq.superres import UNIT, bicubic, embedded_photos, load_pairs, psnr
from repq.surgery import merge

FULL_PRECISION = {'plain': (.002, .005, .01), 'repq': (.002, .005, .01)} # method: learning rates tried
PUBLISHED, LRS = ('plain', 'merged', 'repq'), (.0005, .002) # as the paper has them; rates of the quantized stage
START = {'plain': 'plain', 'merged': 'repq', 'repq': 'repq'} # method -> that of its full-precision stage
SWITCHES = {'': {}, '+centred': dict(centred=True), '+centred+bound': dict(centred=True, bound_steps=True)}
VARIANTS = {m + n: (m, fields) for n, fields in SWITCHES.items() for m in PUBLISHED}
TAUGHT = {f'{m}+centred+teacher': f'{m}+centred' for m in PUBLISHED} # by the network that it starts from
VARIANTS |= {n: VARIANTS[v] for n, v in TAUGHT.items()}
LIKE = {f'{m}+centred+bound': f'{m}+centred' for m in PUBLISHED} | TAUGHT # variant -> whose learning rates it takes
TUNING = 100 # the seed of tuning runs; without benchmarks every tenth photograph is held out


def start_of(variant): return START[VARIANTS[variant][0]]

def tuned_before(path, wanted) -> dict: # (variant, bits) -> learning rate
    "The rates of an earlier study's runs"
    rows = json.loads(path.read_text())['rows'].values()
    known = {(r['method'], r['weight_bits']): r['lr'] for r in rows}
    return {(v, b): known[VARIANTS[v][0], b] for v, b in wanted}

class SuperResolution:
    "The runs of the study"
    def __init__(self, args): self.args, self.lr = args, {} # learning rates: of (stage one), and of (variant, bits)

    def recipe(self, method, lr, epochs, seed, bits=32, benchmarks=None, **fields):
        a, crop = self.args, self.args.crop if bits < 32 else self.args.fp_crop or self.args.crop
        return get_recipe(a.model, method, bits, as_published=True, data=a.data, lr=lr, epochs=epochs, seed=seed, iterations=a.iterations,
                          batch_size=a.batch_size, crop=crop, benchmarks=benchmarks, schedule='cosine', sqr_mom=.99, eps=1e-5, **fields)

    def tune_start(self, method, lr): return Job(f'tune-fp-{method}-{lr:g}', self.recipe(method, lr, self.args.tune_epochs, TUNING))

    def tuned_start(self, method):
        "A network for the tuning of the quantized stage, which has not seen the photographs held out"
        return Job(f'tune-fp-{method}', self.recipe(method, self.lr[method], self.args.fp_epochs//2, TUNING))

    def start(self, method, seed):
        return Job(f'fp-{method}-s{seed}', self.recipe(method, self.lr[method], self.args.fp_epochs, seed, benchmarks=self.args.benchmarks))

    def tune_quantized(self, key, lr):
        variant, bits = key
        method, fields = VARIANTS[variant]
        return Job(f'tune-{variant}-w{bits}-{lr:g}', self.recipe(method, lr, self.args.tune_epochs, TUNING, bits, **fields), f'tune-fp-{START[method]}')

    def quantized(self, variant, bits, seed):
        (method, fields), lr, start = VARIANTS[variant], self.lr[LIKE.get(variant, variant), bits], f'fp-{start_of(variant)}-s{seed}'
        recipe = self.recipe(method, lr, self.args.epochs, seed, bits, self.args.benchmarks, **fields)
        return Job(f'{variant}-w{bits}-s{seed}', recipe, start, start if variant in TAUGHT else None)

    def run(self, study, done):
        a = self.args
        starts = [m for m in FULL_PRECISION if any(start_of(v) == m for v in a.only)]
        wanted = [(v, b) for v in a.only for b in a.bits if b <= 4 or v in PUBLISHED] # other grids are for few bits
        rates = {(LIKE.get(v, v), b): LRS for v, b in wanted}
        self.lr |= study.tune({m: FULL_PRECISION[m] for m in starts}, self.tune_start) if a.fp_lr is None else dict.fromkeys(starts, a.fp_lr)
        if not a.rates: study.run(self.tuned_start(m) for m in starts)
        study.run([self.start(m, s) for s in a.seeds for m in starts], done)
        self.lr |= tuned_before(a.rates, rates) if a.rates else study.tune(rates, self.tune_quantized)
        study.run([self.quantized(v, b, s) for v, b in wanted for s in a.seeds], done)


def timing(args, rounds=12):
    "Step time of every method relative to plain, the models taking turns on one thread"
    torch.set_num_threads(1)
    def grey(size): return torch.rand(args.batch_size, 1, size, size)*219 + 16
    x, y, s = grey(args.crop//2), grey(args.crop), args.seeds[0]
    stages = {'full precision': {m: load_run(args.out/f'fp-{m}-s{s}')[1] for m in FULL_PRECISION},
              '4 bits': {m: load_run(args.out/f'{m}-w4-s{s}')[1] for m in PUBLISHED}}
    stages['full precision']['repq, branched'] = build(get_recipe(args.model, 'repq', full_precision='branched'))
    times = {stage: step_times(models, x, y, rounds, F.l1_loss) for stage, models in stages.items()}
    return {stage: {m: sorted(a/b for a, b in zip(t, of['plain'])) for m, t in of.items()} for stage, of in times.items()}

@torch.no_grad()
def taps(args):
    "How far a kernel's tap on the channel's own input stands out, in deviations of its other weights: each channel of the inner layers, first seed"
    res = {}
    for name in finished(args.out):
        if not re.fullmatch(f'fp-\\w+-s{args.seeds[0]}', name): continue
        kernels = [m.weight for m in merge(load_run(args.out/name)[1].eval(), verbose=False).modules() if isinstance(m, nn.Conv2d)]
        inner = [(w, own_taps(w)) for w in kernels if w.shape[0] == w.shape[1]]
        res[name] = [round(v, 2) for w, own in inner for v in (w[own].abs()/w[~own].view(len(w), -1).std(1)).tolist()]
    return res

@torch.no_grad()
def details(args, top=80, left=190, size=72):
    "A detail of one of scikit-image's photographs by every method at every width, first seed: grey levels and the whole photograph's PSNR"
    p = load_pairs([f for f in embedded_photos() if f[0] == 'camera'])[0]
    lr, hr = (t[None].float()/UNIT for t in (p.lr, p.hr))
    names = [f'fp-{m}' for m in FULL_PRECISION] + [f'{m}-w{b}' for b in args.bits for m in PUBLISHED]
    images = {'ground truth': hr, 'bicubic': bicubic(lr, hr.shape[-2:])}
    images |= {n: load_run(args.out/f'{n}-s{args.seeds[0]}')[1].eval()(lr) for n in names}
    def cut(i): return i[0, 0, top:top + size, left:left + size].round().clamp(0, 255).int().tolist()
    return {n: dict(psnr=psnr(i, hr) if n != 'ground truth' else None, image=cut(i)) for n, i in images.items()}

def main():
    p = study_parser(__doc__.splitlines()[0], out=Path('runs/sr'), bits=[8, 4, 2], fp_epochs=6, epochs=3, batch_size=16, jobs=2)
    p.add_argument('--data', default='sr_train', help='folder of photographs, or DIV2K')
    p.add_argument('--benchmarks', default='sr_test_x2', help='folder of Set5, Set14, ...')
    p.add_argument('--iterations', type=int, default=500, help='batches in an epoch')
    p.add_argument('--crop', type=int, default=96)
    p.add_argument('--fp-crop', type=int, help='of the full-precision stage, where it is another')
    p.add_argument('--fp-lr', type=float, help='the learning rate of full precision, which is tuned otherwise')
    p.add_argument('--rates', type=Path, help='the JSON of an earlier study: each variant takes the rate that its method had there')
    p.add_argument('--model', choices=('ecbsr_m4c8', 'ecbsr_m4c8_rgb'), default='ecbsr_m4c8')
    p.add_argument('--only', nargs='+', choices=VARIANTS, default=list(PUBLISHED), help='these variants')
    args = p.parse_args()
    command = command_line('scripts/sr_study.py')
    def results(**more):
        histories = {n: read_history(args.out/n) for n in finished(args.out) if not n.startswith('tune')}
        return study_results(args.out, command, iterations=args.iterations, batch_size=args.batch_size, crop=args.crop, histories=histories, **more)
    def done(): args.keep and keep(args.keep, results())
    with Study(args.out, args.jobs, keep_freed_memory) as study: SuperResolution(args).run(study, done)
    print(study_table(args.out))
    if not args.keep: return
    whole = tuple(args.only) == PUBLISHED and 4 in args.bits and args.model == 'ecbsr_m4c8'
    keep(args.keep, results(taps=taps(args), **(dict(timing=timing(args), details=details(args)) if whole else {})))


if __name__ == '__main__': main()
