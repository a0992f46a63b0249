"Rules of the project: the layers, notebooks and modules in agreement, sizes, vocabulary, safe loading."

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / 'mimstudy'
NOTEBOOKS = ROOT / 'nbs'
EXPORT = re.compile(r'#\|\s*exports?\b')
DIRECTIVE = re.compile(r'#\|\s*default_exp\s+(\S+)')


def cells_of(file):
    return json.loads(file.read_text(encoding='utf-8'))['cells']


def source(cell):
    return ''.join(cell['source'])


def is_code(cell):
    return cell['cell_type'] == 'code'


def is_export(cell):
    return is_code(cell) and bool(EXPORT.match(source(cell).lstrip()))


def path_of(file):
    return file.relative_to(ROOT).as_posix()


def module_of(file):
    "The module that a notebook exports, or None."
    for cell in filter(is_code, cells_of(file)):
        if found := DIRECTIVE.search(source(cell)):
            return found.group(1)
    return None


def tree(text):
    "The syntax tree of a cell without its magics."
    lines = ['' if re.match(r'\s*[%!]', line) else line for line in text.splitlines()]
    return ast.parse('\n'.join(lines))


ALL = sorted(f for f in NOTEBOOKS.rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)
EXPORTING = [f for f in ALL if module_of(f)]
RUN = [f for f in ALL if f.parent.name == 'run']
MODULES = sorted(f for f in LIBRARY.rglob('*.py') if not f.name.startswith('_'))
every_notebook = pytest.mark.parametrize('file', ALL, ids=path_of)
every_exporting_notebook = pytest.mark.parametrize('file', EXPORTING, ids=path_of)
every_module = pytest.mark.parametrize('file', MODULES, ids=path_of)


# -- layers ----------------------------------------------------------------------------------------

BELOW_STUDY = ('core', 'parts', 'engine', 'methods', 'evaluate', 'analysis', 'papers')
LAYERS = dict(
    core=(),
    parts=('core',),
    engine=('core',),
    methods=('core', 'parts'),
    evaluate=('core', 'parts', 'engine'),
    analysis=('core', 'parts'),
    papers=('core', 'engine.config', 'engine.training_config', 'methods.catalogue', 'evaluate.catalogue'),
    study=BELOW_STUDY,
    report=(
        'core',
        'parts',
        'analysis',
        'papers',
        'study.records',
        'study.score_frame',
        'study.encoder_files',
        'study.provenance',
        'engine.files',
    ),
    cli=(*BELOW_STUDY, 'study', 'report'),
)
NUMBERED = (
    'core',
    'parts',
    'engine',
    'papers',
    'study',
    'report',
    'cli',
)  # import only what has a lower number
PEERS = ('methods', 'evaluate')  # only the catalogue imports its peers
SHARED = ('evaluate.features',)  # peers that all others may import
NUMBERS = {module_of(f): int(m.group(1)) for f in EXPORTING if (m := re.match(r'(\d+)_', f.name))}


