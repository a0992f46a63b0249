"The study's floor: recipes and tables as the papers have them, records that survive, pages whose every number has a source."
import json
import math
import multiprocessing
import re
import subprocess
from collections import Counter
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer

from mimstudy.core.errors import StudyError
from mimstudy.engine.files import write_atomic
from mimstudy.engine.config import SCALES, Recipe
from mimstudy.methods.catalogue import METHODS, method_options
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.study.build import build_task
from mimstudy.report.statistics import binomial, table_records, estimate
from mimstudy.papers.pretraining import RECIPES, recipe
from mimstudy.report.pages import MARKERS, page, pages, readme_block, write_readme, write_tables
from mimstudy.report.tables import conclusions, differences, measured, overview, render, render_blocks
from mimstudy.study.records import FIELDS, RecordStore, commit, load_encoder, provenance, record, save_encoder
from mimstudy.papers.tables import TABLES, Row, Table, experiment

ROOT = Path(__file__).resolve().parents[2]
EVERY_ROW = [f'{t.name}/{r.name}' for t in TABLES.values() for r in t.rows]


# -- recipes --------------------------------------------------------------------------------------------------------

PUBLISHED = {  # transcribed from ConMIM Table 10 and SemanticMIM Table 2 and section 4.1, apart from the library's own transcription
    'conmim_s16_300': dict(width=384, depth=12, heads=6, epochs=300, batch=2048, eps=1e-8, betas=(.9, .98), lr=5e-4, min_lr=1e-5, warmup=10,
                           drop_path=.1, clip=3, weight_decay=.05, unit=1, size=224, ratio=.75, mask='random', views='weak,strong'),
    'conmim_b16_800': dict(width=768, depth=12, heads=12, epochs=800, batch=2048, eps=1e-8, betas=(.9, .98), lr=5e-4, min_lr=1e-5, warmup=10,
                           drop_path=0, clip=3, weight_decay=.05, unit=2, size=224, ratio=.75, mask='random', views='weak,strong', positions='relative'),
    'conmim_b16_300': dict(width=768, epochs=300, unit=2, drop_path=0),
    'beit': dict(width=768, patch=16, epochs=300, batch=2048, eps=1e-8, betas=(.9, .999), lr=1.5e-3, min_lr=1e-5, warmup=10, clip=3, drop_path=.1,
                 weight_decay=.05, crop=(.08, 1), flip=.5, views='jitter', ratio=.4, prefix=1, mask='random', unit=1, size=224, layer_scale=.1, positions='absolute'),
    'semanticmim_beit': dict(ratio=.6, prefix=8, lr=1.5e-3, clip=3, views='jitter', method='semanticmim(beit)'),
    'maskfeat': dict(width=768, patch=16, epochs=300, batch=2048, eps=1e-8, betas=(.9, .999), lr=1.6e-3, min_lr=1e-6, warmup=30, clip=.02, drop_path=.1,
                     weight_decay=.05, crop=(.5, 1), flip=.5, views='weak', ratio=.4, prefix=1, mask='random', unit=1, size=224, layer_scale=None),
    'semanticmim_maskfeat': dict(ratio=.6, prefix=8, lr=1.6e-3, clip=.02, views='weak', method='semanticmim(maskfeat)'),
    'simmim': dict(ratio=.6, unit=2, crop=(.67, 1), lr=4e-4, min_lr=2e-5, batch=2048, clip=5),
    'semanticmim_simmim': dict(ratio=.6, prefix=8, positions='absolute', method='semanticmim(simmim)', clip=5),
    'mae': dict(ratio=.75, crop=(.2, 1), lr=1.5e-4*16, batch=4096, warmup=40, betas=(.9, .95), weight_decay=.05, clip=None, epochs=800),
    'semanticmim_mae': dict(ratio=.6, prefix=8, method='semanticmim(mae)', betas=(.9, .95)),
    'semanticmim_conmim_b16_300': dict(ratio=.6, prefix=8, positions='absolute', method='semanticmim(conmim)', views='weak,strong'),
    'mocov3': dict(views='two', crop=(.08, 1), lr=1.5e-4*16, batch=4096, weight_decay=.1, warmup=40, epochs=300, kept='student'),
    'dino': dict(views='multicrop', crop=(.4, 1), locals=8, local_crop=(.05, .4), local_size=96, lr=5e-4*4, batch=1024, weight_decay=.04, weight_decay_end=.4,
                 min_lr=1e-6, clip=3, drop_path=.1, kept='teacher'),
    'ibot': dict(views='multicrop', crop=(.25, 1), locals=10, local_crop=(.05, .25), mask='chance', weight_decay_end=.4, kept='teacher'),
    'cim': dict(ratio=.5, tokenizer='kmeans', views='weak', epochs=300, batch=2048),
    'deit': dict(views='rand', crop=(.08, 1), lr=5e-4*2, batch=1024, weight_decay=.05, warmup=5, drop_path=.1, min_lr=1e-5),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_recipes_are_the_published_ones(name):
    r = recipe(name)
    assert {k: getattr(r, k) for k in PUBLISHED[name]} == PUBLISHED[name]


def test_every_recipe_is_checked_here(): assert set(PUBLISHED) == set(RECIPES)


@pytest.mark.parametrize('name', RECIPES)
def test_every_value_has_its_source(name):
    r = recipe(name)
    assert r.name == name and set(r.sources) == {f.name for f in fields(Recipe)} - {'name', 'sources'}
    assert all(len(source) > 3 for source in r.sources.values())


@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_can_be_built_and_written(name):
    r = recipe(name)
    assert r.method in METHODS and set(r.options) <= set(method_options(r.method))
    assert all(r.options[k] == v for k, v in method_options(r.method).items() if k in r.options), 'the defaults of a method are the paper\'s'
    assert Recipe.from_json(json.loads(json.dumps(r.to_json()))) == r
    for scale in SCALES: assert r.at(scale).method == r.method


@pytest.mark.parametrize('change, said', [
    (dict(epochs='ten'), 'epochs must be a whole number'), (dict(epochs=2.5), 'epochs must be a whole number'), (dict(lr='fast'), 'lr must be a number'),
    (dict(clip=True), 'clip must be a number or none'), (dict(clip_each=1), 'clip_each must be true or false'), (dict(crop=.5), 'crop must be a list'),
    (dict(crop=(.1, .5, 1)), 'crop must be 2 numbers'), (dict(betas=('a', 'b')), 'betas must be 2 numbers'), (dict(options=3), 'options must be a dictionary'),
    (dict(lr=math.nan), 'the peak of nan'), (dict(min_lr=1.), 'min_lr must lie between 0 and the peak'), (dict(betas=(.9, 1.)), 'betas must lie in'),
    (dict(per_class=0), 'per_class must be above 0'), (dict(drop_path=1.), 'drop_path must lie in'), (dict(flip=2), 'flip must lie between'),
    (dict(weight_decay=-1), 'weight decay must be 0 or more'), (dict(layer_decay=0.), 'layer_decay must lie in'), (dict(width=0), 'width must be above 0'),
    (dict(ratio=1.), 'ratio must lie strictly between 0 and 1'), (dict(size=30), 'patches of 16 px do not tile images of 30 px')])
def test_a_value_that_cannot_be_right(change, said):
    with pytest.raises(StudyError, match=said) as e: recipe('beit').but(**change)
    assert '\n' not in str(e.value) and 'recipe "beit"' in str(e.value)


def test_views_that_a_method_cannot_compare():
    "Crops of their own have no patches in common."
    small = recipe('conmim_b16_300').at('smoke')
    for views in 'two', 'multicrop':
        with pytest.raises(StudyError, match='crops of their own'): build_task(small.but(views=views))


def test_a_full_disk_while_an_encoder_is_written(tmp_path, monkeypatch):
    def full(*_, **__): raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    monkeypatch.setattr('mimstudy.study.records.save_file', full)
    with pytest.raises(StudyError, match='encoder.safetensors cannot be written: No space left'): save_encoder(Encoder(size=16, patch=8, width=8, depth=1, heads=1), tmp_path, {})
    assert [f.name for f in tmp_path.iterdir()] == ['recipe.json']


def test_conmim_options_are_the_papers(): assert recipe('conmim_b16_800').options == dict(tau=.1, momentum=.996)


@pytest.mark.parametrize('base', ['beit', 'maskfeat'])
def test_proxies_change_three_values(base):
    a, b = recipe(base), recipe(f'semanticmim_{base}')
    assert {f.name for f in fields(Recipe) if getattr(a, f.name) != getattr(b, f.name)} - {'sources'} == {'name', 'method', 'ratio', 'prefix'}


# -- tables ---------------------------------------------------------------------------------------------------------

PRINTED = {'beit+semanticmim': ('beit', dict(linear_cls=17.7, linear_patch=9.5, ft_cls=1.1, ft_patch=.7, voc=19.3, ade20k=3.9)),
           'maskfeat+semanticmim': ('maskfeat', dict(linear_cls=28.6, linear_patch=26.2, ft_cls=1., ft_patch=.6, voc=11.7, ade20k=3.1))}


@pytest.mark.parametrize('row', PRINTED)
def test_declared_numbers_give_the_differences_that_the_paper_prints(row):
    table, (base, printed) = TABLES['semanticmim-t1'], PRINTED[row]
    assert table.row(row).baseline == base
    assert {c: round(table.row(row).paper[c] - table.row(base).paper[c], 1) for c in printed} == printed


def test_conmim_t8_has_the_papers_numbers():
    rows = TABLES['conmim-t8'].rows
    assert {r.change['options']['tau']: r.paper['ft'] for r in rows} == {.05: 82.55, .07: 83.03, .1: 83.51, .15: 83.32, .2: 83.35}
    assert {r.baseline for r in rows} == {'', 'tau=0.1'}


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_tables_hold_together(table):
    names, columns = [r.name for r in table.rows], [c.name for c in table.columns]
    assert len(set(names)) == len(names) and len(set(columns)) == len(columns)
    for r in table.rows:
        assert not r.baseline or r.baseline in names and r.baseline != r.name
        assert set(r.paper) <= set(columns) and re.fullmatch(r'[\w.=+-]+', r.name)
    for c in table.columns: assert not c.beside or c.beside in columns
    for r in table.rows: assert r.label in table._repr_markdown_()


@pytest.mark.parametrize('name', EVERY_ROW)
def test_every_row_is_an_experiment_at_every_scale(name):
    seen = set()
    for scale in SCALES:
        for seed in (0, 1):
            e = experiment(name, scale, seed=seed)
            assert e.name == name and e.scale == scale and e.data == e.recipe.data and json.loads(json.dumps(e.values)) == e.values
            assert re.fullmatch(r'[\w.=+-]+', e.id) and re.fullmatch(r'[\w.=+-]+', e.train_id)
            seen |= {e.id, e.train_id}
    assert len(seen) == 4*len(SCALES)


def test_ids_of_a_table_differ(): assert len({experiment(name, 'smoke').id for name in EVERY_ROW}) == len(EVERY_ROW)


def variant(features='trained', **change):
    return Table('t', '', '', (), (Row('r', 'r', 'beit', change, features=features),)).experiment('r', 'paper')


def test_an_id_follows_every_value_that_matters_and_no_other():
    assert variant(lr=1e-3).train_id != variant(clip=1.).train_id
    assert variant(weight_decay=.1).id != variant().id
    assert variant('random', weight_decay=.1).id == variant('random').id != variant('random', prefix=8).id
    assert variant('pixels', prefix=8).id == variant('pixels').id != variant('pixels', per_class=7).id
    assert variant(name='another').train_id == variant().train_id


def test_equal_trainings_of_different_tables_are_one():
    other = Table('other', '', '', (), (Row('default', 'default', 'conmim_b16_300'),)).experiment('default', 'laptop', seed=3)
    same = experiment('conmim-t8/tau=0.1', 'laptop', seed=3)
    assert other.train_id == same.train_id and other.id != same.id


@pytest.mark.parametrize('wrong,said', [
    (('semanticmim-t9/beit', 'smoke'), 'unknown table "semanticmim-t9"; did you mean semanticmim-t1'),
    (('semanticmim-t1/biet', 'smoke'), 'unknown row of semanticmim-t1 "biet"; did you mean beit'),
    (('semanticmim-t1', 'smoke'), 'unknown experiment'), (('conmim-t8/', 'smoke'), 'unknown experiment'),
    (('semanticmim-t1/beit', 'smokes'), 'unknown scale "smokes"; did you mean smoke'),
    (('semanticmim-t1/beit', 'smoke', 'scense'), 'unknown dataset "scense"; did you mean scenes')])
def test_a_wrong_name_is_one_line(wrong, said):
    with pytest.raises(StudyError) as e: experiment(*wrong)
    assert said in str(e.value) and '\n' not in str(e.value)


# -- records: made up, and only ever in a temporary folder ------------------------------------------------------------

def made_up(name, seed=0, scale='laptop', protocol='linear', n_val=3200, **scores):
    e = experiment(name, scale, seed=seed)
    seen = 96_000 if e.features == 'trained' else 0
    return record(e, protocol, {k.replace('_', '/'): v for k, v in scores.items()}, n_val, seen) | dict(commit='made-up', device='made-up')


def test_a_record_comes_back_as_it_was(tmp_path):
    results, one = RecordStore(tmp_path), made_up('semanticmim-t1/beit', linear_1_patch=12.25)
    file = results.add(one)
    assert set(one) == set(FIELDS) and results.find() == [one] and file.name == f'{one["id"]}.json'
    assert [p.name for p in file.parent.iterdir()] == [file.name], 'no temporary file is left'
    results.add(one | dict(seconds=3.))
    assert [r['seconds'] for r in results.find()] == [3.]


def test_find_and_frame(tmp_path):
    results = RecordStore(tmp_path)
    for seed in range(3): results.add(made_up('semanticmim-t1/beit', seed, linear_1_prefix=10. + seed, linear_best_prefix=11. + seed, linear_best_prefix_block=1))
    results.add(made_up('semanticmim-t1/pixels', linear_0_pixels=5.))
    assert [r['seed'] for r in results.find(row='beit')] == [0, 1, 2] and len(results.find(row='beit', seed=2)) == 1
    frame = results.frame(row='beit')
    assert len(frame) == 6 and frame[frame.block == 'best'].score.tolist() == [11., 12., 13.] and set(frame[frame.block == 'best'].best_block) == {1.}
    assert results.frame(row='maskfeat').empty and set(results.frame(row='pixels').token) == {'pixels'}
    with pytest.raises(StudyError, match='unknown field of a record "rows"'): results.find(rows='beit')


@pytest.mark.parametrize('text', ['', '{"id": "x"', '[]', '{}', 'null', '{"id": "x", "scores": {}}', '\x00\xff'])
def test_a_broken_record_is_named_and_the_others_count(tmp_path, capsys, text):
    results = RecordStore(tmp_path)
    results.add(made_up('semanticmim-t1/beit', linear_1_patch=1.))
    (tmp_path/'scores'/'broken.json').write_text(text)
    assert len(results.find()) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith('scores/broken.json is left out: ') and str(tmp_path) not in said[0]


def test_done_means_every_protocol_of_the_table(tmp_path):
    results, e = RecordStore(tmp_path), experiment('conmim-t8/tau=0.1', 'laptop')
    assert e.protocols == ('linear', 'knn') and not results.done(e)
    results.add(made_up(e.name, linear_1_patch=1.))
    assert not results.done(e)
    file = results.add(made_up(e.name, protocol='knn', knn_1_patch=1.))
    assert results.done(e) and not results.done(experiment(e.name, 'laptop', seed=1))
    file.write_text('torn')
    assert not results.done(e)


def test_a_half_record_is_refused(tmp_path):
    with pytest.raises(StudyError, match='a record needs experiment, train'): RecordStore(tmp_path).add(dict(id='x'))
    with pytest.raises(ValueError): RecordStore(tmp_path).add(made_up('semanticmim-t1/beit', linear_1_patch=math.nan))
    assert not RecordStore(tmp_path).find()


def test_a_writer_that_dies_leaves_the_old_file(tmp_path):
    file = write_atomic(tmp_path/'a.json', lambda p: p.write_text('old'))
    def dies(path): path.write_text('ne'); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_atomic(file, dies)
    assert file.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a.json']


def write_many(folder, writer, template):
    results = RecordStore(folder)
    for i in range(40):
        results.add(template | dict(id=f'writer-{writer}-{i}', seed=100*writer + i))
        results.add(template | dict(id='shared', seed=writer, label='x'*(1 + 5000*(i % 2))))


def test_writers_in_several_processes_lose_nothing(tmp_path, capsys):
    fork, template = multiprocessing.get_context('fork'), made_up('semanticmim-t1/beit', linear_1_patch=1.)
    writers = [fork.Process(target=write_many, args=(tmp_path, w, template)) for w in range(3)]
    for w in writers: w.start()
    while any(w.is_alive() for w in writers): assert all(set(r) == set(FIELDS) for r in RecordStore(tmp_path).find())
    for w in writers: w.join()
    assert [w.exitcode for w in writers] == [0]*3
    found = RecordStore(tmp_path).find()
    assert len(found) == 3*40 + 1 and {r['seed'] for r in found if r['id'] != 'shared'} == {100*w + i for w in range(3) for i in range(40)}
    assert not [p for p in (tmp_path/'scores').iterdir() if p.suffix != '.json'] and not capsys.readouterr().err


# -- encoders and provenance ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind,shape', [(Encoder, dict()), (Encoder, dict(prefix=8, layer_scale=.1, drop_path=.2)), (Encoder, dict(prefix=3, init='conmim')),
                                        (RelativeEncoder, dict(layer_scale=.1))])
