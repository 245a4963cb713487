"""What `make test` runs. `check.py STEP...` runs the steps named, in order; each prints a line that says what it counted.
Options of pytest come after `--`. Nothing here needs git, a clean working tree or a network."""
import json, os, re, shutil, subprocess, sys, tempfile, time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from browser import browser, find_browser
from page import build
from readme import ROOT, directives, lines, out_of_step

BIN = Path(sys.executable).parent   # not resolved: the environment's, not the interpreter's it was made from
NBS, LIB, PROC, DOCS = ROOT/'nbs', ROOT/'repq', ROOT/'_proc', ROOT/'_docs'

class Failed(Exception): "A step failed; the message says what to do about it."

def run(*cmd, cwd=ROOT, quiet=False):
    "Run `cmd`, without input; with `quiet` its output is shown only if it fails."
    kw = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) if quiet else {}
    res = subprocess.run([str(c) for c in cmd], cwd=cwd, stdin=subprocess.DEVNULL, **kw)
    if res.returncode: raise Failed((res.stdout or '') + f'{Path(str(cmd[0])).name} ended with status {res.returncode}')
    return res.stdout

def workers():
    "How many processes of one thread the cores, and the memory, are for."
    return int(run(sys.executable, '-c', 'from repq.training.processes import workers_for; print(workers_for(8, 2**31))', quiet=True))

def notebooks(folder=NBS):
    "The notebooks nbdev would look at: not in hidden or underscored folders."
    found = (p.relative_to(folder) for p in folder.rglob('*.ipynb'))
    return sorted(p for p in found if not any(s[0] in '._' for s in p.parts))

def exported(path):
    "Is this module written from a notebook? Those in repq/ itself gather chapters under the names that users import."
    return path.parts[0] == 'repq' and path.name != '__init__.py' and (len(path.parts) > 2 or path.name == '_modidx.py')

def in_copy(command, drop_modules=False):
    "Run an nbdev command in a copy of the project; return the paths that it changed, made or (of what was dropped) did not make again."
    with tempfile.TemporaryDirectory() as d:
        d = Path(d).resolve()/'repq'
        kept = [Path('settings.ini'), Path('pyproject.toml'), *(Path('nbs')/p for p in notebooks()), *(p.relative_to(ROOT) for p in LIB.rglob('*.py'))]
        for p in kept:
            if drop_modules and exported(p): continue
            (d/p).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT/p, d/p)
        log = run(BIN/command, cwd=d, quiet=True)
        if 'Failed to' in log: raise Failed(log)
        after = [p.relative_to(d) for ext in ('*.py', '*.ipynb', '*.toml') for p in d.rglob(ext)]
        read = lambda p: p.read_bytes() if p.is_file() else None
        return sorted(str(p) for p in {*kept, *after} if read(ROOT/p) != read(d/p))

def export():
    "Exported modules are what the notebooks export, no more and no less."
    if differ := in_copy('nbdev_export', drop_modules=True):
        raise Failed('not in step with the notebooks: ' + ', '.join(differ) + '\nEdit the notebook, not the module, and run `make export`.')
    return f"{sum(exported(p.relative_to(ROOT)) for p in LIB.rglob('*.py')) - 1} modules in step with their notebooks"

def warnings_kept():
    "Notebooks whose outputs hold what went to stderr, warnings, or folders of the machine that they were run on."
    def outputs(p): return [o for c in json.loads((NBS/p).read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])]
    def said(o): return lines(o.get('text', '')) + ''.join(lines(v) for k, v in o.get('data', {}).items() if k.startswith('text/'))
    def of_the_machine(o): return o.get('name') == 'stderr' or re.search(r'(?<![\w.])/(tmp|home|root|Users)/|/site-packages/|\w+Warning: ', said(o))
    return [str(p) for p in notebooks() if any(of_the_machine(o) for o in outputs(p))]

def clean():
    "Notebooks hold no metadata or execution counts that nbdev_clean would take out, and no warnings of the machine they were run on."
    if differ := in_copy('nbdev_clean'): raise Failed('not clean: ' + ', '.join(differ) + '\nRun `make export`.')
    if kept := warnings_kept(): raise Failed('outputs on stderr, warnings or paths of this machine are kept in ' + ', '.join(kept) + '\nSilence the warning, or delete the output.')
    return f'{len(notebooks())} notebooks clean'