def imported(file):
    "The modules of this library that a file imports, as 'layer.module'."
    package = ('mimstudy', *file.relative_to(LIBRARY).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else ()
            module = '.'.join(filter(None, (*parents, node.module or '')))
            names = [module, *(f'{module}.{alias.name}' for alias in node.names)]
        for name in names:
            inside = name.removeprefix('mimstudy.')
            if name.startswith('mimstudy.') and (LIBRARY / (inside.replace('.', '/') + '.py')).is_file():
                yield inside


def allowed(module, other):
    "Whether the layers let `module` import `other`."
    layer, other_layer = module.split('.')[0], other.split('.')[0]
    if layer == other_layer and layer in NUMBERED:
        return NUMBERS[other] < NUMBERS[module]
    if layer == other_layer and layer in PEERS:
        return module.endswith('.catalogue') or other in SHARED
    if layer == other_layer:
        return True
    return any(other == name or other.startswith(f'{name}.') for name in LAYERS[layer])


@every_module
def test_layers(file):
    module = '.'.join(file.relative_to(LIBRARY).with_suffix('').parts)
    wrong = sorted(other for other in set(imported(file)) if not allowed(module, other))
    assert not wrong, f'{module} may not import {wrong}'


def test_layers_notice_a_wrong_import():
    assert not allowed('parts.masks', 'engine.train')
    assert not allowed('methods.beit', 'methods.conmim')
    assert not allowed('analysis.attention', 'study.records')
    assert not allowed('study.row', 'report.pages')
    assert allowed('methods.catalogue', 'methods.beit')
    assert allowed('report.tables', 'study.records')


# -- modules and notebooks agree -------------------------------------------------------------------


@every_module
def test_module_has_its_notebook(file):
    head = re.search(r'File to edit: (\S+\.ipynb)', file.read_text(encoding='utf-8'))
    assert head, f'{file.name} was not made from a notebook'
    notebook = (file.parent / head.group(1)).resolve()
    assert notebook.is_file(), f'{file.name} comes from {head.group(1)}, which does not exist'
    assert LIBRARY / (module_of(notebook).replace('.', '/') + '.py') == file


@every_exporting_notebook
def test_notebook_has_its_module_and_its_name(file):
    layer, module = module_of(file).split('.')
    name = re.sub(r'^\d+_', '', file.stem)
    assert (file.parent.name, name) == (layer, module), 'the path of a notebook is the path of its module'
    assert (LIBRARY / layer / f'{module}.py').is_file(), 'run nbdev-export'


def test_numbers_appear_where_order_matters():
    for file in EXPORTING:
        assert bool(re.match(r'\d+_', file.name)) == (file.parent.name in NUMBERED), path_of(file)


def test_no_catch_all_modules():
    names = {'utils', 'util', 'misc', 'helper', 'helpers', 'base', 'basics', 'common', 'tools'}
    assert not [f for f in MODULES if f.stem in names or re.search(r'_v\d$|^(my|new)_', f.stem)]


@pytest.mark.slow
def test_export_clean_and_update_change_nothing(tmp_path):
    for name in ('nbs', 'mimstudy'):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
        )
    for name in ('pyproject.toml', 'settings.ini'):
        shutil.copy(ROOT / name, tmp_path)
    for tool in ('nbdev-clean', 'nbdev-export', 'nbdev-update'):  # update writes modules back into notebooks
        subprocess.run([Path(sys.executable).parent / tool], cwd=tmp_path, check=True, capture_output=True)
    for file in [*ALL, *MODULES, LIBRARY / '_modidx.py']:
        same = file.read_bytes() == (tmp_path / file.relative_to(ROOT)).read_bytes()
        assert same, f'{path_of(file)}: run nbdev-export, nbdev-clean and nbdev-update'


# -- notebooks -------------------------------------------------------------------------------------


@every_notebook
def test_title_and_summary(file):
    cells = cells_of(file)
    if file in EXPORTING:
        assert DIRECTIVE.fullmatch(source(cells[0]).strip()), 'cell 1 is #| default_exp and nothing else'
    title = source(cells[1 if file in EXPORTING else 0])
    assert re.match(r'# \S.*\n\s*\n> \S.*', title), 'the first text cell is "# Title" and "> summary"'


@every_notebook
def test_size(file):
    assert file.stat().st_size <= 200_000, f'{file.stat().st_size // 1000} kB'


