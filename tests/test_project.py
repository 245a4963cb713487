"The project itself: version, console script, and every command that README.md shows."
import json, re, shlex, subprocess, sys, time
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path
import numpy as np, pytest
from PIL import Image
import repq
from repq.training.demo import demo_recipes

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

def settings():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def run(*cmd, cwd):
    res = subprocess.run([str(c) for c in cmd], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    assert res.returncode == 0, f'{shlex.join(map(str, cmd))}\n{res.stdout}\n{res.stderr}'
    return res.stdout

def test_version_agrees():
    assert repq.__version__ == version('repq') == settings()['version']
    assert f"version: {settings()['version']}" in (ROOT/'CITATION.cff').read_text()

def test_core_modules_need_no_development_packages(tmp_path):
    "What is installed for `pip install repq` is enough to import every module."
    dev = {re.split(r'[<>=;]', r)[0].replace('-', '_') for r in settings()['dev_requirements'].split()}
    dev -= {re.split(r'[<>=;]', r)[0].replace('-', '_') for r in settings()['requirements'].split()} | {'pyyaml', 'plum_dispatch'}
    mods = sorted('.'.join(p.relative_to(ROOT/'repq').with_suffix('').parts) for p in (ROOT/'repq').rglob('*.py') if p.stem[0] != '_')
    run(sys.executable, '-c', f'import sys, importlib\nfor m in {sorted(dev)}: sys.modules[m] = None\nfor m in {mods}: importlib.import_module("repq."+m)', cwd=tmp_path)

def test_console_script(tmp_path):
    out = run(BIN/'repq', '--help', cwd=tmp_path)
    for command in 'demo', 'train', 'eval', 'report', 'convert', 'upscale', 'list': assert command in out

# README's commands: each is run as it stands, in the order in which they stand, on a tiny data set under the name that README gives it.
# Options are appended, none is changed: `repq train` gets one epoch, small batches, a low learning rate (four steps of 0.1 from nothing diverge), no timing and 32 instead of 224 pixels, the demo one epoch a run.

README = (ROOT/'README.md').read_text(encoding='utf-8')
SMALLER = {('repq', 'train'): ['--epochs', '1', '--batch-size', '8', '--image-size', '32', '--timing', '0', '--lr', '0.001'], ('repq', 'demo'): ['--quick'],
           ('repq', 'train', 'ecbsr_m4c8'): ['--epochs', '1', '--iterations', '2', '--batch-size', '4', '--crop', '32', '--timing', '0']}

def blocks(text, *languages): return re.findall(rf'^```(?:{"|".join(languages)})\n(.*?)^```', text, flags=re.M|re.S)

def commands(text):
    "The commands in ```bash blocks, continued lines joined and comments dropped."
    return [c for b in blocks(text, 'bash', 'sh') for l in re.sub(r'\\\n', ' ', b).split('\n') if (c := shlex.split(l, comments=True))]

def smaller(command): return command + SMALLER.get(tuple(command[:3]), SMALLER.get(tuple(command[:2]), []))

def image_folder(path, classes=2, images=8, size=70):
    rng = np.random.default_rng(0)
    for split in 'train', 'val':
        for c in range(classes):
            (path/split/f'class{c}').mkdir(parents=True)
            for i in range(images):
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path/split/f'class{c}'/f'{i}.jpg')
    return path

def test_command_extraction():
    text = '```bash\nmake demo  # note\nrepq train a \\\n  --data DIR --out runs/x\n```\n```python\nrepq\n```\n'
    assert commands(text) == [['make', 'demo'], 'repq train a --data DIR --out runs/x'.split()]
    assert smaller(commands(text)[1])[:7] == commands(text)[1]
    assert blocks(text, 'python') == ['repq\n']

def test_readme_shows_nothing_untested():
    "Every command belongs to one of the tests below."
    found = commands(README)
    for c in found: assert c[0] == 'repq' or c in ([*'make demo'.split()], [*'make test'.split()], [*'pip install .'.split()]), f'no test runs this command of README.md: {shlex.join(c)}'
    assert {'train', 'eval', 'report', 'list'} <= {c[1] for c in found if c[0] == 'repq'} and ['make', 'demo'] in found and ['make', 'test'] in found

def test_readme_repq_commands(tmp_path):
    image_folder(tmp_path/'imagenet')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path/'photo.jpg')
    for c in commands(README):
        if c[0] == 'repq': said = run(BIN/'repq', *smaller(c)[1:], cwd=tmp_path); assert said.strip()
    w4 = json.loads((tmp_path/'runs'/'w4'/'results.json').read_text())[0]
    assert (w4['model'], w4['weight_bits'], w4['accuracy']) == ('repvgg_a0', 4, w4['merged_accuracy'])
    assert (tmp_path/'runs'/'report'/'accuracy.png').exists() and Image.open(tmp_path/'photo-x2.png').size == (60, 40)

@pytest.mark.skipif(BIN != ROOT/'.venv'/'bin', reason='the tests run outside .venv, which `make demo` would make')
def test_readme_make_demo(tmp_path):
    "One epoch a run, into a folder of its own; the second time finds everything there and gives the same rows."
    cmd = ['make', 'demo', f'ARGS=--quick --out {shlex.quote(str(tmp_path/"demo"))}']
    first = run(*cmd, cwd=ROOT); rows = json.loads((tmp_path/'demo'/'results.json').read_text())
    t = time.perf_counter(); second = run(*cmd, cwd=ROOT); t = time.perf_counter() - t
    again = json.loads((tmp_path/'demo'/'results.json').read_text())
    assert [{**r, 'step_ratio': None} for r in rows] == [{**r, 'step_ratio': None} for r in again]
    assert len(rows) == len(demo_recipes()) and all(r['accuracy'] == r['merged_accuracy'] for r in rows)
    for said in first, second: assert 'equal in every row' in said and str(tmp_path/'demo'/'results.json') in said and '| repq-bnest' in said
    assert len(list((tmp_path/'demo').glob('*.png'))) >= 4

def test_readme_make_test():
    "`make test` is what runs this; here only what it would run."
    said = run('make', '-n', 'test', cwd=ROOT)
    for step in 'export', 'clean', 'readme', 'notebooks', 'docs', 'pytest': assert step in said

def test_readme_pip_install():
    "Resolved and its metadata built, not installed, and without asking an index."
    said = run(sys.executable, '-m', *commands('```bash\npip install .\n```')[0], '--dry-run', '--no-deps', '--no-build-isolation', '--no-index', cwd=ROOT)
    assert f"repq-{settings()['version']}" in said

def test_readme_python(tmp_path):
    "README's Python, from top to bottom, as one program."
    found = blocks(README, 'python')
    assert len(found) >= 3
    (tmp_path/'readme.py').write_text('\n\n'.join(found), encoding='utf-8')
    said = run(sys.executable, '-W', 'ignore', 'readme.py', cwd=tmp_path)
    for verb in 'reparametrize', 'quantize', 'deploy': assert f'{verb}: ' in said

def test_makefile_help():
    said = run('make', 'help', cwd=ROOT)
    for target in 'demo', 'test', 'fuzz', 'docs', 'lab', 'test-wheel': assert f'make {target} ' in said
