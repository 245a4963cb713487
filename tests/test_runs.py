"What a run is asked for: the same when it goes on, the same in its plan; and files that are there but empty."
import json, os, shutil, subprocess, sys, warnings
from pathlib import Path
import pytest, torch
from helpers import KW, TINY, cut, same_state
from safetensors.torch import load_file, save_file
from repq.plans import plan
from repq.recipes import get_recipe
from repq.runs import collect, load_run, report, train

W4 = get_recipe(**TINY, weight_bits=4, as_published=True) # as the first version had it

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two full-precision runs, one quantized from the first, the second its teacher, and the beginning of the same"
    d, n = tmp_path_factory.mktemp('runs'), torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in 0, 1: train(get_recipe(**TINY, seed=seed), d/f'fp{seed}', **KW)
    kw = dict(init=d/'fp0', teacher=d/'fp1', accumulate=2)
    train(W4, d/'w4', **kw, **KW)
    with pytest.raises(RuntimeError, match='cut'): train(W4, d/'begun', **kw, on_epoch=cut, timing=0, minutes=0)
    torch.set_num_threads(n)
    return d

# Going on with what was begun

@pytest.mark.parametrize('name', ['w4', 'begun'])
def test_another_start_is_another_run(runs, name):
    before = (runs/f'{name}{".part"*(name == "begun")}'/'recipe.json').read_text()
    right = dict(init=runs/'fp0', teacher=runs/'fp1', accumulate=2)
    for change, words in (dict(init=runs/'fp1'), ('init', 'fp0', 'instead of', 'fp1')), (dict(teacher=None), ('teacher', 'fp1', 'instead of None')), (dict(accumulate=1), ('accumulate 2 instead of 1',)):
        with pytest.raises(ValueError, match='another') as e: train(W4, runs/name, resume=True, **{**right, **change}, **KW)
        for w in words: assert w in str(e.value), str(e.value)
    assert (runs/f'{name}{".part"*(name == "begun")}'/'recipe.json').read_text() == before
    same = {n: v if n == 'accumulate' else Path(os.path.relpath(v)) for n, v in right.items()} # the same folders in other words
    if name == 'w4': assert train(W4, runs/name, resume=True, **same, **KW)['weight_bits'] == 4
    else: assert 'going on at epoch 0, batch 6' in plan(W4, runs/name, resume=True, **same)

def test_blocks_of_another_kind(tmp_path):
    with pytest.raises(RuntimeError, match='cut'): train(get_recipe(**TINY), tmp_path/'run', on_epoch=cut, timing=0, minutes=0)
    with pytest.raises(ValueError, match="full_precision 'branched' instead of 'merged'"): train(get_recipe(**TINY, full_precision='merged'), tmp_path/'run', resume=True, **KW)

def test_other_number_of_processes(tmp_path, capsys):
    r, file = get_recipe(**TINY), tmp_path/'run.part'/'recipe.json'
    with pytest.raises(RuntimeError, match='cut'): train(r, tmp_path/'run', on_epoch=cut, timing=0, minutes=0)
    file.write_text(json.dumps({**json.loads(file.read_text()), 'processes': 4}))
    (file.parent/'model.safetensors.7.tmp').write_text('of one that was killed')
    train(r, tmp_path/'run', resume=True, **KW)
    assert 'going on with 1 processes instead of 4' in capsys.readouterr().out
    info = json.loads((tmp_path/'run'/'recipe.json').read_text())
    assert info['processes'] == 1 and info['earlier_processes'] == [4] and not list((tmp_path/'run').glob('*.tmp'))

# A plan refuses what the run would

@pytest.mark.parametrize('change,words', [
    (dict(out='w4'), 'w4 exists'), (dict(out='begun'), 'beginning of a run'), (dict(keep=0), 'keep'), (dict(minutes=-1), 'minutes'), (dict(teacher='nosuch'), 'nosuch'),
    (dict(accumulate=7), 'cannot be shared by 1 processes in 7'), (dict(init=None), 'starts from a full-precision run'), (dict(init='w4'), 'is a quantized run'), (dict(out='w4', resume=True, accumulate=2), 'accumulate 2 instead|teacher')])
