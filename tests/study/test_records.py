"Records: read as they were written; broken ones are named; writers in several processes lose nothing."

import json
import math
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import pytest
from invented_records import invented_record

from mimstudy.core.errors import StudyError
from mimstudy.engine.files import write_atomic
from mimstudy.papers.experiments import experiment
from mimstudy.papers.tables import TABLES
from mimstudy.report.pages import page_texts, write_tables
from mimstudy.study import records
from mimstudy.study.build import build_encoder
from mimstudy.study.encoder_files import save_encoder
from mimstudy.study.records import FIELDS, RecordStore, read_record
from mimstudy.study.records import record as new_record
from mimstudy.study.estimate import estimate_run
from mimstudy.study.plan import plan
from mimstudy.study.score_frame import score_frame

RESULTS = Path(__file__).resolve().parents[2] / 'results'


def test_a_record_is_read_as_it_was_written(tmp_path):
    store, one = RecordStore(tmp_path), invented_record('semanticmim-t1/beit', linear_1_patch=12.25)
    file = store.add(one)
    assert set(one) == set(FIELDS) and store.find() == [one] and file.name == f'{one["id"]}.json'
    assert [path.name for path in file.parent.iterdir()] == [file.name], 'no temporary file is left'
    store.add(one | dict(seconds=3.0))
    assert [record['seconds'] for record in store.find()] == [3.0]


def test_find_and_frame(tmp_path):
    store = RecordStore(tmp_path)
    for seed in range(3):
        scores = dict(linear_1_prefix=10.0 + seed, linear_best_prefix=11.0 + seed)
        store.add(invented_record('semanticmim-t1/beit', seed, linear_best_prefix_block=1, **scores))
    store.add(invented_record('semanticmim-t1/pixels', linear_0_pixels=5.0))
    assert [record['seed'] for record in store.find(row='beit')] == [0, 1, 2]
    assert len(store.find(row='beit', seed=2)) == 1
    frame = score_frame(store.find(row='beit'))
    best = frame[frame.block == 'best']
    assert len(frame) == 6 and best.score.tolist() == [11.0, 12.0, 13.0] and set(best.best_block) == {1.0}
    assert score_frame(store.find(row='maskfeat')).empty
    assert set(score_frame(store.find(row='pixels')).token) == {'pixels'}
    with pytest.raises(StudyError, match='unknown field of a record "rows"'):
        store.find(rows='beit')