def test_an_encoder_comes_back_bit_by_bit(tmp_path, kind, shape):
    torch.manual_seed(0)
    there, x = kind(size=32, patch=8, width=32, depth=2, heads=4, **shape).eval(), torch.rand(2, 3, 32, 32)
    save_encoder(there, tmp_path/'run', dict(made='up'))
    before = torch.get_rng_state()
    back = load_encoder(tmp_path/'run')
    assert torch.equal(torch.get_rng_state(), before), 'loading draws no random number'
    assert type(back) is kind and not back.training and back.config == there.config and torch.equal(back.forward_features(x), there.forward_features(x))
    assert all(p.requires_grad and not p.is_meta for p in back.parameters()) and json.loads((tmp_path/'run/recipe.json').read_text()) == dict(made='up')


def test_the_weights_open_in_plain_timm(tmp_path):
    from safetensors.torch import load_file
    torch.manual_seed(0)
    there, x = Encoder(size=32, patch=8, width=32, depth=2, heads=4, prefix=4).eval(), torch.rand(2, 3, 32, 32)
    plain = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, reg_tokens=3, num_classes=0).eval()
    plain.load_state_dict(load_file(save_encoder(there, tmp_path, {})))
    assert torch.equal(plain.forward_features(x), there.forward_features(x))


