"Integers that change back and forth: counted as defined, for every kind of layer, through interruptions; the penalty, and rates of steps."
import json
from dataclasses import replace
import pytest, torch
from helpers import same_state
from safetensors.torch import load_file
from torch import nn
from repq import surgery
from repq.commands.run_reports import report_run
from repq.method.layers import RepQLayer
from repq.method.peeled import PeeledLSQ, few_bits, own_taps
from repq.method.quantizers import LSQ
from repq.models import create_model
from repq.recipes import build, get_recipe
from repq.runs import read_history, train
from repq.training import runs
from repq.training.fitting import ReportEpoch, group_rates, lr_schedule, parameter_groups
from repq.training.oscillation import MOMENTUM, Rounding, dampening, integers_of, observe, read_oscillation
from repq.training.requests import check_effect
from repq.training.steps import capture

quiet = dict(verbose=False)
def ignore(done, of, values): pass
KW = dict(on_epoch=ignore, timing=0)
TINY = dict(model='repvgg_a0_tiny', method='repq-bn', epochs=2, batch_size=240)

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def fp(tmp_path_factory):
    d = tmp_path_factory.mktemp('whole')
    train(get_recipe(**TINY), d/'fp', **KW)
    return d/'fp'

def test_counts_are_those_of_the_definition():
    "Against a loop over weights and steps"
    torch.manual_seed(0)
    integers = torch.randint(-2, 2, (40, 60)).float()
    state = torch.stack([integers[0], *torch.zeros(2, 60)])
    last, often = [0]*60, [0.]*60
    for t in range(1, 40):
        changed, back = observe(state, integers[t])
        for i in range(60):
            turn = (integers[t, i] > integers[t - 1, i]).item() - (integers[t, i] < integers[t - 1, i]).item()
            assert changed[i] == (turn != 0) and back[i] == (turn*last[i] == -1)
            often[i] += MOMENTUM*((turn*last[i] == -1) - often[i])
            last[i] = turn or last[i]
    assert torch.allclose(state[2], torch.tensor(often)) and torch.equal(state[0], integers[-1])

def network(kind, bits, **kw):
    net = create_model('repvgg_a0_tiny', 10, 1) if kind != 'plain' else nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.Flatten(), nn.Linear(160, 10))
    if kind == 'merged': surgery.merge(net, inplace=True, **quiet)
    return surgery.quantize(net, bits, bits, 'exact' if kind == 'repq' else None, **quiet, **kw).train()

@pytest.mark.parametrize('kind,bits,more', [('plain', 3, {}), ('merged', 4, {}), ('repq', 4, {}), ('repq', 2, few_bits(2)), ('merged', 2, few_bits(2, False))])
def test_integers_and_penalty(kind, bits, more):
    "What is noted are the integers of M; the penalty's gradient reaches every branch and no step"
    torch.manual_seed(0)
    net = network(kind, bits, **more)
    x = torch.randn(8, 1, 8, 8)
    net(x)
    seen = Rounding(net)
    net(x)
    assert set(seen.last) == {n for n, m in net.named_modules() if isinstance(m, RepQLayer)}
    want, hand = 0., 0.
    for n, (v, rounded) in seen.last.items():
        q = seen.quantizers[n]
        assert torch.equal(integers_of(q, rounded), q.quantized(v).flatten().float())
        want = want + dampening(q, v, rounded)
        step = q.step.detach().view(-1, *[1]*(v.ndim - 1)).double()
        low, high = step*q.qn, step*q.qp
        inside = (v >= low*(1 + 1e-6)) & (v <= high*(1 + 1e-6))
        if isinstance(q, PeeledLSQ): inside |= own_taps(v) # which go farther
        hand += (((v - rounded)**2)*inside).sum().item()
    assert abs(want.item() - hand) <= 1e-4*hand
    want.backward()
    reached = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached >= {n for n, p in net.named_parameters() if p.ndim == 4} # the kernels of all branches
    # through a batch's statistics M depends on what comes before the layer, the steps there included
    if kind != 'repq': assert all(p.grad is None for m in net.modules() if isinstance(m, LSQ) for p in m.parameters())
    seen.remove()
    assert not any(m._forward_hooks for m in net.modules() if isinstance(m, LSQ))

