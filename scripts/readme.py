"Write README.md from nbs/index.ipynb: markdown as it stands, code as python blocks, outputs as text blocks or figures."
import base64, json, posixpath, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = {'hide', 'default_exp', 'export', 'exporti'}

def lines(o):
    "Notebook text, which is a string or a list of lines."
    return o if isinstance(o, str) else ''.join(o)

def directives(source):
    "Split a cell's source into {'#| key': value} and the code under it."
    found = dict(re.findall(r'^#\|\s*([\w-]+):?[ \t]*(.*)$', source, flags=re.M))
    return found, re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip('\n')

def relink(text):
    "Make links that are relative to nbs/ relative to the repository root; leave code blocks alone."
    def move(m):
        pre, url = m.groups()
        if re.match(r'[a-z][a-z0-9+.-]*:|[#/]', url): return m[0]
        path, mark, anchor = url.partition('#')
        return pre + posixpath.normpath(posixpath.join('nbs', path)) + mark + anchor
    parts = re.split(r'(^```.*?^```)', text, flags=re.M|re.S)
    for i in range(0, len(parts), 2):
        t = re.sub(r'(!\[[^\]]*\]\([^)]*\))\{[^}]*\}', r'\1', parts[i])         # an image's attributes are Quarto's only
        parts[i] = re.sub(r'(\]\(|\b(?:src|href)=")([^)\s"]+)', move, t)
    return ''.join(parts)

def text_block(s):
    s = re.sub(r'\x1b\[[0-9;]*m', '', s).rstrip('\n')
    return f'```text\n{s}\n```' if s.strip() else ''

def output(o, figures, alt=''):
    "One output as markdown; a picture, which `alt` describes, is added to `figures` (path: bytes)."
    if o['output_type'] == 'stream': return text_block(lines(o['text'])) if o['name'] == 'stdout' else ''
    if o['output_type'] == 'error': raise ValueError(f"nbs/index.ipynb holds an error: {o['ename']}: {o['evalue']}")
    data = o['data']
    for mime, ext in ('image/svg+xml', 'svg'), ('image/png', 'png'):
        if mime in data:
            path = f'README_files/figure-{len(figures)+1}.{ext}'
            figures[path] = lines(data[mime]).encode() if ext == 'svg' else base64.b64decode(lines(data[mime]))
            return f'![{alt}]({path})'
    if 'text/markdown' in data: return relink(lines(data['text/markdown']).strip())
    if 'text/html' in data and o['output_type'] == 'display_data': return '' # a progress bar, of a machine that was slow
    return text_block(lines(data.get('text/plain', '')))

def joined(outputs):
    "Outputs with a run of stdout as one: how often it was flushed is chance."
    res = []
    for o in outputs:
        if res and all(p['output_type'] == 'stream' and p['name'] == 'stdout' for p in (res[-1], o)): res[-1] = {**o, 'text': lines(res[-1]['text']) + lines(o['text'])}
        else: res.append(o)
    return res

def readme(nb_path=ROOT/'nbs'/'index.ipynb'):
    "The text of README.md and its figures, {path: bytes}."
    parts, figures = [], {}
    for cell in json.loads(Path(nb_path).read_text(encoding='utf-8'))['cells']:
        source = lines(cell['source'])
        if cell['cell_type'] == 'markdown': parts.append(relink(source.strip()))
        if cell['cell_type'] != 'code': continue
        flags, code = directives(source)
        if HIDDEN & set(flags) or flags.get('include') == 'false': continue
        if code and flags.get('echo') != 'false': parts.append(f'```python\n{code}\n```')
        alt = flags.get('fig-alt', '').strip('"')
        if flags.get('output') != 'false': parts += [output(o, figures, alt) for o in joined(cell['outputs'])]
    return '\n\n'.join(['<!-- Written by `make readme` from nbs/index.ipynb: edit that. -->'] + [p for p in parts if p]) + '\n', figures

def out_of_step():
    "What on disk differs from what the notebook gives."
    text, figures = readme()
    want = {'README.md': text.encode(), **figures}
    have = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in [ROOT/'README.md', *(ROOT/'README_files').glob('*')] if p.is_file()}
    return want, sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))

if __name__ == '__main__':
    want, changed = out_of_step()
    for name in changed:
        path = ROOT/name
        if name in want: path.parent.mkdir(exist_ok=True); path.write_bytes(want[name])
        else: path.unlink()
    print(f"README.md and {len(want)-1} figures; written: {', '.join(changed) or 'nothing, all in step'}")