def test_what_is_no_encoder_is_one_line(tmp_path):
    with pytest.raises(StudyError, match='no encoder in the run never'): RecordStore(tmp_path).encoder('never')
    (tmp_path/'runs'/'bad').mkdir(parents=True)
    (tmp_path/'runs/bad/encoder.safetensors').write_bytes(b'not a tensor')
    with pytest.raises(StudyError, match='bad/encoder.safetensors is no encoder'): RecordStore(tmp_path).encoder('bad')


def git(folder, *words):
    subprocess.run(['git', '-c', 'user.name=made up', '-c', 'user.email=made@up', *words], cwd=folder, check=True, capture_output=True)


def test_commit_says_what_the_files_are(tmp_path, monkeypatch):
    library = tmp_path/'library'
    library.mkdir()
    (library/'room.py').write_text('a = 1\n')
    assert commit(library) == 'unknown'
    git(tmp_path, 'init', '-q')
    assert commit(library) == 'unknown', 'an untracked copy inside a repository knows no commit'
    git(tmp_path, 'add', '.')
    assert commit(library) == 'unknown', 'no commit yet'
    git(tmp_path, 'commit', '-qm', 'one')
    clean = commit(library)
    assert re.fullmatch('[0-9a-f]{10}', clean)
    (tmp_path/'results.json').write_text('{}')
    (library/'new.txt').write_text('')
    assert commit(library) == clean, 'untracked files and files elsewhere do not count'
    (library/'room.py').write_text('a = 2\n')
    assert commit(library) == clean + '+changes'
    monkeypatch.setenv('PATH', '')
    assert commit(library) == 'unknown', 'a machine without git'