def lint():
    "Nothing that is plainly wrong: unused imports and names, undefined ones, shadowed functions (pyproject.toml says which rules)."
    paths = [p for p in ('nbs', 'repq', 'tests', 'scripts', 'setup.py') if (ROOT/p).exists()]
    run(BIN/'ruff', 'check', '--no-cache', '--quiet', '--output-format', 'concise', *paths, quiet=True)
    return 'nothing found by ruff in ' + ', '.join(paths)

def readme():
    "README.md is what nbs/index.ipynb gives."
    if not (NBS/'index.ipynb').exists(): raise Failed('there is no nbs/index.ipynb')
    want, differ = out_of_step()
    if differ: raise Failed('not in step with nbs/index.ipynb: ' + ', '.join(differ) + '\nRun `make readme`.')
    return f'README.md and {len(want)-1} figures in step with nbs/index.ipynb'

def executed():
    "How many code cells nbdev_test runs, and how many it leaves out for a flag."
    flags = set(re.search(r'^tst_flags *= *(.*)$', (ROOT/'settings.ini').read_text(), flags=re.M)[1].split())
    cells = [directives(lines(c['source']))[0] for p in notebooks() for c in json.loads((NBS/p).read_text(encoding='utf-8'))['cells']
             if c['cell_type'] == 'code']
    out = sum(bool(flags & set(d)) or d.get('eval', '').lower() == 'false' for d in cells)
    return len(cells) - out, out

def nbs():
    "Every notebook runs from top to bottom."
    if not notebooks(): raise Failed('there are no notebooks in nbs/')
    run(BIN/'nbdev_test', '--n_workers', workers(), '--do_print', '--timing')
    done, left_out = executed()
    return f'{len(notebooks())} notebooks executed: {done} cells, {left_out} more left out for their flags'

# documentation

def sidebar(o):
    "Every page in the sidebar's `contents`, patterns expanded."
    if isinstance(o, list): return [p for x in o for p in sidebar(x)]
    if isinstance(o, dict): return sidebar(o.get('contents', [])) + sidebar(o.get('href', []))
    return [p.relative_to(NBS).as_posix() for p in sorted(NBS.glob(o))] or [o]

def render():
    "Process the notebooks as nbdev does and render them, by Quarto if it is there, into _docs/."
    config = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    listed, there = sidebar(config['website']['sidebar']['contents']), [p.as_posix() for p in notebooks()]
    if wrong := sorted(set(listed) ^ set(there)):
        raise Failed('the sidebar in _quarto.yml and the notebooks differ: ' + ', '.join(f"{p} ({'not a notebook' if p in listed else 'not listed'})" for p in wrong))
    try: run(sys.executable, ROOT/'scripts'/'pages.py', workers(), quiet=True)
    except Failed as e:
        said = re.sub(r'(?s)^.*?(?=^Exception: Error in notebook)', '', str(e), flags=re.M)     # without nbdev's traceback
        raise Failed(f'{said}\nTo document a module nbdev executes exported cells and every cell with an import, no others: '
                     'keep imports in cells of their own, and leave the working directory alone there.')
    shutil.copyfile(ROOT/'_quarto.yml', PROC/'_quarto.yml')
    site = PROC/config['project']['output-dir']
    if shutil.which('quarto'):
        by = 'Quarto'
        run('quarto', 'render', '--no-cache', cwd=PROC)
    elif (BIN/'smalldocs').exists():
        by = 'smalldocs, standing in for Quarto, which is not installed'
        log = run(BIN/'smalldocs', 'render', '--quiet', PROC, quiet=True)
        print('\n'.join(l for l in log.splitlines() if 'output-file is not read' not in l), end='')
    else:
        by = 'nbconvert, without navigation and anchors: neither Quarto nor smalldocs (Python 3.11 or newer) is installed'
        nbconvert(site)
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(site, DOCS)
    with_runtime = build(DOCS/'run')
    return by + ('' if with_runtime else ' (the page that runs has no runtime: make runtime fetches it)')

