"The rules of the house: who may import whom, what a notebook looks like, what may not stand in it."
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY, NOTEBOOKS = ROOT/'mimstudy', ROOT/'nbs'
EXPORT = re.compile(r'#\|\s*exports?\b')
DIRECTIVE = re.compile(r'#\|\s*default_exp\s+(\S+)')


def cells_of(file): return json.loads(file.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])
def is_code(cell): return cell['cell_type'] == 'code'
def is_export(cell): return is_code(cell) and bool(EXPORT.match(source(cell).lstrip()))
def code_lines(text): return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith('#|')]
def name_of(file): return file.relative_to(NOTEBOOKS).as_posix()


def module_of(file):
    "The module that a notebook exports, or None."
    found = [m.group(1) for cell in cells_of(file) if is_code(cell) for m in DIRECTIVE.finditer(source(cell))]
    return found[0] if found else None


def tree(text):
    "The syntax tree of a cell, with its magics left out; None where nothing is left."
    kept = '\n'.join('' if re.match(r'\s*[%!]', line) else line for line in text.splitlines())
    return ast.parse(kept)


ALL = sorted(f for f in NOTEBOOKS.rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)
EXPORTING = [f for f in ALL if module_of(f)]
RUN = [f for f in ALL if f.parent.name == 'run']
MODULES = sorted(f for f in LIBRARY.rglob('*.py') if not f.name.startswith('_'))
every_notebook = pytest.mark.parametrize('file', ALL, ids=name_of)
exporting = pytest.mark.parametrize('file', EXPORTING, ids=name_of)


# -- floors ---------------------------------------------------------------------------------------------------------

FLOORS = dict(core=(), parts=('core',), engine=('core',), methods=('core', 'parts'), evaluate=('core', 'parts', 'engine'),
              analysis=('core', 'parts', 'study.results'), study=('core', 'parts', 'engine', 'methods', 'evaluate', 'analysis', 'study'))
NUMBERED, PEERS = ('core', 'parts', 'engine'), ('methods', 'evaluate')
NUMBERS = {module_of(f): int(m.group(1)) for f in EXPORTING if (m := re.match(r'(\d+)_', f.name))}


def ours(file):
    "The modules of this library that a file imports, as 'floor.room'."
    package = ('mimstudy', *file.relative_to(LIBRARY).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom): names = ['.'.join((*(package[:len(package) + 1 - node.level] if node.level else ()), node.module or ''))]
        else: continue
        yield from (n.removeprefix('mimstudy.') for n in names if n.startswith('mimstudy.') and n.count('.') > 1)


def allowed(room, other):
    "Whether the floors let `room` import `other`."
    floor, above = room.split('.')[0], other.split('.')[0]
    if floor == above and floor in NUMBERED: return NUMBERS[other] < NUMBERS[room]
    if floor == above and floor in PEERS: return room.endswith('.catalogue') or other == 'evaluate.features'
    return floor == above or any(other == may or other.startswith(may + '.') for may in FLOORS[floor])


@pytest.mark.parametrize('file', MODULES, ids=lambda f: f.relative_to(LIBRARY).as_posix())
def test_floors(file):
    room = '.'.join(file.relative_to(LIBRARY).with_suffix('').parts)
    assert not (wrong := sorted(other for other in set(ours(file)) if not allowed(room, other))), f'{room} may not import {wrong}'


def test_floors_notice_a_wrong_import():
    assert not allowed('parts.masks', 'engine.train') and not allowed('methods.beit', 'methods.conmim') and not allowed('analysis.figures', 'study.tables')
    assert allowed('methods.catalogue', 'methods.beit') and allowed('analysis.figures', 'study.results')


# -- modules and notebooks belong together --------------------------------------------------------------------------

