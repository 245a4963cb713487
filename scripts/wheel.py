"""What `make test-wheel` runs: build sdist and wheel, look into both, and use the wheel as a stranger would, in a clean
environment that knows no development pins: pip check, a short `repq demo`, and the Python of README.md."""
import re, shutil, sys, tarfile, tempfile, zipfile
from pathlib import Path

from check import Failed, ROOT, run

DIST, ENV = ROOT/'dist', ROOT/'build'/'wheel-env'

def step(text, *cmd, cwd=ROOT, quiet=False):
    print(f'== {text}', flush=True)
    run(*cmd, cwd=cwd, quiet=quiet)

def require(archive, names, wanted):
    "Every name in `wanted` ends the name of some file in the archive."
    if missing := [w for w in wanted if not any(n.endswith(w) for n in names)]: raise Failed(f'{archive.name} lacks {", ".join(missing)}')
    print(f'{archive.name}: {len(names)} files')

def main():
    shutil.rmtree(DIST, ignore_errors=True)
    step('building sdist, and the wheel from it', sys.executable, '-m', 'build', '--outdir', DIST, quiet=True)
    (sdist,), (wheel,) = DIST.glob('*.tar.gz'), DIST.glob('*.whl')
    modules = [p.relative_to(ROOT).as_posix() for p in (ROOT/'repq').rglob('*.py')]
    with tarfile.open(sdist) as t: require(sdist, t.getnames(), ['/LICENSE', '/README.md', '/settings.ini', '/setup.py', *modules])
    with zipfile.ZipFile(wheel) as z:
        require(wheel, z.namelist(), ['/LICENSE', '/METADATA', '/entry_points.txt', *modules])
        if alien := [n for n in z.namelist() if not re.match(r'repq[/-]', n)]: raise Failed(f'{wheel.name} also holds {alien[0]}')
    step('making a clean environment', sys.executable, '-m', 'venv', '--clear', ENV)
    py = ENV/'bin'/'python'
    step('installing the wheel with the newest that resolves (about 3 minutes, 6 GB)', py, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', wheel)
    step('pip check', py, '-m', 'pip', 'check')
    step('versions', py, '-c', "from importlib.metadata import version; print(*(f'{p} {version(p)}' for p in 'repq fastai fastcore torch torchvision'.split()))")
    with tempfile.TemporaryDirectory() as d:     # not in the repository, whose repq/ would hide the installed one
        step('repq demo --quick', ENV/'bin'/'repq', 'demo', '--quick', '--out', Path(d)/'demo', cwd=d)
        blocks = re.findall(r'^```python\n(.*?)^```', (ROOT/'README.md').read_text(encoding='utf-8'), flags=re.M|re.S)
        if not blocks: raise Failed('README.md has no Python')
        (Path(d)/'readme.py').write_text('\n\n'.join(blocks), encoding='utf-8')
        step(f"README.md's Python, {len(blocks)} blocks", py, 'readme.py', cwd=d)
    shutil.rmtree(ENV)
    print(f'test-wheel: {wheel.name} works')

if __name__ == '__main__':
    try: main()
    except Failed as e: sys.exit(f'test-wheel: {e}')
