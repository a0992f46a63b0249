"A row: what is trained, what is evaluated, and the records that it leaves."

import os
import warnings

import pytest
from typer.testing import CliRunner

from mimstudy.cli.commands import app
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