def test_provenance_names_no_machine():
    import platform
    made = provenance()
    assert set(made) == {'commit', 'versions', 'device'} and made['versions']['torch'] == torch.__version__
    text = json.dumps(made)
    assert '/root' not in text and '/home' not in text and (len(platform.node()) < 4 or platform.node() not in text)


# -- noise ------------------------------------------------------------------------------------------------------------

def test_spread_covers_the_truth():
    draws, n = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)).tolist(), 3
    assert abs(mean(not estimate(d, [0.]*n).noise for d in draws) - .05) < .01, 'an interval of three seeds leaves out the truth one time in twenty'
    assert estimate([40.], [binomial(40., 100)]).half == pytest.approx(1.96*math.sqrt(.24/100)*100)


def test_binomial_is_the_spread_of_scores():
    scores = 100*torch.rand(4000, 500, generator=torch.Generator().manual_seed(0)).lt(.3).double().mean(1)
    assert scores.std().item() == pytest.approx(binomial(30., 500), rel=.05)


# -- pages ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def filled(tmp_path):
    "A store of made-up records: three seeds, one seed, and rows that were not run."
    results, g = RecordStore(tmp_path), torch.Generator().manual_seed(0)
    def top(): return round(20*torch.rand(1, generator=g).item() + 5, 3)
    for name in EVERY_ROW:
        e = experiment(name, 'laptop')
        if name in ('semanticmim-t1/maskfeat+semanticmim', 'conmim-t8/tau=0.2'): continue
        for seed in range(1 if 'maskfeat' in name or 'tau=0.15' in name else 3):
            for protocol in e.protocols:
                scores = {f'{protocol}_{b}_{token}': top() for b in range(1, 5) for token in ('prefix', 'patch')}
                for token in ('prefix', 'patch'):
                    scores[f'{protocol}_best_{token}'], scores[f'{protocol}_best_{token}_block'] = max((scores[f'{protocol}_{b}_{token}'], b) for b in range(1, 5))
                if e.features == 'pixels': scores = {f'{protocol}_0_pixels': top()}
                results.add(made_up(name, seed, protocol=protocol, **scores))
    return results