def test_plan_refuses_what_the_run_would(runs, change, words):
    said = []
    for f, more in (plan, {}), (train, KW):
        kw = {n: runs/v if n in ('out', 'init', 'teacher') and v else v for n, v in (dict(out='new', init='fp0') | change).items()}
        with pytest.raises((ValueError, OSError), match=words) as e: f(W4, **kw, **more)
        said.append(str(e.value))
    assert said[0] == said[1] and not (runs/'new.part').exists()

def test_plan_without_tensorboard(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, 'fastai.callback.tensorboard', None)
    with pytest.raises(ValueError, match='pip install tensorboard'): plan(get_recipe(**TINY), runs/'new', tensorboard=True)

def test_plan_of_several_processes(tmp_path):
    "One speaks, and its share is that of a process"
    cmd = [sys.executable, '-W', 'ignore', '-m', 'repq.cli', 'train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--batch-size', '240', '--accumulate', '2', '--dry-run', '--out', str(tmp_path/'x')]
    said = [subprocess.run(cmd, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'RANK': str(r), 'WORLD_SIZE': '3'}) for r in (0, 1)]
    assert [p.returncode for p in said] == [0, 0], said
    assert '40 images at a time, 3 processes)' in said[0].stdout and not said[1].stdout and not list(tmp_path.iterdir())

# Teachers

def changed(runs, tmp_path, **info):
    "The first run, as if its data had been another"
    other = tmp_path/'other'
    other.mkdir()
    for f in (runs/'fp0').iterdir(): (other/f.name).write_bytes(f.read_bytes())
    (other/'recipe.json').write_text(json.dumps({**json.loads((other/'recipe.json').read_text()), **info}))
    return other

@pytest.mark.parametrize('info,words', [(dict(classes=[*map(str, range(9)), 'x']), 'its classes: 10 .0, 1, 2, ….; here: 10'), (dict(stats=[[.5], [.25]]), 'its normalisation: mean 0.500; deviation 0.250; here: mean 0.3')])
def test_teacher_of_other_data(runs, tmp_path, info, words):
    with pytest.raises(ValueError, match=words) as e: plan(get_recipe(**TINY), tmp_path/'x', teacher=changed(runs, tmp_path, **info))
    assert 'None' not in str(e.value) and '\n' not in str(e.value)

def test_teacher_of_another_size(runs, tmp_path):
    with pytest.warns(UserWarning, match='trained on images of 16 pixels.*of 8$'): plan(get_recipe(**TINY), tmp_path/'x', teacher=changed(runs, tmp_path, size=16))

def test_teacher_of_a_part_of_the_data(tmp_path):
    "Statistics of a few images more or less are the same normalisation"
    train(get_recipe(**TINY, valid=.3), tmp_path/'fp', **KW)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert 'teacher' in plan(get_recipe(**TINY), tmp_path/'x', teacher=tmp_path/'fp')

# Files that are there but empty

@pytest.mark.parametrize('text', ['{}', '[]', '[1]', '{"method": "plain"}'])
def test_results_without_rows(tmp_path, text):
    (tmp_path/'results.json').write_text(text)
    for path in tmp_path, tmp_path/'results.json':
        with pytest.raises(ValueError, match='results.json has no rows'): collect([path])

def test_history_without_rows(runs, tmp_path):
    other = changed(runs, tmp_path)
    for text in '', 'epoch,train_loss\n':
        (other/'history.csv').write_text(text)
        with pytest.raises(ValueError, match='other/history.csv has no rows'): report([other], tmp_path/'report')