def test_counting_changes_nothing_and_is_kept(fp, tmp_path):
    "The same weights with it as without; columns, a row for each layer, and columns of the report"
    recipe = get_recipe(**TINY, weight_bits=3)
    rows = [train(r, tmp_path/n, fp, **KW) for n, r in dict(without=recipe, counted=replace(recipe, oscillation=True)).items()]
    a, b = (load_file(tmp_path/n/'model.safetensors') for n in ('without', 'counted'))
    same_state(a, b)
    assert rows[0]['settings'] == rows[1]['settings'] # rows of the same name are averaged
    assert not (tmp_path/'without'/'oscillation.csv').exists() and read_oscillation(tmp_path/'without') == {}
    h, layers = read_history(tmp_path/'counted'), read_oscillation(tmp_path/'counted')
    assert len(h) == 2 and len(layers) == 13
    for r in h: assert 0 <= float(r['back']) <= float(r['flips']) <= 1 and 0 <= float(r['oscillating']) <= 1
    assert set(h[0]) - set(read_history(tmp_path/'without')[0]) == {'flips', 'back', 'oscillating'}
    head, *_ = report_run(tmp_path/'counted', tmp_path/'report', alone=False).splitlines()
    assert [c.strip() for c in head.split('|')][-4:-1] == ['flips', 'back', 'oscillating'] and (tmp_path/'report'/'oscillation.png').exists()
    told = json.loads((tmp_path/'report'/'layers.json').read_text())['layers']
    assert {r['name']: r['flips'] for r in told} == {n: r['flips'] for n, r in layers.items()}
    assert 'flips' not in report_run(tmp_path/'without', alone=False).splitlines()[0]

class Accident(ReportEpoch):
    "Ctrl-C in the middle of a batch, before its checkpoint"
    at = 1.
    def after_batch(self):
        if self.training and self.epoch + (self.iter + 1)/self.n_iter >= self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('at', [.5, 1., 1.5])
def test_counts_survive_an_interruption(fp, tmp_path, at):
    recipe = get_recipe(**TINY, weight_bits=3, oscillation=True, dampen=.05, step_lr=.5, transitions=.01)
    train(recipe, tmp_path/'whole', fp, **KW)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(runs, 'ReportEpoch', type('Accident', (Accident,), dict(at=at)))
        with pytest.raises(KeyboardInterrupt): train(recipe, tmp_path/'again', fp, minutes=0., **KW)
    assert (tmp_path/'again.part').exists()
    train(recipe, tmp_path/'again', fp, resume=True, **KW)
    same_state(load_file(tmp_path/'whole'/'model.safetensors'), load_file(tmp_path/'again'/'model.safetensors'))
    a, b = ([{k: v for k, v in r.items() if k != 'time'} for r in read_history(tmp_path/n)] for n in ('whole', 'again'))
    assert a == b
    assert (tmp_path/'whole'/'oscillation.csv').read_text() == (tmp_path/'again'/'oscillation.csv').read_text()

def test_a_damaged_file_is_named(tmp_path):
    (tmp_path/'oscillation.csv').write_text('layer,bits,weights,flips,back,oscillating\na,2,9,3.5,0,0\n')
    with pytest.raises(ValueError, match='oscillation.csv.*flips'): read_oscillation(tmp_path)

def test_penalty_makes_weights_rest(fp, tmp_path):
    "More of it, fewer weights that oscillate"
    recipe = get_recipe('repvgg_a0_tiny', 'merged', 2, epochs=4, batch_size=64, oscillation=True)
    for most in 0., .3: train(replace(recipe, dampen=most), tmp_path/str(most), fp, **KW)
    free, held = (float(read_history(tmp_path/n)[-1]['oscillating']) for n in ('0.0', '0.3'))
    assert held < .7*free

