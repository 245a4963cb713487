"Independent jobs as processes: the same results as here, in any order; errors, output and interruptions reach the first process"
import os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from repq.recipes import get_recipe
from repq.runs import train
from repq.training import processes
from repq.training.processes import cores, prepare_processes, side_by_side, threads_for, threads_worth

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module', autouse=True)
def prepared(): prepare_processes('repq.training.runs')

BEFORE = []

def number(x, tell):
    "How many jobs this process has done, and how many threads it has"
    tell(.5)
    BEFORE.append(x)
    return x, len(BEFORE), torch.get_num_threads()

def after(x, tell): return Path(x, 'written').read_text() if Path(x, 'written').exists() else Path(x, 'written').write_text('by the first')

def odd(x, tell):
    if x == 'speaks': print('a line'); print('take care', file=sys.stderr); return x
    if x == 'fails': raise ValueError('much too large')
    if x == 'unsendable': raise type('Local', (Exception,), {})('here only')
    if x == 'dies': os._exit(7)
    if x == 'is interrupted': raise KeyboardInterrupt('interrupted')
    time.sleep(600)

@pytest.mark.parametrize('workers', [1, 3])
def test_each_job_begins_anew(workers):
    said = []
    res = side_by_side(number, dict(a=1, b=2, c=3), workers=workers, say=lambda *s: said.append(s))
    assert list(res) == ['a', 'b', 'c'] and [x for x, *_ in res.values()] == [1, 2, 3]
    assert {r[1:] for r in res.values()} == {(1, 1)}
    assert sorted((n, s) for n, s, r in said if r is None) == [('a', .5), ('b', .5), ('c', .5)]
    assert sorted(n for n, s, r in said if r) == ['a', 'b', 'c']

@pytest.mark.parametrize('workers', [0, 1, 4])
def test_a_job_waits_for_the_one_it_needs(tmp_path, workers):
    res = side_by_side(after, dict(second=tmp_path, first=tmp_path), dict(second='first', first='elsewhere'), workers)
    assert list(res.items()) == [('second', 'by the first'), ('first', 12)]

@pytest.mark.parametrize('workers', [0, 2])
def test_none_can_be_the_first(workers):
    with pytest.raises(ValueError, match='none of these jobs can be the first.*a, b'):
        side_by_side(number, dict(a=1, b=2, c=3), dict(a='b', b='a'), workers)

@pytest.mark.parametrize('what,error,text', [('fails', ValueError, 'bad: much too large'), ('unsendable', ChildProcessError, 'bad: .*here only'),
                                             ('dies', ChildProcessError, 'bad: .*exit code 7'), ('is interrupted', KeyboardInterrupt, 'bad: interrupted')])
def test_an_error_in_one_ends_all(what, error, text):
    t = time.monotonic()
    with pytest.raises(error, match=text): side_by_side(odd, dict(slow='sleeps', bad=what), workers=2)
    assert time.monotonic() - t < 300 # the other one would sleep for longer

def test_what_a_job_says_is_heard(capsys):
    side_by_side(odd, dict(a='speaks'), workers=1)
    out, err = capsys.readouterr()
    assert out == 'a line\n' and 'take care' in err

# Interruptions

STUDY = """
import signal, sys
from repq.recipes import get_recipe
from repq.studies import Job, Study
def job(name, epochs): return Job(name, get_recipe('repvgg_a0_tiny', 'plain', data='digits', epochs=epochs, batch_size=240))
if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler) # what a shell starts in the background would ignore it
    with Study(sys.argv[1], 2) as study: study.run([job('short', 1), job('long', 2000)])
"""

def until(f, seconds=300):
    end = time.monotonic() + seconds
    while not f():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.1)

def gone(group):
    try: os.killpg(group, 0)
    except ProcessLookupError: return True

@pytest.mark.skipif(sys.platform == 'win32', reason='signals')
@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_study_ends_and_goes_on(tmp_path, sent):
    "The signal reaches the first process only; all end, what is finished stays, what is not has a checkpoint"
    (tmp_path/'study.py').write_text(STUDY)
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    p = subprocess.Popen([sys.executable, '-W', 'ignore', 'study.py', 'runs'], cwd=tmp_path, env=env, start_new_session=True)
    try:
        until(lambda: p.poll() or (tmp_path/'runs'/'short'/'results.json').exists() and list(tmp_path.glob('runs/long.part/checkpoints/step-*.pt')))
        assert p.poll() is None
        p.send_signal(sent)
        assert p.wait(120)
        until(lambda: gone(p.pid), 120)
    finally:
        if not gone(p.pid): os.killpg(p.pid, signal.SIGKILL)
    assert (tmp_path/'runs'/'short'/'model.safetensors').exists() and not (tmp_path/'runs'/'long').exists()
    seen = []
    def first(done, of, values): seen.append(done); raise RuntimeError('enough')
    with pytest.raises(RuntimeError, match='enough'):
        train(get_recipe('repvgg_a0_tiny', 'plain', data='digits', epochs=2000, batch_size=240), tmp_path/'runs'/'long', on_epoch=first, timing=0, resume=True)
    assert seen[0] > 1, 'it began anew'

# Threads

def said_by(code, **env):
    own = {k: v for k, v in os.environ.items() if k not in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=own | env | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=True).stdout.split()

@pytest.mark.parametrize('env', [dict(OMP_NUM_THREADS='2', OMP_WAIT_POLICY='passive'), dict(MKL_NUM_THREADS='2', OMP_NUM_THREADS='2', GOMP_SPINCOUNT='7')], ids=str)
def test_users_choice_wins(env):
    own, = said_by('import torch; print(torch.get_num_threads())', **env) # 2, where there are as many cores
    code = ('import os, repq.training.processes as p; p.cores = lambda: 1; p.use_threads(); import torch; a = torch.get_num_threads()\n'
            'with p.threads_worth(1.) as b: print(a, b, os.environ.get("GOMP_SPINCOUNT"))')
    assert said_by(code, **env) == [own, own, str(env.get('GOMP_SPINCOUNT'))]
    assert said_by(code) == ['1', '1', '10000']

def test_threads_of_work_and_load(monkeypatch):
    monkeypatch.setattr(processes, '_CHOSEN', [])
    monkeypatch.setattr(processes, 'cores', lambda: 4)
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    assert [threads_for(busy=b) for b in (0., 59., 61.8, 63., 64.)] == [4, 4, 2, 1, 1]
    assert [threads_for(w, busy=0.) for w in (1., 1e9)] == [1, 4]
    n = torch.get_num_threads()
    with threads_worth(1.) as few: assert few == torch.get_num_threads() == 1
    with threads_worth(1., n=2) as two: assert two == torch.get_num_threads() == 2 # as a run had before
    assert torch.get_num_threads() == n

def test_cores(): assert 1 <= cores() <= os.cpu_count()
def test_preparing_is_repeatable(): prepare_processes('repq.training.processes'); prepare_processes('repq.training.processes')