def tables_in(text):
    "The markdown tables of a page, as lists of rows of cells."
    found, open_ = [], False
    for line in text.splitlines():
        if line.startswith('| '):
            if not open_: found.append([])
            found[-1].append([cell.strip(' *') for cell in line.strip().strip('|').split(' | ')])
        open_ = line.startswith('| ')
    return [[rows[0], *rows[2:]] for rows in found]


def by_seed(folder, table, row, protocol, key):
    "Straight from the files: seed -> score and the number of validation images."
    found = [json.loads(f.read_text()) for f in (folder/'scores').glob('*.json')]
    return {r['seed']: (r['scores'][key], r['n_val']) for r in found if (r['table'], r['row'], r['protocol']) == (table, row, protocol) and key in r['scores']}


def expected_cell(scores):
    if not scores: return 'not run'
    values = [s for s, _ in scores.values()]
    if len(values) > 1: return f'{mean(values):.1f} ± {stdev(values):.1f} ({len(values)} seeds)'
    (p, n), = scores.values()
    return f'{p:.1f} ± {math.sqrt(p*(100 - p)/n):.1f} (s.e.)'


def expected_difference(ours, base):
    seeds = sorted(set(ours) & set(base))
    d = [ours[s][0] - base[s][0] for s in seeds]
    if not d: return '—', None
    half = 1.96*mean(math.sqrt(sum(p*(100 - p)/n for p, n in (ours[s], base[s]))) for s in seeds)
    if len(d) > 1: half = math.hypot(half, {2: 12.7062, 3: 4.3027}[len(d)]*stdev(d)/math.sqrt(len(d)))
    return f'{mean(d):+.1f} [{mean(d) - half:+.1f}, {mean(d) + half:+.1f}]', mean(d) if abs(mean(d)) > half else 0