def test_grids_of_the_first_version(runs, tmp_path):
    "Version 0.1.0 kept the ends of grids in whole numbers: its runs load, and what it began goes on"
    def first(state): return {k: v.int() if k.endswith('qrange') else v for k, v in state.items()}
    shutil.copytree(runs/'w4', tmp_path/'w4'); shutil.copytree(runs/'begun.part', tmp_path/'begun.part')
    save_file(first(load_file(runs/'w4'/'model.safetensors')), tmp_path/'w4'/'model.safetensors')
    (_, a, _), (_, b, _) = load_run(runs/'w4'), load_run(tmp_path/'w4')
    same_state(a.state_dict(), b.state_dict())
    for f in (tmp_path/'begun.part'/'checkpoints').glob('step-*.pt'):
        state = torch.load(f, weights_only=True)
        assert any(k.endswith('qrange') for k in state['model'])
        torch.save({**state, 'model': first(state['model'])}, f)
    kw = dict(init=runs/'fp0', teacher=runs/'fp1', accumulate=2, resume=True, **KW)
    shutil.copytree(runs/'begun.part', tmp_path/'same.part')
    for name in 'begun', 'same': train(W4, tmp_path/name, **kw)
    same_state(*(load_file(tmp_path/n/'model.safetensors') for n in ('begun', 'same')))

# From more bits to fewer

@pytest.fixture(scope='module')
def w4(tmp_path_factory):
    "Full precision and 4 bits from there as published, without norms, of merged and of RepQ"
    d = tmp_path_factory.mktemp('fewer')
    for m in 'merged', 'repq-bnest':
        train(get_recipe('repvgg_a0_tiny', m, epochs=2), d/f'{m}-fp', **KW)
        train(get_recipe('repvgg_a0_tiny', m, 4, epochs=1, as_published=True), d/f'{m}-w4', init=d/f'{m}-fp', **KW)
    return d

@pytest.mark.parametrize('method', ['merged', 'repq-bnest'])
def test_fewer_bits_begin_where_more_ended(w4, tmp_path, method):
    "Weights are those of the run before, steps are set anew, and the norms that 2 bits need are added"
    row = train(get_recipe('repvgg_a0_tiny', method, 2, epochs=1, lr=1e-9), tmp_path/'w2', init=w4/f'{method}-w4', **KW)
    assert row['weight_bits'] == 2 and row['stage'] == 'quantized'
    before, now = (load_file(p/'model.safetensors') for p in (w4/f'{method}-w4', tmp_path/'w2'))
    weights = [n for n in before if n.endswith('.weight') and before[n].dim() == 4]
    assert weights and all(torch.allclose(before[n], now[n.replace('.conv.block', '.conv.layer.block')], atol=1e-5) for n in weights)
    steps = [n for n in before if n.endswith('weight_quantizer.raw_step') and 'stages' in n]
    assert steps and not any(torch.equal(before[n], now[n.replace('.conv.', '.conv.layer.', 1)]) for n in steps)
    assert any('.norm.' in n for n in now) and not any('.norm.' in n for n in before)

def test_fewer_bits_come_from_more_of_the_same(w4, tmp_path):
    for recipe, init, words in (
        (get_recipe('repvgg_a0_tiny', 'merged', 4), 'merged-w4', 'is a quantized run .4 bits., and this one has 4'), (get_recipe('repvgg_a0_tiny', 'merged', 8), 'merged-w4', 'and this one has 8'),
        (get_recipe('repvgg_a0_tiny', 'merged'), 'merged-w4', 'and this one has 32'), (get_recipe('repvgg_a0_tiny', 'merged', 2), 'repq-bnest-w4', 'has method repq-bnest, this run merged: give the same'),
        (get_recipe('repvgg_a0_tiny', 'plain', 2), 'merged-w4', 'is repvgg_a0_tiny'), (get_recipe('repvgg_b0_tiny', 'merged', 2), 'merged-w4', 'is repvgg_a0_tiny')):
        for f in plan, train:
            with pytest.raises(ValueError, match=words): f(recipe, tmp_path/'x', init=w4/init)
    train(get_recipe('repvgg_a0_tiny', 'merged', 3, epochs=1), tmp_path/'w3', init=w4/'merged-w4', **KW)
    with pytest.raises(ValueError, match='merged with norm_after, this run merged without norm_after: give the same'):
        train(get_recipe('repvgg_a0_tiny', 'merged', 2, as_published=True), tmp_path/'x', init=tmp_path/'w3', **KW)

# Convolutions in bf16 on a processor

