"The project itself: version, console script, and every command that README.md shows."
import os, re, shlex, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path
import numpy as np, pytest
from PIL import Image
import repq

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
    mods = sorted(p.stem for p in (ROOT/'repq').glob('*.py') if p.stem[0] != '_')
    run(sys.executable, '-c', f'import sys, importlib\nfor m in {sorted(dev)}: sys.modules[m] = None\nfor m in {mods}: importlib.import_module("repq."+m)', cwd=tmp_path)

@pytest.mark.skipif(not (ROOT/'repq'/'cli.py').exists(), reason='repq/cli.py is not exported yet')
def test_console_script(tmp_path):
    out = run(BIN/'repq', '--help', cwd=tmp_path)
    for command in 'demo', 'train', 'eval', 'report': assert command in out

# README's commands: each runs, on a tiny data set and for one epoch, in the order in which they stand

def commands(text):
    "The commands in ```bash blocks, continued lines joined and comments dropped."
    blocks = re.findall(r'^```(?:bash|sh)\n(.*?)^```', text, flags=re.M|re.S)
    return [c for b in blocks for l in re.sub(r'\\\n', ' ', b).split('\n') if (c := shlex.split(l, comments=True))]

def tiny(command, data):
    "`command` made small: its data set replaced, one epoch, the demo quick."
    put = {'--epochs': '1', '--data': str(data)}
    cmd = [put.get(before, word) if before in put and not (before == '--data' and word == 'digits') else word for before, word in zip([''] + command, command)]
    return cmd + ['--quick'] if cmd[:2] == ['repq', 'demo'] and '--quick' not in cmd else cmd

def image_folder(path, classes=2, images=8, size=32):
    rng = np.random.default_rng(0)
    for split in 'train', 'val':
        for c in range(classes):
            (path/split/f'class{c}').mkdir(parents=True)
            for i in range(images):
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path/split/f'class{c}'/f'{i}.png')
    return path

def test_command_extraction():
    text = '```bash\nmake demo  # note\nrepq train a \\\n  --data DIR --epochs 90 --out runs/x\n```\n```python\nrepq\n```\n'
    assert commands(text) == [['make', 'demo'], 'repq train a --data DIR --epochs 90 --out runs/x'.split()]
    assert tiny(commands(text)[1], 'D') == 'repq train a --data D --epochs 1 --out runs/x'.split()
    assert tiny(['repq', 'demo', '--data', 'digits'], 'D') == ['repq', 'demo', '--data', 'digits', '--quick']

@pytest.mark.skipif(not (ROOT/'README.md').exists(), reason='README.md is not written yet')
def test_readme_commands(tmp_path):
    "`repq` commands run; `make` targets exist; nothing else is shown but fetching and installing."
    data = image_folder(tmp_path/'images')
    found = commands((ROOT/'README.md').read_text(encoding='utf-8'))
    assert found, 'README.md shows no command'
    for c in found:
        if c[0] == 'repq': run(BIN/'repq', *tiny(c, data)[1:], cwd=tmp_path)
        elif c[0] == 'make': run(*c, '-n', cwd=ROOT)
        else: assert c[0] in ('git', 'cd', 'pip'), f'README.md shows a command that no test runs: {shlex.join(c)}'
