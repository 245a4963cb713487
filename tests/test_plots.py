"Pictures: every function draws, writes whole files, leaves no figure open, and names what is wrong."
import json
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from torch import nn
from repq import plots
from repq.blocks import ACBlock, Block, RepVGGBlock
from repq.kernels import Kernel
from repq.layer_report import plot_layers
from repq.layers import RepQLayer
from repq.models import create_model
from repq.quantizers import LSQ
from repq.surgery import calibrate, deploy, quantize

@pytest.fixture(autouse=True)
def no_figure_left():
    plt.close('all'); yield
    assert not plt.get_fignums()

def row(method='plain', bits=4, seed=0, accuracy=.5, **kw):
    return dict(method=method, stage='quantized' if bits else 'full-precision', weight_bits=bits, input_bits=bits, seed=seed, accuracy=accuracy,
                merged_accuracy=accuracy, size_bytes=1500, bit_operations=2.5e6, step_ratio=1.2) | kw

RESULTS = [plots.plot_results, plots.plot_tradeoff, plots.plot_step_ratio]
ROWS = [row(m, b, s, .5 + .1*s) for m in ('repq-bn', 'plain', 'my own') for b in (2, 4, None) for s in range(2)]

def test_pictures_are_written(tmp_path):
    q = calibrate(quantize(create_model('repvgg_a0_tiny', 10, 1), 4, 4, statistics='estimated', verbose=False), [torch.randn(8, 1, 8, 8)])
    layer = q.stages[0][1].conv
    before = {k: v.clone() for k, v in q.state_dict().items()}
    history = [dict(epoch=str(i), train_loss='1.0', valid_loss='', accuracy='.5', time='0:01') for i in range(3)]
    drawn = dict(kernel=plots.plot_kernel(layer.block.kernel()), depthwise=plots.plot_kernel(Kernel(torch.randn(5, 1, 3, 3), groups=5)), branches=plots.plot_branches(layer),
                 quantized=plots.plot_quantized(layer), steps=plots.plot_steps(q), deployed=plots.plot_steps(deploy(q, verbose=False)),
                 statistics=plots.plot_statistics(layer, torch.randn(8, 8, 8, 8)), history=plots.plot_history(history),
                 runs=plots.plot_history({'plain': history, 'b': history}), **{f.__name__: f(ROWS) for f in RESULTS})
    for n, d in drawn.items(): assert plots.save(d, tmp_path/f'{n}.png').stat().st_size > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f'{n}.png' for n in drawn) # no temporary files
    for k, v in q.state_dict().items(): assert torch.equal(v, before[k]), k
    assert layer.block.statistics == 'estimated'

def test_draws_where_it_is_told():
    fig, axs = plt.subplots(1, 5)
    for f, ax in zip(RESULTS, axs): assert f(ROWS, ax) is ax and ax.has_data()
    plots.plot_history([dict(epoch=0, train_loss=1, valid_loss=1, accuracy=.5)], axs[3:])
    assert plt.get_fignums() == [fig.number]; plt.close(fig)

@pytest.mark.parametrize('f', [plots.summarize, plots.results_table, *RESULTS])
def test_bad_rows(f):
    for key in plots.RESULT_KEYS:
        with pytest.raises(ValueError, match=f"row 1 has no '{key}'"): f([row(), {k: v for k, v in row().items() if k != key}])
    with pytest.raises(ValueError, match='no rows'): f([])

def test_summary():
    s = plots.summarize(ROWS[::-1])
    assert [(r['method'], r['weight_bits']) for r in s] == [(m, b) for b in (None, 4, 2) for m in ('plain', 'repq-bn', 'my own')]
    assert all(r['n'] == 2 and np.isclose(r['accuracy'], .55) and np.isclose(r['accuracy_sd'], np.std([.5, .6], ddof=1)) for r in s)
    one, = plots.summarize([row(step_ratio=None)])
    assert one['accuracy_sd'] is None and one['step_ratio'] is None and one['n'] == 1

def test_table():
    head, rule, *body = plots.results_table(json.loads(json.dumps(ROWS + [row('repq', accuracy=None, step_ratio=None)]))).split('\n')
    assert len(body) == 10 and len({len(l) for l in (head, rule, *body)}) == 1
    assert [c.strip() for c in body[0].split('|')[1:-1]] == ['plain', 'full-precision', '–', '55.0 ± 7.1', '2', '55.0', '1.5', '2.5 M', '1.20']
    assert [c.strip() for c in next(l for l in body if '| repq ' in l).split('|')[1:-1]] == ['repq', 'quantized', '4/4', '–', '0', '–', '1.5', '2.5 M', '–']

def test_branches_add_up_and_statistics_are_those_of_the_branch():
    deep = Block([nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)), nn.BatchNorm2d(4), nn.AvgPool2d(3, 1)], padding=1)
    for b in (RepVGGBlock(4, 4, groups=2), ACBlock(4, 8, stride=2), deep):
        assert torch.allclose(sum(k.weight for k in plots.branch_kernels(b).values()), b.kernel().weight, atol=1e-6)
        x = torch.randn(16, 4, 8, 8)
        for kinds in plots.branch_statistics(RepQLayer(b), x).values(): assert list(kinds) == ['exact', 'estimated', 'corrected', 'sampled', 'hybrid']
    mean, var = plots.branch_statistics(deep, x)['1']['estimated']
    assert torch.allclose(mean, x.mean((0, 2, 3)), atol=1e-5) and torch.allclose(var, x.var((0, 2, 3)), rtol=1e-2)