def test_bf16_on_a_processor(tmp_path):
    "Training computes in it, what is measured in the end does not; and whoever is interrupted finds float32 again"
    seen = []
    recipe = get_recipe('repvgg_a0_tiny', 'repq-bn', epochs=2, precision='bf16')
    def look(done, of, values): seen.append(torch.is_autocast_enabled('cpu'))
    row = train(recipe, tmp_path/'low', on_epoch=look, timing=0)
    assert row['settings'] == dict(precision='bf16') and row['accuracy'] > .5 and abs(row['accuracy'] - row['merged_accuracy']) < .01
    full = load_file((tmp_path/'low'/'model.safetensors'))
    train(get_recipe('repvgg_a0_tiny', 'repq-bn', epochs=2), tmp_path/'full', **KW)
    other = load_file(tmp_path/'full'/'model.safetensors')
    assert full['head.weight'].dtype == torch.float32 and not torch.equal(full['head.weight'], other['head.weight'])
    w4 = get_recipe('repvgg_a0_tiny', 'repq-bnest', 4, epochs=1, precision='bf16')
    train(w4, tmp_path/'w4', init=tmp_path/'low', **KW)
    with pytest.raises(RuntimeError, match='cut'): train(w4, tmp_path/'cut', init=tmp_path/'low', on_epoch=cut, timing=0, minutes=0)
    assert not torch.is_autocast_enabled('cpu')
    train(w4, tmp_path/'cut', init=tmp_path/'low', resume=True, **KW)
    same_state(*(load_file(tmp_path/n/'model.safetensors') for n in ('w4', 'cut')))

@pytest.mark.parametrize('stop', [KeyboardInterrupt, RuntimeError])
def test_an_error_inside_a_step_leaves_float32(tmp_path, monkeypatch, stop):
    from repq.method.layers import RepQLayer
    calls = []
    def forward(self, x):
        calls.append(torch.is_autocast_enabled('cpu'))
        if calls.count(True) > 3: raise stop('in a step')
        return given(self, x)
    given = RepQLayer.forward
    train(get_recipe('repvgg_a0_tiny', 'plain', epochs=1), tmp_path/'fp', **KW)
    monkeypatch.setattr(RepQLayer, 'forward', forward)
    with pytest.raises((stop, SystemExit)):
        train(get_recipe('repvgg_a0_tiny', 'plain', 4, epochs=1, precision='bf16'), tmp_path/'x', init=tmp_path/'fp', **KW)
    assert calls.count(True) > 3 and not torch.is_autocast_enabled('cpu')

def test_running_statistics_are_averaged_anew(runs, tmp_path):
    "At few bits, of statistics inside blocks: other running statistics, the same weights; also in a run that goes on"
    kw = {**TINY, 'weight_bits': 2, 'epochs': 1}
    assert get_recipe(**kw).reestimate == 32 and get_recipe(**kw, as_published=True).reestimate == get_recipe(**{**kw, 'method': 'merged'}).reestimate == 0
    for n, recipe in dict(anew=get_recipe(**kw), last=get_recipe(**kw, reestimate=0)).items(): train(recipe, tmp_path/n, init=runs/'fp0', **KW)
    anew, last = (load_file(tmp_path/n/'model.safetensors') for n in ('anew', 'last'))
    differ = {n for n in anew if not torch.equal(anew[n], last[n])}
    assert differ and all('running_' in n or 'num_batches' in n for n in differ)
    with pytest.raises(RuntimeError, match='cut'): train(get_recipe(**kw), tmp_path/'cut', init=runs/'fp0', on_epoch=cut, timing=0, minutes=0)
    train(get_recipe(**kw), tmp_path/'cut', init=runs/'fp0', resume=True, **KW)
    same_state(anew, load_file(tmp_path/'cut'/'model.safetensors'))
    for bad in -1, 2.5: 
        with pytest.raises(ValueError, match='reestimate must be'): get_recipe(**kw, reestimate=bad)
    with pytest.raises(ValueError, match='reestimate is for the quantized stage'): get_recipe(**TINY, reestimate=4)