def nbconvert(site):
    "Bare pages, so that links can be checked where neither renderer runs."
    for p in notebooks(PROC):
        out = site/p.parent
        run(BIN/'jupyter', 'nbconvert', '--log-level=CRITICAL', '--to=html', f'--output-dir={out}', PROC/p)
        page = out/f'{p.stem}.html'
        page.write_text(re.sub(r'(href="[^":]*)\.ipynb', r'\1.html', page.read_text(encoding='utf-8')), encoding='utf-8')
    for p in PROC.rglob('*'):
        if p.suffix in ('.png', '.svg', '.css') and site not in p.parents:
            (site/p.relative_to(PROC)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(p, site/p.relative_to(PROC))

class Page(HTMLParser):
    "The links that a page makes and the anchors that it offers."
    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.silent = set(), set(), []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.anchors |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'img' and not (a.get('alt') or '').strip() and a.get('aria-hidden') != 'true': self.silent.append((a.get('src') or '')[:40])
        if tag not in ('base', 'meta'): self.links |= {a[k] for k in ('href', 'src') if a.get(k)}

def github_page(path):
    "A markdown file as GitHub shows it: its links, and an anchor for each heading."
    text = re.sub(r'^```.*?^```', '', path.read_text(encoding='utf-8'), flags=re.M|re.S)
    page = Page(text)
    page.links |= set(re.findall(r'\]\(([^)\s]+)', text))
    page.anchors |= {re.sub(r'[^\w\- ]', '', h.lower()).strip().replace(' ', '-') for h in re.findall(r'^#+ +(.*)$', text, flags=re.M)}
    return page

def output_names():
    "nbdev names 00_kernels' page kernels.html, which Quarto follows; a stand-in may not. {kernels.html: 00_kernels.html}"
    strip = lambda p: p.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.name)).with_suffix('.html')
    return {DOCS/strip(p): DOCS/p.with_suffix('.html') for p in notebooks()}

def broken(link, source, pages, also, site_url, repo_url):
    "What is wrong with `link`, on the page or file `source`: '' if it resolves, None if it leads elsewhere in the world."
    link = unescape(link).strip()
    if m := re.match(re.escape(repo_url) + r'/(?:blob|tree|raw)/[^/]+/([^?#]+)', link):     # a file of ours on GitHub: is it in this tree?
        return '' if (ROOT/unquote(m[1])).exists() else 'no such file in the repository'
    base, page = source.parent, source
    if re.match(re.escape(site_url) + r'(?=[/?#]|$)', link):                                # our own site, by its full address
        link, base, page = link[len(site_url):].lstrip('/'), DOCS, DOCS/'index.html'
    u = urlsplit(link)
    if u.scheme or u.netloc: return None
    if u.path.startswith('/'): return 'starts at the root of the host: make it relative'
    target = Path(os.path.normpath(base/unquote(u.path))) if u.path else page
    if target == DOCS or target.is_dir() and DOCS in target.parents: target = target/'index.html'
    if not target.exists(): target = also.get(target, target)
    if not target.exists(): return 'no such file'
    if DOCS in source.parents and DOCS not in target.parents: return 'leads out of the site'
    if u.fragment and target in pages and pages[target].anchors and unquote(u.fragment) not in pages[target].anchors | {'top'}: return 'no such anchor'
    return ''

def check_links(anchors=True):
    "Links within the site, the repository's markdown files, and to either; those that lead elsewhere are not followed."
    config = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']
    pages = {p: Page(p.read_text(encoding='utf-8')) for p in sorted(DOCS.rglob('*.html'))}
    for page in pages.values(): page.anchors = page.anchors if anchors else None
    pages |= {p: github_page(p) for p in sorted(ROOT.glob('*.md'))}
    args = pages, output_names(), config['site-url'].rstrip('/'), config['repo-url'].rstrip('/')
    found = [(p, l, why) for p, page in pages.items() for l in sorted(page.links) if (why := broken(l, p, *args)) is not None]
    if wrong := [o for o in found if o[2]]:
        raise Failed('broken links:\n' + '\n'.join(f'  {p.relative_to(ROOT)}: {l} ({why})' for p, l, why in wrong))
    return len(pages), len(found)

def check_pictures():
    "Every picture has an alternative text."
    silent = {p: s for p in sorted(DOCS.rglob('*.html')) if (s := Page(p.read_text(encoding='utf-8')).silent)}
    if silent: raise Failed('pictures without alternative text (`#| fig-alt:` in the cell):\n' + '\n'.join(f'  {p.relative_to(DOCS)}: {len(s)}, {s[0]}' for p, s in silent.items()))