@pytest.mark.parametrize('file', MODULES, ids=lambda f: f.relative_to(LIBRARY).as_posix())
def test_module_has_its_notebook(file):
    head = re.search(r'File to edit: (\S+\.ipynb)', file.read_text(encoding='utf-8'))
    assert head, f'{file.name} was not made from a notebook'
    notebook = (file.parent/head.group(1)).resolve()
    assert notebook.is_file(), f'{file.name} comes from {head.group(1)}, which is not there'
    assert LIBRARY/(module_of(notebook).replace('.', '/') + '.py') == file


@exporting
def test_notebook_has_its_module_and_its_name(file):
    floor, room = module_of(file).split('.')
    assert file.parent.name == floor and re.sub(r'^\d+_', '', file.stem) == room, 'the path of a notebook is the path of its module'
    assert (LIBRARY/floor/f'{room}.py').is_file(), 'run nbdev-export'


def test_numbers_stand_where_order_is_an_argument():
    for file in EXPORTING: assert bool(re.match(r'\d+_', file.name)) == (file.parent.name in (*NUMBERED, 'study')), name_of(file)


def test_no_drawers():
    drawers = {'utils', 'util', 'misc', 'helper', 'helpers', 'base', 'basics', 'common', 'tools'}
    assert not [f for f in MODULES if f.stem in drawers or re.search(r'_v\d$|^(my|new)_', f.stem)]


@pytest.mark.slow
def test_export_and_clean_change_nothing(tmp_path):
    for name in ('nbs', 'mimstudy'): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('pyproject.toml', 'settings.ini'): shutil.copy(ROOT/name, tmp_path)
    for tool in ('nbdev-clean', 'nbdev-export'):
        subprocess.run([Path(sys.executable).parent/tool], cwd=tmp_path, check=True, capture_output=True)
    for file in [*ALL, *MODULES, LIBRARY/'_modidx.py']:
        assert file.read_bytes() == (tmp_path/file.relative_to(ROOT)).read_bytes(), f'{file.relative_to(ROOT)}: run nbdev-export && nbdev-clean'


# -- what a notebook looks like -------------------------------------------------------------------------------------

@every_notebook
def test_title_and_subtitle(file):
    cells = cells_of(file)
    if file in EXPORTING: assert DIRECTIVE.fullmatch(source(cells[0]).strip()), 'cell 1 is #| default_exp and nothing else'
    title = source(cells[1 if file in EXPORTING else 0])
    found = re.match(r'# \S.*\n\s*\n> (\S.*)', title)
    assert found, 'the first text cell is "# Title" and "> subtitle"'
    assert len(found.group(1).split()) <= 12, f'a subtitle of {len(found.group(1).split())} words'


@every_notebook
def test_sizes(file):
    cells = cells_of(file)
    assert len(cells) <= 90, f'{len(cells)} cells'
    assert file.stat().st_size <= 200_000, f'{file.stat().st_size//1000} kB'
    exports = [len(code_lines(source(c))) for c in cells if is_export(c)]
    assert sum(exports) <= 250, f'{sum(exports)} exported lines'
    assert max(exports, default=0) <= 40, f'an exported cell of {max(exports)} lines'


def test_exported_cells_are_short():
    lines = [len(code_lines(source(c))) for f in EXPORTING for c in cells_of(f) if is_export(c)]
    assert median(lines) <= 12, f'the median of all exported cells is {median(lines)} lines'


