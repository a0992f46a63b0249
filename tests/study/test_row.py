"A row: what is trained, what is evaluated, and the records that it leaves."

import os
import warnings

import pytest
from PIL import Image
from typer.testing import CliRunner

from mimstudy.cli.commands import app
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.engine.datasets import load_dataset
from mimstudy.engine.sampling import mix_seeds
from mimstudy.engine.train import train
from mimstudy.engine.training_log import report_warnings
from mimstudy.papers.experiments import experiment
from mimstudy.papers.pretraining import pretraining
from mimstudy.papers.scales import at_scale
from mimstudy.study.build import build_batch_function, build_task
from mimstudy.study.records import RecordStore
from mimstudy.study.row import Pretrained, ResultsFolder, evaluate_row, pretrain
from mimstudy.study.row_figures import show_attention

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for child processes


def test_a_random_encoder_under_a_probe_and_two_trainings(tmp_path):
    store = RecordStore(tmp_path)
    e = experiment('semanticmim-t1/random', 'smoke', protocols=('linear', 'voc', 'finetune'))
    linear, voc, tuned = evaluate_row(e, pretrain(e, store), store)
    assert [r['protocol'] for r in (linear, voc, tuned)] == ['linear', 'voc', 'finetune'] and store.done(e)
    assert linear['images_seen'] == 0 and linear['evaluation']['n_train'] == 264
    assert set(tuned['scores']) == {'finetune/last/prefix', 'finetune/last/patch'}
    assert {'voc/1/patch', 'voc/best/patch', 'voc/best/patch/block'} < set(voc['scores'])
    assert voc['evaluation']['optim']['optimiser'] == 'sgd'
    assert (voc['n_val'], voc['evaluation']['n_train']) == (1024, 256)
    assert 'encoder' not in tuned['evaluation']


def test_random_initialisation_is_where_the_training_begins(tmp_path):
    "The random row and a training of one epoch begin with the same weights."
    store = RecordStore(tmp_path)
    random = pretrain(experiment('all-methods/random', 'smoke', seed=5), store).encoder
    again = pretrain(experiment('semanticmim-t1/random', 'smoke', seed=5), store).encoder
    assert all(a.equal(b) for a, b in zip(random.parameters(), again.parameters(), strict=True))
    assert not list(tmp_path.iterdir()), 'nothing is written for a row that trains nothing'


def test_pixels(tmp_path):
    store = RecordStore(tmp_path)
    e = experiment('semanticmim-t1/pixels', 'smoke')
    assert pretrain(e, store) == Pretrained(None)
    (record,) = evaluate_row(e, Pretrained(None), store)
    assert list(record['scores']) == ['linear/0/pixels']


def photos(folder, count, labels=('',), split=''):
    "Scenes as image files, in a folder or in folders of classes."
    for i, image in enumerate(scenes(count, 32).images):
        place = folder / split / labels[i % len(labels)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f'{split}{i:03}.png')
    return folder