@pytest.mark.parametrize(
    'text', ['', '{"id": "x"', '[]', '{}', 'null', '{"id": "x", "scores": {}}', '{"schema": 2}', '\x00\xff']
)
def test_a_broken_record_is_named_and_the_others_count(tmp_path, capsys, text):
    store = RecordStore(tmp_path)
    store.add(invented_record('semanticmim-t1/beit', linear_1_patch=1.0))
    (tmp_path / 'scores' / 'broken.json').write_text(text)
    assert len(store.find()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('scores/broken.json is left out: ') and str(tmp_path) not in line


def test_done_means_every_requested_protocol(tmp_path):
    store, e = RecordStore(tmp_path), experiment('conmim-t8/tau=0.1', 'laptop')
    assert e.protocols == ('linear', 'knn') and not store.done(e)
    store.add(invented_record(e.name, linear_1_patch=1.0))
    assert not store.done(e)
    file = store.add(invented_record(e.name, protocol='knn', knn_1_patch=1.0))
    assert store.done(e) and not store.done(experiment(e.name, 'laptop', seed=1))
    file.write_text('broken')
    assert not store.done(e)


def test_an_incomplete_record_is_refused(tmp_path):
    store = RecordStore(tmp_path)
    with pytest.raises(StudyError, match='a record needs schema, experiment, train'):
        store.add(dict(id='x'))
    with pytest.raises(StudyError, match='its scores are not numbers'):
        store.add(invented_record('semanticmim-t1/beit', linear_1_patch=math.nan))
    assert not store.find()


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    file = write_atomic(tmp_path / 'a.json', lambda path: path.write_text('old'))

    def interrupted(path):
        path.write_text('ne')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(file, interrupted)
    assert file.read_text() == 'old' and [path.name for path in tmp_path.iterdir()] == ['a.json']


def write_many(folder, writer, template):
    store = RecordStore(folder)
    for i in range(40):
        store.add(template | dict(id=f'writer-{writer}-{i}', seed=100 * writer + i))
        store.add(template | dict(id='shared', seed=writer, label='x' * (1 + 5000 * (i % 2))))


def test_writers_in_several_processes_lose_nothing(tmp_path, capsys):
    fork = multiprocessing.get_context('fork')
    template = invented_record('semanticmim-t1/beit', linear_1_patch=1.0)
    writers = [fork.Process(target=write_many, args=(tmp_path, w, template)) for w in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert all(set(record) == set(FIELDS) for record in RecordStore(tmp_path).find())
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 3
    found = RecordStore(tmp_path).find()
    own = {record['seed'] for record in found if record['id'] != 'shared'}
    assert len(found) == 3 * 40 + 1 and own == {100 * w + i for w in range(3) for i in range(40)}
    assert not [path for path in (tmp_path / 'scores').iterdir() if path.suffix != '.json']
    assert not capsys.readouterr().err


def test_committed_records_are_measured_and_complete(capsys):
    found = RecordStore(RESULTS).find()
    assert not capsys.readouterr().err, 'a broken record'
    for record in found:
        assert 'invented' not in record['commit'] and record['commit'] != 'unknown'
        assert record['table'] in TABLES
        assert not re.search(r'/(root|home|tmp|Users)/', json.dumps(record)), record['id']
        scores = {name: score for name, score in record['scores'].items() if not name.endswith('/block')}
        assert all(0 <= score <= 100 for score in scores.values())


def test_committed_records_belong_to_todays_experiments():
    "The identifiers of all committed records are those that their experiments have today."
    for record in RecordStore(RESULTS).find():
        name = f'{record["table"]}/{record["row"]}'
        e = experiment(name, record['scale'], record['dataset'], record['seed'])
        assert record['id'] == e.record_id(record['protocol']), name
        assert record['config'] == e.values, name


def test_a_published_encoder_is_found_without_its_run(tmp_path):
    store = RecordStore(tmp_path)
    one = experiment('semanticmim-t1/beit', 'smoke')
    encoder = build_encoder(one.config)
    with pytest.raises(StudyError, match='no encoder in the run'):
        store.encoder(one.train_id)
    run = store.run_folder(one.train_id)
    save_encoder(encoder, run, one.values)
    file = store.publish_encoder(one.train_id, store)
    assert file.is_relative_to(tmp_path / 'encoders') and file.stat().st_size < 2**18
    shutil.rmtree(run)
    assert store.encoder(one.train_id).config == encoder.config


def hostile(**values):
    return invented_record('semanticmim-t1/beit', linear_1_patch=1.0) | values


@pytest.mark.parametrize(
    'values, message',
    [
        (dict(dataset='<script>x</script>'), 'its dataset is not a plain name'),
        (dict(device='cpu | [x](http://y)'), 'its device is not a plain name'),
        (dict(commit='a\nb'), 'its commit is not a plain name'),
        (dict(table=['semanticmim-t1']), 'its table is not a plain name'),
        (dict(scores={'linear/1/patch': 'much'}), 'its scores are not numbers'),
        (dict(scores=[1]), 'its scores are not numbers'),
        (dict(scores={'linear/1/patch': float('nan')}), 'its scores are not numbers'),
        (dict(scores={'nonsense': 1.0}), 'its scores are not named'),
        (dict(scale='huge'), 'unknown scale "huge"'),
        (dict(n_val='many'), 'its n_val is not a number'),
        (dict(n_val=None), 'its n_val is not a number'),
        (dict(images_seen=['a']), 'its images_seen is not a number'),
        (dict(seconds={}), 'its seconds is not a number'),
        (dict(seed='0'), 'its seed is not a number'),
        (dict(id='../../outside'), 'its id is not the name of a file'),
        (dict(train='a/b'), 'its train is not the name of a file'),
    ],
)
def test_what_a_file_holds_is_not_trusted(tmp_path, capsys, values, message):
    store = RecordStore(tmp_path)
    file = tmp_path / 'scores' / 'x.json'
    file.parent.mkdir()
    file.write_text(json.dumps(hostile(**values)))
    assert store.find() == []
    assert score_frame(store.find()).empty
    errors = capsys.readouterr().err
    assert errors.count('\n') == 1 and message in errors, 'said once'


@pytest.mark.slow
@pytest.mark.parametrize('field', FIELDS)
def test_no_value_of_a_field_stops_a_report(tmp_path, field):
    "A record with an odd value is left out, or the value does not matter."
    odd = (None, 3, -1, 'x', '../x', [], ['a'], {}, {'a': []}, True, math.inf)
    (tmp_path / 'scores').mkdir()
    for value in odd:
        text = json.dumps(hostile(**{field: value}))
        (tmp_path / 'scores' / 'x.json').write_text(text)
        store = RecordStore(tmp_path)
        found = [one[field] for one in store.find()]
        assert found in ([], [value])
        assert all(Path(name).name == name for name in page_texts(store))
        assert estimate_run(plan('semanticmim-t1', store=store), store.find()).seconds >= 0


def test_a_dataset_name_is_no_path(tmp_path):
    store = RecordStore(tmp_path / 'results')
    name = 'x/../../../outside'
    store.add(hostile(dataset=name, id='y'))
    write_tables(store)
    files = [file for file in tmp_path.rglob('*') if file.is_file()]
    assert all(file.is_relative_to(tmp_path / 'results') for file in files)


def test_deeply_nested_json_is_left_out(tmp_path, capsys):
    (tmp_path / 'scores').mkdir()
    (tmp_path / 'scores' / 'deep.json').write_text('[' * 100_000 + ']' * 100_000)
    assert RecordStore(tmp_path).find() == []
    assert 'deep.json is left out' in capsys.readouterr().err


def test_a_record_is_read_once_and_again_after_a_change(tmp_path, monkeypatch):
    store = RecordStore(tmp_path)
    file = store.add(hostile())
    calls = []
    monkeypatch.setattr(records, 'read_record', lambda file: calls.append(file) or read_record(file))
    assert store.find() == store.find() and len(calls) == 1
    file.write_text(json.dumps(hostile(seed=7)))
    os.utime(file, ns=(1, 1))
    assert [one['seed'] for one in store.find()] == [7] and len(calls) == 2


# -- what git tracks ----------------------------------------------------------------------------


@pytest.fixture
def two_folders(tmp_path, monkeypatch):
    "The results of this machine and those that git tracks, as the settings name them."
    monkeypatch.setenv('MIMSTUDY_RESULTS', str(tmp_path / 'local'))
    monkeypatch.setenv('MIMSTUDY_PUBLISHED', str(tmp_path / 'tracked'))
    return RecordStore(), RecordStore(tmp_path / 'tracked')


def test_published_records_are_found_and_never_written(two_folders):
    own, tracked = two_folders
    first = invented_record('semanticmim-t1/beit', scale='smoke', linear_1_patch=1.0)
    tracked.add(first)
    assert own.find() == [first] and not own.done(experiment('semanticmim-t1/beit', 'smoke'))
    changed = first | dict(scores={'linear/1/patch': 2.0})
    own.add(changed)
    assert own.find() == [changed], 'a record of this machine replaces the published one'
    assert tracked.find() == [first], 'and the published one is as it was'
    assert RecordStore(own.root).find() == [changed] and RecordStore(own.root).published is None


def test_publishing_copies_the_records_of_this_machine(two_folders):
    own, tracked = two_folders
    records = [invented_record(f'semanticmim-t1/{row}', linear_1_patch=1.0) for row in ('beit', 'random')]
    tracked.add(records[0])
    own.add(records[1])
    assert [file.stem for file in own.publish_records('semanticmim-t1', tracked)] == [records[1]['id']]
    assert own.publish_records('conmim-t8', tracked) == []
    assert sorted(r['id'] for r in tracked.find()) == sorted(r['id'] for r in records)


def test_free_play_has_a_folder_for_each_set_of_values(tmp_path):
    store = RecordStore(tmp_path)
    change = dict(epochs=1, size=32)
    assert store.free({}) is store and store.free(change).root == tmp_path / 'free' / 'epochs=1+size=32'
    tried = experiment('semanticmim-t1/beit', 'smoke', change=change)
    one = new_record(tried, 'linear', {}, n_val=1)
    store.free(change).add(one)
    assert one['change'] == change and store.find() == [] and store.free(change).find() == [one]
    assert 'change' not in new_record(experiment('semanticmim-t1/beit', 'smoke'), 'linear', {}, n_val=1)