@every_notebook
def test_cells(file):
    for cell in filter(is_code, cells_of(file)):
        parsed = tree(source(cell))
        imports = [n for n in parsed.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not any(a.name == '*' for n in imports for a in n.names), f'a star import: {source(cell)[:60]}'
        assert len(imports) in (0, len(parsed.body)), f'imports mixed with other code: {source(cell)[:60]}'
        assert not any(isinstance(n, ast.Name) and n.id == 'NotImplementedError' for n in ast.walk(parsed))


@every_notebook
def test_words(file):
    for cell in cells_of(file):
        text = source(cell)
        assert not re.search(r'\b(TODO|FIXME|XXX)\b', text)
        if not is_code(cell): assert not re.search(r'\b(simply|note that)\b', text, re.I), text[:80]


@every_notebook
def test_outputs_name_no_machine(file):
    for cell in filter(is_code, cells_of(file)):
        for output in cell['outputs']:
            shown = dict(output.get('data', {}), text=output.get('text', ''), traceback=output.get('traceback', ''))
            text = json.dumps({k: v for k, v in shown.items() if not k.startswith('image/')})
            assert not (found := re.search(r'/(?:home|root|tmp|Users|work|private|var/folders)/[\w.\-/]*', text)), f'{found.group()} in the output of: {source(cell)[:60]}'
            assert '\\r' not in text, f'a progress bar in the output of: {source(cell)[:60]}'


def symbols(cell):
    "The public functions and classes that an exported cell defines."
    return [n.name for n in tree(source(cell)).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]


@exporting
def test_every_symbol_has_its_lesson(file):
    cells = cells_of(file)
    plain = [source(c) if is_code(c) and not is_export(c) else '' for c in cells]
    for i, cell in enumerate(cells):
        if not is_export(cell): continue
        for name in symbols(cell):
            assert re.search(rf'\b{name}\b', '\n'.join(plain[i + 1:])), f'{name} is used in no later plain cell'


@exporting
def test_every_symbol_has_a_docstring_of_one_line(file):
    for cell in filter(is_export, cells_of(file)):
        for node in tree(source(cell)).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
            assert (said := ast.get_docstring(node)), f'{node.name} has no docstring'
            assert '\n' not in said, f'the docstring of {node.name} is longer than a line'


@exporting
def test_prose(file):
    cells = cells_of(file)
    words = sum(len(source(c).split()) for c in cells if c['cell_type'] == 'markdown')
    named = sum(len(symbols(c)) for c in cells if is_export(c))
    assert words >= 20*named, f'{words} words for {named} public symbols'
    last = source([c for c in cells if c['cell_type'] == 'markdown'][-1])
    assert last.startswith('## What this room promises') and last.count('\n- ') == 3, 'close with three promises'


# -- run and analysis notebooks -------------------------------------------------------------------------------------

@pytest.mark.parametrize('file', RUN, ids=name_of)
def test_run_notebooks(file):
    cells = cells_of(file)
    assert module_of(file) is None and not any(map(is_export, cells)), 'a run notebook exports nothing'
    assert len(cells) <= 12, f'{len(cells)} cells'
    assert sum('parameters' in c['metadata'].get('tags', ()) for c in cells) == 1
    for cell in filter(is_code, cells):
        assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Lambda)) for n in ast.walk(tree(source(cell)))), 'its work belongs in the library'
        assert not cell['outputs'], 'run notebooks are kept without outputs'


def test_there_are_run_notebooks(): assert [f.stem for f in RUN] == ['evaluate', 'pretrain', 'row']


def test_analysis_trains_nothing():
    for file in (f for f in ALL if f.parent.name == 'analysis'):
        called = {getattr(n.func, 'attr', getattr(n.func, 'id', '')) for c in filter(is_code, cells_of(file)) for n in ast.walk(tree(source(c))) if isinstance(n, ast.Call)}
        assert not called & {'train', 'pretrain', 'backward', 'execute', 'run_row'}, name_of(file)


# -- the generated code ---------------------------------------------------------------------------------------------

def test_no_undefined_name():
    pytest.importorskip('ruff', reason='ruff is not installed')
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--select', 'F,E9', 'mimstudy'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_line_length():
    long = [f'{f.relative_to(ROOT)}:{i}' for f in MODULES for i, line in enumerate(f.read_text(encoding='utf-8').splitlines(), 1) if len(line) > 160]
    assert not long, long


def test_weights_are_loaded_safely():
    for file in MODULES:
        for call in (n for n in ast.walk(ast.parse(file.read_text(encoding='utf-8'))) if isinstance(n, ast.Call)):
            name, words = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            if name == 'torch.load': assert words.get('weights_only') == 'True', f'{file.name}: torch.load without weights_only=True'
            if name.endswith('.extractall') or name.endswith('.extract'): assert words.get('filter') == "'data'", f'{file.name}: {name} without filter'