@every_notebook
def test_imports(file):
    for cell in filter(is_code, cells_of(file)):
        parsed = tree(source(cell))
        imports = [n for n in parsed.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        star = any(alias.name == '*' for n in imports for alias in n.names)
        assert not star, f'a star import: {source(cell)[:60]}'
        assert len(imports) in (0, len(parsed.body)), f'imports mixed with other code: {source(cell)[:60]}'


@every_notebook
def test_outputs_name_no_machine_and_hold_no_progress_bar(file):
    machine = r'/(?:home|root|tmp|Users|work|private|var/folders)/[\w.\-/]*'
    for cell in filter(is_code, cells_of(file)):
        for output in cell['outputs']:
            shown = dict(
                output.get('data', {}), text=output.get('text', ''), traceback=output.get('traceback', '')
            )
            text = json.dumps({k: v for k, v in shown.items() if not k.startswith('image/')})
            found = re.search(machine, text)
            assert not found, f'{found.group()} in the output of: {source(cell)[:60]}'
            assert '\\r' not in text, f'a progress bar in the output of: {source(cell)[:60]}'
            assert output['output_type'] != 'error', f'an error in the output of: {source(cell)[:60]}'


@pytest.mark.parametrize('file', RUN, ids=path_of)
def test_run_notebooks(file):
    cells = cells_of(file)
    assert module_of(file) is None and not any(map(is_export, cells)), 'a run notebook exports nothing'
    assert sum('parameters' in c['metadata'].get('tags', ()) for c in cells) == 1
    for cell in filter(is_code, cells):
        defined = [n for n in ast.walk(tree(source(cell))) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        assert not defined, 'functions belong in the library'
        assert not cell['outputs'], 'run notebooks are kept without outputs'


def test_analysis_trains_nothing():
    training = {'train', 'pretrain', 'backward', 'execute', 'run_row'}
    for file in (f for f in ALL if f.parent.name == 'analysis'):
        for cell in filter(is_code, cells_of(file)):
            calls = [n.func for n in ast.walk(tree(source(cell))) if isinstance(n, ast.Call)]
            called = {getattr(f, 'attr', getattr(f, 'id', '')) for f in calls}
            assert not called & training, path_of(file)


def test_links_between_notebooks_lead_somewhere():
    missing = []
    for file in [*ALL, *ROOT.glob('*.md')]:
        texts = (
            [file.read_text('utf-8')]
            if file.suffix == '.md'
            else [source(c) for c in cells_of(file) if not is_code(c)]
        )
        for target in re.findall(r'\]\(([^)#:\s]+)(?:#[^)]*)?\)', '\n'.join(texts)):
            if not (file.parent / target).exists():
                missing.append(f'{path_of(file)}: {target}')
    assert not missing, missing


# -- vocabulary ------------------------------------------------------------------------------------

WORDS = (
    r'pictures?|data sets?|slow cop(?:y|ies)|slow twins?|slow network|doors?|this (?:room|house|floor)|'
    r'the house|'
    r'sureness|mean asked|journals?|crew|followers?|promises?|pric(?:e|es|ey)|trained on top|simply|note that'
)
PRIVATE_WORDS = re.compile(rf'\b({WORDS})\b', re.I)
READ = [
    *ALL,
    *(
        f
        for f in ROOT.rglob('*')
        if f.suffix in ('.py', '.md', '.toml', '.sh', '.cff', '.yml')
        and not {'.venv', '.git', 'results', 'build'} & set(f.relative_to(ROOT).parts[:1])
        and 'golden' not in f.parts
        and f.name not in ('test_project.py', '_modidx.py')
    ),
]


@pytest.mark.parametrize('file', READ, ids=path_of)
def test_vocabulary(file):
    text = '\n'.join(map(source, cells_of(file))) if file.suffix == '.ipynb' else file.read_text('utf-8')
    found = sorted({m.group(0).lower() for m in PRIVATE_WORDS.finditer(text)})
    assert not found, f'words that the vocabulary replaces: {found}'
    assert not re.search(r'\b(TODO|FIXME|XXX|NotImplementedError)\b', text)


# -- the code --------------------------------------------------------------------------------------


def test_ruff():
    """Undefined names, several statements on a line and lines above 110 columns, in notebooks, package and
    tests."""
    command = [sys.executable, '-m', 'ruff', 'check', '--no-cache', 'nbs', 'mimstudy', 'tests']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def code_lines(node_source):
    lines = [line.strip() for line in node_source.splitlines()]
    return [line for line in lines if line and not line.startswith('#')]


@every_module
def test_sizes_of_modules_and_functions(file):
    text = file.read_text(encoding='utf-8')
    written = text.partition('# %% ../../')[2]  # what comes before is generated
    assert len(code_lines(written)) <= 250, f'{len(code_lines(written))} lines of code'
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.body[0].lineno + 1
            assert length <= 40, f'{node.name} has a body of {length} lines'


@every_module
def test_public_definitions_have_docstrings(file):
    for node in ast.parse(file.read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            assert ast.get_docstring(node), f'{node.name} has no docstring'


@every_module
def test_weights_are_loaded_safely(file):
    for call in (n for n in ast.walk(ast.parse(file.read_text(encoding='utf-8'))) if isinstance(n, ast.Call)):
        name = ast.unparse(call.func)
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name == 'torch.load':
            assert keywords.get('weights_only') == 'True', (
                f'{file.name}: torch.load without weights_only=True'
            )
        if name.endswith(('.extractall', '.extract')):
            assert keywords.get('filter') == "'data'", f'{file.name}: {name} without filter'