# of a page as it is laid out: is it wider than the window, and which lines of code end outside their box?
LAYOUT = """(width => {
  const wide = document.documentElement.scrollWidth, res = []
  if (wide > width + 1) {       // a phone's own innerWidth grows with what is too wide
    const out = [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > width + 1).map(e => e.tagName.toLowerCase() + '.' + e.className).slice(-1)
    res.push(`scrolls sideways, ${wide} pixels, as far as ${out}`)
  }
  const cut = [...document.querySelectorAll('pre.sourceCode, pre:has(> code.sourceCode), pre:has(> code[class*=language-]), .cell-code pre')].filter(e => [e, ...e.querySelectorAll('code')].some(b => b.scrollWidth > b.clientWidth + 1 && getComputedStyle(b).display != 'inline'))
  if (cut.length) res.push(`${cut.length} blocks of code are cut off, the first: ${cut[0].innerText.slice(0, 60)}`)
  return res
})"""

def check_layout(widths=(390, 1280)):
    "No page scrolls sideways or cuts code off, on a phone and on a desk; says how many were looked at"
    if not find_browser(): return 'not laid out: no Chromium is installed (REPQ_BROWSER, or chromium on PATH)'
    wrong, pages = [], sorted(DOCS.rglob('*.html'))
    with browser() as tab:
        tab.send('Network.enable'); tab.send('Network.setBlockedURLs', urls=['http://*', 'https://*'])     # what a page has from elsewhere is not waited for
        for p in pages:
            tab.open(p.resolve().as_uri())
            for width in widths:
                tab.size(width, phone=width < 768)
                wrong += [f'{p.relative_to(DOCS)} at {width} pixels {w}' for w in tab.js(f'{LAYOUT}({width})')]
    if wrong: raise Failed('layout:\n' + '\n'.join(f'  {w}' for w in wrong))
    return f'{len(pages)} pages laid out at {" and ".join(map(str, widths))} pixels, nothing cut off'

def docs():
    "The documentation renders, its links resolve, its pictures have alternative texts, and nothing is cut off."
    by = render()
    missing = [str(p) for p in notebooks() if not (DOCS/p.with_suffix('.html')).exists() and not
               any(k.exists() for k, v in output_names().items() if v == DOCS/p.with_suffix('.html'))]
    if missing: raise Failed('no page was rendered for ' + ', '.join(missing))
    n, links = check_links(anchors='nbconvert' not in by)     # whose anchors are spelled otherwise
    laid_out = 'not laid out'
    if 'nbconvert' not in by:
        check_pictures()
        laid_out = check_layout()
    return f'{len(notebooks())} pages in _docs/ rendered by {by}; {links} links on {n} pages and markdown files resolve (those that lead elsewhere are not followed); {laid_out}'

def pytest(*args):
    "The integration tests; their own closing line has the count."
    run(sys.executable, '-m', 'pytest', 'tests', '-n', workers(), *args)

STEPS = dict(export=export, clean=clean, lint=lint, readme=readme, notebooks=nbs, docs=docs, pytest=pytest)

def main(argv):
    cut = argv.index('--') if '--' in argv else len(argv)
    steps, options = argv[:cut], argv[cut+1:]
    if bad := [s for s in steps if s not in STEPS]: sys.exit(f"unknown step {', '.join(bad)}; there are {', '.join(STEPS)}")
    os.environ['OMP_NUM_THREADS'] = '1'     # faster, for small networks, when several processes share the cores
    os.environ.pop('IN_TEST', None)         # with it set, nbdev_export does nothing
    failed = []
    for s in steps:
        t, args = time.time(), options if s == 'pytest' else []
        if s == 'pytest': print('== pytest', flush=True)
        try: said, mark = STEPS[s](*args), 'ok'
        except Failed as e: said, mark = str(e), 'FAILED'; failed.append(s)
        if said: print(f'== {s}: {mark} ({time.time()-t:.0f} s): {said}', flush=True)
    if failed: sys.exit('FAILED: ' + ', '.join(failed))

if __name__ == '__main__': main(sys.argv[1:])
