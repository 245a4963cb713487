"The house: which chapter may build on which, how long one may be, and the names under which users import."
import ast, importlib, json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ['1_method', '2_networks', '3_training', '4_deploy', '5_commands']
CHAPTERS = [p for part in PARTS for p in sorted((ROOT/'nbs'/part).glob('[0-9]*.ipynb'))]
NAMES = json.loads((ROOT/'tests'/'names.json').read_text())   # of version 0.1.0

def code(p): return [''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
def exported(p): return [s for s in code(p) if re.search(r'^#\| exports?\b', s, re.M)]
def module(p): return next(s.split()[-1] for s in code(p) if s.startswith('#| default_exp'))
ORDER = {f'repq.{module(p)}': i for i, p in enumerate(CHAPTERS)}

def gathers(name):
    "The chapters that a module in repq/ itself gathers"
    tree = ast.parse((ROOT/'repq'/f'{name}.py').read_text(encoding='utf-8'))
    return [n.module for n in tree.body if isinstance(n, ast.ImportFrom)]

def imported(p):
    "Chapters that the exported code of a chapter imports"
    tree = ast.parse('\n'.join(exported(p)))
    for n in ast.walk(tree):
        if not isinstance(n, ast.ImportFrom) or not (n.module or '').startswith('repq'): continue
        if n.module in ORDER: yield n.module
        for a in n.names:
            if f'{n.module}.{a.name}' in ORDER: yield f'{n.module}.{a.name}'
            elif n.module == 'repq' and a.name in NAMES: yield from gathers(a.name)

def test_every_chapter_is_in_its_part():
    for p in CHAPTERS: assert module(p).split('.')[0] == p.parent.name.split('_')[1], p
    assert len(ORDER) == len(CHAPTERS)

@pytest.mark.parametrize('p', CHAPTERS, ids=lambda p: p.stem)
def test_chapter(p):
    "Builds on chapters before it, borrows nothing private, and is read in one sitting"
    late = [m for m in imported(p) if ORDER[m] >= ORDER[f'repq.{module(p)}']]
    assert not late, f'{p.name} builds on later chapters: {late}'
    private = re.findall(r'^from repq[\w.]* import .*\b(_[a-z]\w*)', '\n'.join(exported(p)), re.M)
    assert not private, f'{p.name} borrows {private}'
    lines = [l for s in exported(p) for l in s.splitlines() if not l.startswith('#|')]
    assert len(lines) <= 300, f'{p.name} exports {len(lines)} lines: split it'

@pytest.mark.parametrize('name', NAMES)
def test_names_of_the_first_version(name):
    m = importlib.import_module(f'repq.{name}')
    assert not [n for n in NAMES[name] if not hasattr(m, n)]

def test_pages_list_every_chapter():
    text = lambda cells: ''.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    cells = lambda p: json.loads(p.read_text(encoding='utf-8'))['cells']
    outputs = [o for c in cells(ROOT/'nbs'/'index.ipynb') for o in c.get('outputs', []) if o['output_type'] == 'display_data' or o['output_type'] == 'execute_result']
    book = ''.join(''.join(o['data'].get('text/markdown', '')) for o in outputs)
    for p in CHAPTERS:
        assert f']({p.name})' in text(cells(p.parent/'index.ipynb')), p
        assert f']({p.parent.name}/{p.name})' in book, f'{p}: run nbs/index.ipynb again, which lists the chapters'