COMPARED = [t for t in TABLES.values() if any(row.paper for row in t.rows)]


def test_every_number_of_an_overview_has_its_source(filled):
    for table in TABLES.values():
        shown = table_records(table, filled, 'laptop')
        (head, *lines), columns = *tables_in(overview(table, shown)), measured(table, shown)
        assert len(head) == len(columns) + 3 and [line[0] for line in lines] == [r.label for r in table.rows]
        for row, line in zip(table.rows, lines, strict=True):
            for column, cell in zip(columns, line[1:], strict=False):
                protocol = column.measure.split('/')[0]
                key = column.measure if row.features != 'pixels' else '' if 'prefix' in column.measure else f'{protocol}/0/pixels'
                found = by_seed(filled.root, table.name, row.name, protocol, key) if key else {}
                assert cell.split(', block')[0] == (expected_cell(found) if key else '—')


def test_every_difference_has_its_source(filled):
    bold = set()
    for table in TABLES.values():
        head, _, *lines = ([c.strip() for c in line.strip('| ').split(' | ')] for line in differences(table, table_records(table, filled, 'laptop')).splitlines())
        columns = measured(table, table_records(table, filled, 'laptop'))
        rows = [r for r in table.rows if r.baseline]
        assert len(head) == len(columns) + 2 and [line[0] for line in lines] == [r.label for r in rows]
        for row, (_, against, *cells) in zip(rows, lines, strict=True):
            base = table.row(row.baseline)
            assert against == base.label
            for column, cell in zip(columns, cells, strict=True):
                def read(r):
                    protocol = column.measure.split('/')[0]
                    if r.features == 'pixels' and 'prefix' in column.measure: return {}
                    return by_seed(filled.root, table.name, r.name, protocol, f'{protocol}/0/pixels' if r.features == 'pixels' else column.measure)
                text, sure = expected_difference(read(row), read(base))
                number = text.split(' [')[0]
                assert cell == (f'**{number}**' if sure else number)
                bold.add(bool(sure))
    assert bold == {True, False}


