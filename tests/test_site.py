"The checks of the site, on pages that have what they look for; and how notebooks become pages."
import subprocess, sys
import pytest
from conftest import ROOT
sys.path.insert(0, str(ROOT/'scripts'))
import check
from browser import find_browser

PAGE = '<!DOCTYPE html><html lang="en"><meta name="viewport" content="width=device-width"><body style="margin:0"><main>{}</main></body></html>'
CODE = '<pre class="sourceCode" style="{}"><code class="sourceCode python">' + 'x'*300 + '</code></pre>'

def put(folder, monkeypatch, body):
    (folder/'page.html').write_text(PAGE.format(body))
    monkeypatch.setattr(check, 'DOCS', folder)

@pytest.mark.parametrize('img', ['<img src="a.png">', '<img src="a.png" alt="">', '<img src="a.png" alt=" ">'])
def test_pictures_need_words(img, tmp_path, monkeypatch):
    put(tmp_path, monkeypatch, img)
    with pytest.raises(check.Failed, match='page.html: 1'): check.check_pictures()
    put(tmp_path, monkeypatch, '<img src="a.png" alt="A cat">')
    check.check_pictures()

@pytest.mark.skipif(not find_browser(), reason='no Chromium: set REPQ_BROWSER')
@pytest.mark.parametrize('body, said', [
    (CODE.format('overflow: auto'), 'blocks of code are cut off'),
    (CODE.format('overflow: hidden'), 'blocks of code are cut off'),
    ('<div style="width: 1100px">wide</div>', 'at 390 pixels scrolls sideways'),
    ('<table><tr>' + '<td>wide</td>'*100 + '</table>', 'at 1280 pixels scrolls sideways')])
def test_layout_that_is_wrong(body, said, tmp_path, monkeypatch):
    put(tmp_path, monkeypatch, body)
    with pytest.raises(check.Failed, match=said): check.check_layout()

@pytest.mark.skipif(not find_browser(), reason='no Chromium: set REPQ_BROWSER')
def test_layout_that_is_right(tmp_path, monkeypatch):
    table = '<table style="display: block; overflow-x: auto"><tr>' + '<td>wide</td>'*100 + '</table>'
    put(tmp_path, monkeypatch, CODE.format('white-space: pre-wrap; overflow-wrap: anywhere') + table + '<pre style="overflow-x: auto">' + 'output '*100 + '</pre>')
    assert 'nothing cut off' in check.check_layout()

def test_without_a_browser_it_is_said(tmp_path, monkeypatch):
    put(tmp_path, monkeypatch, '')
    monkeypatch.setattr(check, 'find_browser', lambda: None)
    assert 'no Chromium' in check.check_layout()

# notebooks as pages; in a process of their own, since they change how nbdev writes signatures

NOTEBOOK = """
import sys; sys.path.insert(0, 'scripts')
from typing import Annotated, Any, Optional
from pathlib import Path
import pages
from nbdev.processors import NBProcessor
from execnb.nbio import mk_cell, new_nb
def f(a:Annotated[Path, 'help'], b:Optional[str]=None, c=None, d:dict[str, int]={}, # `pages.x`
      e:int|None=None, g:Any=1): "Has --resume and `--kept`"
text = str(pages.docments.DocmentText(f))
print(text)
print(pages.plain_options('a --resume b `--kept` -- x--y'))
cells = [mk_cell('#| export\\nfrom os import path'), mk_cell('#| export\\ndef first(): pass\\n\\ndef second(): pass'), mk_cell('#| hide\\nx = 1')]
nb = new_nb(cells)
p = NBProcessor(nb=nb, procs=[o for o in pages.Pages().procs() if o.__name__ not in ('run_exported', 'links', 'FrontmatterProc', 'insert_warning')])
p.process()
print([c.source for c in p.nb.cells])
"""

def test_notebooks_as_pages(tmp_path):
    (tmp_path/'pages_of_a_notebook.py').write_text(NOTEBOOK)
    out = subprocess.run([sys.executable, '-W', 'ignore', tmp_path/'pages_of_a_notebook.py'], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    signature, options, cells = out.stdout.rsplit('\n', 3)[:3]
    assert 'a:Path' in signature and 'b:str|None=None' in signature and ' c=None' in signature and 'd:dict[str,int]={}' in signature and 'e:int|None=None' in signature and 'g:Any=1' in signature
    assert options == 'a `--resume` b `--kept` -- x--y'
    assert eval(cells) == ['#| echo: false\n#| output: asis\nshow_doc(first)', '#| echo: false\n#| output: asis\nshow_doc(second)',
                           '#| code-fold: show\n#| code-summary: "Exported source"\ndef first(): pass\n\ndef second(): pass']