def test_steps_have_their_rate(fp):
    recipe = get_recipe(**TINY, weight_bits=3, step_lr=.1, bias_lr=2.)
    model = build(recipe, 10, 1)
    rest, biases, steps = parameter_groups(recipe, model)
    assert {id(p) for p in steps} == {id(p) for m in model.modules() if isinstance(m, LSQ) for p in m.parameters()}
    assert len(rest) + len(biases) + len(steps) == len([p for p in model.parameters() if p.requires_grad])
    lr = recipe.lr
    assert group_rates(recipe).tolist() == [lr, 2*lr, pytest.approx(.1*lr)]
    assert lr_schedule(recipe)['lr'](0.) == pytest.approx(group_rates(recipe))
    assert [len(g) for g in parameter_groups(get_recipe(**TINY, weight_bits=3), model)] == [len(rest + biases + steps)]

def test_rates_follow_transitions(fp, tmp_path):
    "More changes where more are asked for; steps keep the schedule, in a group of their own"
    recipe = get_recipe('repvgg_a0_tiny', 'merged', 2, epochs=4, batch_size=64, oscillation=True)
    rates = {}
    class Rates(ReportEpoch):
        def after_step(self): rates[self.at].append([h['lr'] for h in self.opt.hypers])
    for most in 1e-4, .01:
        rates[most] = []
        with pytest.MonkeyPatch.context() as m:
            m.setattr(runs, 'ReportEpoch', type('Rates', (Rates,), dict(at=most)))
            train(replace(recipe, transitions=most), tmp_path/str(most), fp, **KW)
    few, many = (sum(float(r['flips']) for r in read_history(tmp_path/n)) for n in ('0.0001', '0.01'))
    assert few < many
    (rate, steps), n = zip(*rates[1e-4]), len(rates[1e-4])
    assert rate[0] == rate[1] == recipe.lr, 'the first two steps have nothing to compare'
    assert min(rate) >= 0 and max(rates[.01])[0] > recipe.lr
    want = lr_schedule(replace(recipe, transitions=1e-4))['lr']
    assert steps == pytest.approx([want(i/n)[1] for i in range(n)])

@pytest.mark.parametrize('fields,text', [(dict(dampen=-1.), 'dampen must be at least 0'), (dict(step_lr=0.), 'step_lr must be above 0'), (dict(oscillation=1), 'True or False'), (dict(dampen='much'), 'a number'), (dict(transitions=1.), 'transitions must be at least 0 and below 1')])
def test_values_that_cannot_be_meant(fields, text):
    with pytest.raises(ValueError, match=text): get_recipe(**TINY, weight_bits=3, **fields)

def test_what_has_no_effect_is_refused():
    for n, v in dict(dampen=.1, oscillation=True, transitions=.01).items():
        with pytest.raises(ValueError, match=f'{n} is for the quantized stage'): get_recipe(**TINY, **{n: v})
    with pytest.raises(ValueError, match='step_lr=0.1 has no effect in full precision'): check_effect(get_recipe(**TINY, step_lr=.1))
    check_effect(get_recipe(**TINY, weight_bits=3, step_lr=.1))
    with pytest.raises(ValueError, match='dampen or transitions'): capture(True, 'cuda', guided=True)

def test_parts_of_a_batch(fp, tmp_path):
    "The penalty is added once to a batch in parts"
    recipe = get_recipe('repvgg_a0_tiny', 'merged', 3, epochs=1, batch_size=240, dampen=.2, oscillation=True, norm_after=False)
    for n in 1, 2: train(recipe, tmp_path/str(n), fp, accumulate=n, **KW)
    a, b = (load_file(tmp_path/n/'model.safetensors') for n in '12')
    assert max((a[k] - b[k]).abs().max()/a[k].abs().max().clamp_min(1e-3) for k in a if a[k].is_floating_point() and 'running' not in k) < .05