def test_every_number_of_a_page_has_its_source(filled):
    for table in COMPARED:
        text, walked = render(table, filled, 'laptop'), 0
        found = tables_in(text)
        columns = measured(table, table_records(table, filled, 'laptop'))
        for column, (head, *lines) in zip(columns, found, strict=False):
            assert head[2:] == ['here', 'against', 'difference, paper', 'difference, here', 'same sign?'] and len(lines) == len(table.rows)
            for row, cells in zip(table.rows, lines, strict=True):
                def read(row):
                    key = column.measure if row.features != 'pixels' else '' if 'prefix' in column.measure else column.measure.split('/')[0] + '/0/pixels'
                    return by_seed(filled.root, table.name, row.name, column.measure.split('/')[0], key)
                label, paper, here, against, theirs, ours, same = cells
                number = row.paper.get(column.beside or column.name)
                base = table.row(row.baseline) if row.baseline else None
                assert label == row.label and against == (base.label if base else '—')
                assert paper == ('—' if number is None else f'{number:.{table.digits}f}')
                assert here == ('—' if row.features == 'pixels' and 'prefix' in column.measure else expected_cell(read(row)))
                difference, sure = expected_difference(read(row), read(base)) if base else ('—', None)
                assert ours == difference
                published = row.paper.get(column.beside or column.name), base and base.paper.get(column.beside or column.name)
                assert theirs == ('—' if None in published else f'{published[0] - published[1]:+.{table.digits}f}')
                if theirs == '—' or ours == '—': assert same == '—'
                elif sure == 0: assert same == 'within noise'
                else: assert same == ('yes' if (sure > 0) == (published[0] > published[1]) else 'no') + ('' if len(set(read(row)) & set(read(base))) > 2 else ', a hint')
                walked += sum(bool(re.search(r'\d', c)) for c in (paper, here, theirs, ours))
        for head, *lines in found[len(columns):]:
            unmeasured = [c for c in table.columns if c not in columns and not c.beside]
            assert head[1:] == [c.label for c in unmeasured]
            for row, cells in zip(table.rows, lines, strict=True):
                assert cells[1:] == [f'{row.paper[c.name]:.{table.digits}f}' if c.name in row.paper else '—' for c in unmeasured]
                walked += sum(bool(re.search(r'\d', c)) for c in cells[1:])
        shown = [c for head, *lines in found for line in lines for c in line[1:] if re.search(r'\d', c) and c not in {r.label for r in table.rows}]
        assert walked == len(shown) > 15, 'no cell with a number was passed over'


