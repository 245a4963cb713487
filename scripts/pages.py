"""How notebooks become pages, where that differs from nbdev: exported source is shown and can be folded, signatures have types and no markdown,
options in docstrings keep their two hyphens. `pages.py WORKERS` writes _proc/."""
import ast, atexit, inspect, re, sys, typing

import fastcore.docments as docments
import nbdev.serve
from nbdev.doclinks import NbdevLookup
from nbdev.processors import FilterDefaults, Processor, add_links, add_show_docs, exec_show_docs, mv_exports

# signatures

_own_name = docments._maybe_nm

def type_name(o):
    "An annotation as one writes it: without `Annotated`'s remarks, without modules"
    if o is inspect.Parameter.empty or isinstance(o, str): return _own_name(o)
    if typing.get_origin(o) is typing.Annotated: o = typing.get_args(o)[0]
    if isinstance(o, type) and not typing.get_args(o): return o.__name__
    if o in (typing.Any, type(None)) or not (typing.get_args(o) or type(o).__module__ in ('typing', 'types')): return _own_name(o)
    args = typing.get_args(o)
    if typing.get_origin(o) is typing.Union and type(None) in args and len(args) == 2: return type_name(next(a for a in args if a is not type(None))) + '|None'
    return re.sub(r'\b(?:\w+\.)+(?=\w)', '', inspect.formatannotation(o)).replace(' ', '')

_own_param = docments.DocmentText._fmt_param

def parameter(self, name, p):
    "A parameter; None as the default of one without annotation says nothing of its type"
    if p.get('anno') is type(None): p = {**p, 'anno': inspect.Parameter.empty}
    return _own_param(self, name, p)

docments._maybe_nm, docments.DocmentText._fmt_param = type_name, parameter

# cells

def only_imports(source):
    try: body = ast.parse(source).body
    except SyntaxError: return False
    return all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in body)

class show_exported(Processor):
    "Exported cells are shown: `exports` for `export`, imports excepted"
    def cell(self, cell):
        if cell.cell_type == 'code' and 'export' in cell.directives_ and 'hide' not in cell.directives_ and not only_imports(cell.source):
            cell.directives_['exports'] = cell.directives_.pop('export')

class run_exported(exec_show_docs):
    "nbdev's, but the shell of a notebook is not taken down at the end of the process: with all of them that takes longer than the work"
    def end(self):
        super().end()
        if hasattr(self, 'k'): atexit.unregister(self.k.atexit_operations)

class documentation_first(Processor):
    "What is said of the names of an exported cell stands before its source, in the order of the source"
    def begin(self):
        cells, res = list(self.nb.cells), []
        while cells:
            cell, said = cells.pop(0), []
            if cell.cell_type == 'code' and 'exports' in cell.directives_:
                while cells and getattr(cells[0], 'has_sd', 0): said.append(cells.pop(0))
            res += [*reversed(said), cell]
        self.nb.cells = res

def fold(cell):
    "Exported source, open, under a line that folds it"
    if cell.cell_type == 'code' and 'exports' in cell.directives_: cell.source = f'#| code-fold: show\n#| code-summary: "Exported source"\n{cell.source}'

def plain_options(line):
    "Options that typography would spoil, as code"
    parts = re.split(r'(`[^`]*`)', line)
    parts[::2] = [re.sub(r'(?<![\w-])--[a-z][\w-]*', r'`\g<0>`', p) for p in parts[::2]]
    return ''.join(parts)

def links(cell):
    "nbdev's `add_links`, but signatures are left alone"
    lookup = NbdevLookup()
    if cell.cell_type == 'markdown': cell.source = lookup.linkify(cell.source)
    for o in cell.get('outputs', []):
        if not (hasattr(o, 'data') and hasattr(o['data'], 'text/markdown')): continue
        text, fenced = ''.join(o.data['text/markdown']), False
        lines = text.splitlines(keepends=True)
        for i, line in enumerate(lines):
            if line.startswith('```'): fenced = not fenced
            elif not fenced: lines[i] = lookup.link_line(plain_options(line))
        o.data['text/markdown'] = lines

class Pages(FilterDefaults):
    def base_procs(self):
        own = {add_links: links, mv_exports: documentation_first, exec_show_docs: run_exported}
        procs = [own.get(p, p) for p in super().base_procs() if p.__name__ != 'add_fold']
        at = procs.index(add_show_docs)
        return [*procs[:at], show_exported, *procs[at:], fold]

if __name__ == '__main__':
    from pages import Pages     # under a name by which the processes find it
    nbdev.serve.FilterDefaults = Pages
    nbdev.serve.proc_nbs('nbs', n_workers=int(sys.argv[1]), force=True)