def test_bad_input(tmp_path):
    fig = plt.figure()
    for path, error in ((tmp_path/'a', ValueError), (tmp_path/'a.txt', ValueError), (tmp_path/'no'/'a.png', FileNotFoundError)):
        with pytest.raises(error): plots.save(fig, path)
    (tmp_path/'old.png').write_text('old')
    fig.savefig = lambda *a, **k: 1/0                                # fails while writing: the old file stays, nothing else does
    with pytest.raises(ZeroDivisionError): plots.save(fig, tmp_path/'new.png')
    for overwrite in False, True:                                    # which repq did not make
        with pytest.raises(FileExistsError, match='old.png exists'): plots.save(fig, tmp_path/'old.png', overwrite=overwrite)
    assert [p.read_text() for p in tmp_path.iterdir()] == ['old']; plt.close(fig)
    with pytest.raises(ValueError, match='no step yet'): plots.plot_quantized(RepQLayer(nn.Conv2d(3, 3, 3), LSQ(4)))
    with pytest.raises(TypeError, match='got Linear'): plots.plot_branches(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='no quantized layer'): plots.plot_steps(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match=r'got \(2, 4, 8, 8\)'): plots.plot_statistics(RepVGGBlock(3, 3), torch.randn(2, 4, 8, 8))

# What can be told apart

RUNS = {f'{m}-w{b}': row(m, None if b == 32 else b) for m in ('plain', 'repq-bn') for b in (32, 4, 2)}
CURVE = [dict(epoch=i, train_loss=190/(i + 1), valid_loss=200/(i + 1), accuracy=.5) for i in range(3)]

def test_curves_have_a_colour_a_method_and_a_line_a_width():
    loss, score = plots.plot_history({n: CURVE for n in RUNS}, results=RUNS)
    for ax in loss, score:
        looks = {n: (l.get_color(), l.get_linestyle()) for n, l in zip(RUNS, ax.lines)}
        assert len(set(looks.values())) == len(ax.lines) == 6
        for n in RUNS: assert looks[n][0] == looks[f'{RUNS[n]["method"]}-w4'][0] == plots.METHOD_COLORS[RUNS[n]['method']]
        for b in 32, 4, 2: assert looks[f'plain-w{b}'][1] == looks[f'repq-bn-w{b}'][1]
    assert loss.get_yscale() == 'log' and loss.get_title() and score.get_title()
    assert [t.get_text() for t in score.get_legend().get_texts()] == ['plain', 'repq-bn', 'full precision', '4/4 bits', '2/2 bits']
    plt.close(loss.figure)

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('loss', [None, 0., -1., 1e30])
def test_a_loss_that_has_no_logarithm(tmp_path, loss):
    rows = [dict(epoch=i, train_loss=loss, valid_loss=loss, accuracy=None) for i in range(2)]
    assert plots.save(plots.plot_history(rows), tmp_path/'history.png').exists()

def test_series_of_a_method_have_colours_of_their_own():
    rows = plots.labelled([row('merged', epochs=3), row('merged', epochs=0), row('merged', settings=dict(norm_after=True)), row('mine')])
    colors = plots.series_colors(rows)
    assert colors['merged'] == plots.METHOD_COLORS['merged'] and len(set(colors.values())) == len(colors) == 4

def test_as_published_is_another_series():
    "What recipes switch on at few bits was passed over in names, so that one seed with it and one without were averaged"
    rows = plots.labelled([row('repq', seed=0), row('repq', seed=1, settings=dict(bound_steps=False, centred=False, peel=False))])
    assert [r['label'] for r in rows] == ['repq', 'repq−bound−centred−peeled'] and len(plots.series_colors(rows)) == 2

def test_networks_of_one_cost_hide_no_other():
    ax = plots.plot_tradeoff([row(m, bit_operations=1e6) for m in ('plain', 'merged', 'repq-bn')])
    at = [c.lines[0].get_xdata()[0] for c in ax.containers]
    assert len(set(at)) == 3 and max(at)/min(at) < 1.2; plt.close(ax.figure)

def test_pictures_of_layers():
    from repq.layer_report import plot_layers, plot_sensitivity
    x = torch.randn(8, 1, 8, 8)
    q = calibrate(quantize(create_model('repvgg_a0_tiny', 10, 1), 4, 4, verbose=False), [x])
    fig = plot_layers(q, x)
    width, height = fig.get_size_inches()
    titles = [a.get_title() for a in fig.axes if a.axison]
    assert height < width and len(titles) == 24 and len(set(titles)) == 24 and all(': weight, ' in t or ': input, ' in t for t in titles)
    plt.close(fig)
    fig = plot_sensitivity({'': .9, 'a': .85, 'b': .91}, 'accuracy', '%', 100)
    assert np.allclose([p.get_height() for p in fig.axes[0].patches], [5, -1]) and fig.axes[0].get_ylabel() == 'accuracy lost, %'
    plt.close(fig)

def test_a_step_that_is_nearly_zero():
    "The picture that is for such a step shows it: its axis has numbers, and the other weights are not squeezed into a line"
    x = torch.randn(8, 1, 8, 8)
    q = calibrate(quantize(create_model('repvgg_a0_tiny', 10, 1), 4, 4, verbose=False), [x])
    layer = q.stem.conv
    with torch.no_grad(): layer.weight_quantizer.step[0] = 1e-9
    fig = plots.plot_steps(q)
    fig.canvas.draw()
    for ax in fig.axes: assert len([t for t in ax.get_yticklabels() if t.get_text()]) > 1
    low, high = plots.plot_quantized(layer).get_xlim()
    grid = layer.weight_quantizer
    width = grid.qp - grid.qn
    assert grid.qn - 3*width < low < high < grid.qp + 3*width
    with torch.no_grad(): layer.input_quantizer.step.fill_(1e-9)
    for ax in plot_layers(q, x).axes:
        if ax.has_data(): assert max(map(abs, ax.get_xlim())) < 1000
    plt.close('all')