def test_every_number_of_the_block_tables_has_its_source(filled):
    for table in TABLES.values():
        for head, *lines in tables_in(render_blocks(table, filled, 'laptop')):
            protocol, token = head[0].split(', ')
            for label, *cells in lines:
                row = next(r for r in table.rows if r.label == label)
                for name, cell in zip(head[1:], cells, strict=True):
                    values = [s for s, _ in by_seed(filled.root, table.name, row.name, protocol, f'{protocol}/{name.removeprefix("block ")}/{token}').values()]
                    assert cell == (f'{mean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '') if values else 'not run')


def test_every_number_of_the_sentences_stands_in_a_table(filled):
    for table in COMPARED:
        differences = ' '.join(c for head, *lines in tables_in(render(table, filled, 'laptop')) for line in lines for c in line)
        for said in conclusions(table, filled, 'laptop'):
            if said.startswith('Not run'): continue
            number = re.search(r'([+-]\d+\.\d) points', said).group(1)
            assert f'{number} [' in differences
            if paper := re.search(r'the paper has ([+-][\d.]+)\)', said): assert paper.group(1) in differences
            if 'interval' in said: assert '[{}, {}]'.format(*re.search(r'interval (\S+?) to ([+-]\d+\.\d)', said).groups()) in differences


def test_a_table_without_records_says_not_run(tmp_path):
    for table in TABLES.values():
        text = render(table, RecordStore(tmp_path), 'laptop')
        for column, (head, *lines) in zip(measured(table, table_records(table, RecordStore(tmp_path), 'laptop')), tables_in(text), strict=False):
            if table in COMPARED: assert {line[2] for line in lines} <= {'not run', '—'} and {line[5] for line in lines} == {'—'}
            else: assert {cell for line in lines for cell in line[1:]} == {'not run', '—'}
        assert 'not run' in text.splitlines()[2] and not render_blocks(table, RecordStore(tmp_path), 'laptop')
        assert conclusions(table, RecordStore(tmp_path), 'laptop') == [f'Not run: {", ".join(r.label for r in table.rows)}.']
    assert pages(RecordStore(tmp_path)) == [] and 'Nothing above smoke' in readme_block(RecordStore(tmp_path))


def test_a_number_goes_when_its_record_goes(filled):
    table = TABLES['semanticmim-t1']
    before = render(table, filled, 'laptop')
    for r in filled.find(row='beit'): (filled.root/'scores'/f'{r["id"]}.json').unlink()
    after = render(table, filled, 'laptop')
    assert before != after and [line for line in after.splitlines() if line.startswith('| BEiT | 31.5 | not run')]


def test_scales_data_and_earlier_values_are_not_mixed(filled):
    table = TABLES['semanticmim-t1']
    before = render(table, filled, 'laptop')
    for scale in ('smoke', 'gpu'): filled.add(made_up('semanticmim-t1/beit', 0, scale, linear_best_prefix=99., linear_best_patch=99.))
    assert render(table, filled, 'laptop') == before
    stale = made_up('semanticmim-t1/beit', 7, linear_best_prefix=99., linear_best_patch=99.)
    filled.add(stale | dict(id='stale', experiment='semanticmim-t1-beit-laptop-earlier'))
    after = render(table, filled, 'laptop')
    assert '1 records of other values left out' in after and '99.0' not in after and table_records(table, filled, 'laptop').stale == 1


def test_differing_settings_are_said(filled):
    assert 'differing' not in render(TABLES['semanticmim-t1'], filled, 'laptop')
    filled.add(filled.find(table='semanticmim-t1', row='beit')[0] | dict(evaluation=dict(epochs=1)))
    assert '**evaluated with differing settings**' in render(TABLES['semanticmim-t1'], filled, 'laptop')


@pytest.mark.parametrize('gains,verdict', [((4., 4.2, 3.9), 'The proxies helped.'), ((-4., -4.2, -3.9), 'The proxies did harm.'),
                                          ((4., -4., .1), 'Noise alone'), ((4., 4.1), 'a hint, no more'), ((4.,), 'a hint, no more')])
def test_verdicts_need_three_seeds_and_little_noise(tmp_path, gains, verdict):
    results = RecordStore(tmp_path)
    for seed, gain in enumerate(gains):
        results.add(made_up('semanticmim-t1/beit', seed, linear_best_prefix=10. + seed))
        results.add(made_up('semanticmim-t1/beit+semanticmim', seed, linear_best_prefix=10. + seed + gain))
    said = conclusions(TABLES['semanticmim-t1'], results, 'laptop')[0]
    assert verdict in said and f'{mean(gains):+.1f} points' in said and 'the paper has +17.7' in said
    if len(gains) > 2: assert f'sd {stdev(gains):.1f}' in said


def test_smoke_scale_concludes_nothing(tmp_path):
    for row in ('beit', 'beit+semanticmim'):
        for seed in range(3): RecordStore(tmp_path).add(made_up(f'semanticmim-t1/{row}', seed, 'smoke', linear_best_prefix=50. - 40*(row == 'beit')))
    (said,) = conclusions(TABLES['semanticmim-t1'], RecordStore(tmp_path), 'smoke')
    assert 'say nothing' in said and readme_block(RecordStore(tmp_path)) == 'Nothing above smoke scale has been run yet.'


def test_paper_scale_reads_the_papers_block(tmp_path):
    RecordStore(tmp_path).add(made_up('semanticmim-t1/beit', 0, 'paper', n_val=50_000, linear_7_prefix=31., linear_best_prefix=60., linear_7_patch=38., linear_best_patch=61.))
    text = render(TABLES['semanticmim-t1'], RecordStore(tmp_path), 'paper')
    assert '| 31.0 ±' in text and '60.0' not in text and 'best block' not in text


def test_pages_and_readme(filled, tmp_path):
    assert [f.name for f in write_tables(filled)] == [f'{t}-{s}-{d}.md' for t, s, d in pages(filled)]
    for (t, s, d), file in zip(pages(filled), write_tables(filled), strict=True): assert file.read_text('utf-8') == page(TABLES[t], filled, s, d)
    readme = tmp_path/'README.md'
    readme.write_text(f'# A\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n\nb\n')
    once = write_readme(filled, readme).read_text('utf-8')
    assert once == f'# A\n\n{MARKERS[0]}\n{readme_block(filled)}\n{MARKERS[1]}\n\nb\n' == write_readme(filled, readme).read_text('utf-8')
    readme.write_text('# A\n')
    with pytest.raises(StudyError, match='README.md needs the lines'): write_readme(filled, readme)


# -- what is committed ------------------------------------------------------------------------------------------------

def test_committed_records_are_measured_and_whole(capsys):
    found = RecordStore(ROOT/'results').find()
    assert not capsys.readouterr().err, 'a broken record'
    for r in found:
        assert 'made' not in r['commit'] and r['commit'] != 'unknown' and r['table'] in TABLES
        assert not re.search(r'/(root|home|tmp|Users)/', json.dumps(r)), r['id']
        assert all(0 <= v <= 100 for k, v in r['scores'].items() if not k.endswith('/block'))


def test_committed_pages_come_from_the_committed_records(tmp_path):
    results, committed = RecordStore(ROOT/'results'), {f.name: f.read_text('utf-8') for f in (ROOT/'results'/'tables').glob('*.md')}
    assert {f.name: f.read_text('utf-8') for f in write_tables(results, tmp_path)} == committed, 'run mimstudy report'
    assert max(Counter(f'{r["experiment"]}-{r["protocol"]}' for r in results.find()).values(), default=1) == 1


def test_the_readme_shows_the_committed_records():
    readme = ROOT/'README.md'
    if not readme.exists() or not pages(RecordStore(ROOT/'results')): pytest.skip('no records are committed yet')
    text = readme.read_text('utf-8')
    assert text.partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip() == readme_block(RecordStore(ROOT/'results')), 'run mimstudy report'