@pytest.mark.parametrize(
    'count, scale, protocols, message',
    [
        (16, 'smoke', (), 'pics has 16 training images, and smoke scale trains with batches of 32'),
        (40, 'laptop', (), 'laptop scale trains with batches of 64; the scale smoke would fit'),
        (150, 'laptop', ('finetune',), 'trains with batches of 128 at laptop scale'),
    ],
)
def test_a_set_that_does_not_fill_a_batch_is_refused_before_the_training(
    tmp_path, monkeypatch, count, scale, protocols, message
):
    labels = ('a', 'b') if protocols else ('',)
    monkeypatch.setenv('MIMSTUDY_DATA_PICS', str(photos(tmp_path / 'pics', count, labels)))
    monkeypatch.setattr('mimstudy.study.row.train', lambda *_: pytest.fail('a training was started'))
    one = experiment('semanticmim-t1/maskfeat', scale, 'pics', protocols=protocols)
    if protocols:
        monkeypatch.setattr('mimstudy.study.row.load_probe_images', lambda _: None)
        for file in sorted((tmp_path / 'pics' / 'a').iterdir())[30:]:
            file.unlink()
    with pytest.raises(StudyError) as error:
        pretrain(one, RecordStore(tmp_path / 'out'))
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('below', ['', 'train', 'train/photos'])
def test_images_without_labels_are_pretrained_and_not_evaluated(tmp_path, monkeypatch, capsys, below):
    "All 150, however few `per_class` names; a figure of their attention can be drawn."
    monkeypatch.setenv('MIMSTUDY_DATA_PICS', str(photos(tmp_path / 'pics', 150, (below,)).resolve()))
    store = RecordStore(tmp_path / 'out')
    one = experiment('semanticmim-t1/maskfeat', 'smoke', 'pics')
    trained = pretrain(one, store)
    assert trained.usage['images_seen'] == 2 * (150 // 32) * 32
    assert evaluate_row(one, trained, store) == []
    assert 'pics has no classes, so nothing is evaluated' in capsys.readouterr().out
    assert show_attention(one.config, trained.encoder) is not None


@pytest.mark.slow
def test_fewer_validation_images_than_a_figure_shows(tmp_path, monkeypatch):
    root = photos(tmp_path / 'pics', 60, ('a', 'b'), 'train')
    photos(root, 3, ('a', 'b'), 'val')
    monkeypatch.setenv('MIMSTUDY_DATA_PICS', str(root))
    one = experiment('semanticmim-t1/random', 'smoke', 'pics')
    store = RecordStore(tmp_path / 'out')
    trained = pretrain(one, store)
    (record,) = evaluate_row(one, trained, store)
    assert record['n_val'] == 3 and show_attention(one.config, trained.encoder) is not None


def test_warnings_of_the_package_are_messages(capsys, monkeypatch):
    import mimstudy.engine.datasets as module

    with report_warnings():
        warnings.warn_explicit('broken image', UserWarning, module.__file__, 1)
    assert capsys.readouterr().out == 'warning: broken image\n'
    monkeypatch.setenv('MIMSTUDY_PROGRESS', 'json')
    with report_warnings():
        warnings.warn_explicit('broken image', UserWarning, module.__file__, 1)
    assert capsys.readouterr().out == '{"event": "warning", "message": "broken image"}\n'
    with pytest.warns(UserWarning, match='of another library'), report_warnings():
        warnings.warn('of another library')


def test_a_temporary_results_folder_is_removed(tmp_path):
    folder = ResultsFolder()
    assert folder.store.root.is_dir()
    folder.close()
    assert not folder.store.root.exists()
    named = ResultsFolder(str(tmp_path))
    named.close()
    assert named.store.root == tmp_path and tmp_path.is_dir()


@pytest.mark.slow
def test_a_pretrained_encoder_is_trained_further_through_papermill(tmp_path):
    command = ['run', 'semanticmim-t1', '--rows', 'maskfeat', '--scale', 'smoke', '--results', str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 0
    done = CliRunner().invoke(app, [*command, '--protocols', 'finetune', 'voc', 'ade20k'])
    assert done.exit_code == 0, done.stderr
    protocols = {record['protocol'] for record in RecordStore(tmp_path).find()}
    assert protocols == {'linear', 'finetune', 'voc', 'ade20k'}
    assert len(list(tmp_path.glob('runs/*/row.ipynb'))) == 2


@pytest.mark.parametrize('name', ['beit', 'semanticmim_maskfeat', 'conmim_b16_300', 'mae'])
def test_a_method_in_bf16_resumes_to_the_last_bit(name, tmp_path):
    "With attention written out, as on a processor that has bfloat16; stopped before step 9 of 16."
    config = at_scale(pretraining(name), 'smoke')
    images = load_dataset('scenes', 'train', config.data.size, config.data.per_class)
    make_batch = build_batch_function(config, images)

    def stops(pixels, labels, generator):
        if generator.initial_seed() == mix_seeds('feed', 0, 8, 0):
            raise EOFError
        return make_batch(pixels, labels, generator)

    def trained(batch_function, out):
        task = build_task(config, images)
        options = dict(device='cpu', precision='bf16', checkpoint_seconds=0)
        return train(task, images, batch_function, config, out, **options)

    whole = trained(make_batch, None)
    with pytest.raises(EOFError):
        trained(stops, tmp_path)
    resumed = trained(make_batch, tmp_path)
    assert resumed.resumed_from == 8
    assert resumed.history.loss.equals(whole.history.loss)
    expected = whole.task.state_dict()
    assert all(value.equal(expected[key]) for key, value in resumed.task.state_dict().items())
