"The probe of any encoder: what is found and refused, the table of blocks, and where the scores are kept."

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from mimstudy.core.errors import StudyError
from mimstudy.papers.experiments import experiment
from mimstudy.study.build import build_encoder
from mimstudy.study.encoder_files import save_encoder
from mimstudy.study.probe import block_table, find_encoder, probe
from mimstudy.study.records import RecordStore
from mimstudy.study.timm_models import open_timm


def test_a_run_is_found_by_its_name(tmp_path):
    store = RecordStore(tmp_path)
    one = experiment('semanticmim-t1/beit', 'smoke')
    save_encoder(build_encoder(one.config), store.run_folder(one.train_id), one.values)
    assert find_encoder(one.train_id, store) == str(tmp_path / 'runs' / one.train_id)
    assert find_encoder(str(tmp_path), store) == str(tmp_path), 'a path stays as it is'
    assert find_encoder('timm:vit_tiny_patch16_224', store) == 'timm:vit_tiny_patch16_224'


def test_blocks_are_in_the_order_of_their_numbers():
    blocks = ['10', '2', 'best', '1', '9']
    rows = [dict(protocol='knn', token='patch', block=block, score=1.0) for block in blocks]
    assert list(block_table(pd.DataFrame(rows)).index) == ['1', '2', '9', '10', 'best']


@pytest.mark.parametrize(
    'encoder, options, message',
    [
        ('timm:vit_tini_patch16_224', {}, 'did you mean'),
        ('timm:vit_tiny_patch16_224', dict(size=30), 'cannot be cut into patches of 16 px'),
        ('timm:resnet18', {}, 'is no plain vision transformer'),
        ('nowhere.pth', dict(pretrained=True), 'brings its own weights'),
        ('timm:vit_tiny_patch16_224', dict(dataset='scene'), 'did you mean scenes'),
    ],
)
def test_what_cannot_be_probed_is_one_line(tmp_path, encoder, options, message):
    with pytest.raises(StudyError) as error:
        probe(encoder, **dict(dataset='scenes', store=RecordStore(tmp_path)) | options)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.slow
def test_a_probe_of_a_run_has_the_scores_of_its_row_and_is_no_record(tmp_path):
    from mimstudy.study.row import Pretrained, probe_encoder

    store = RecordStore(tmp_path)
    row = experiment('semanticmim-t1/random', 'smoke')
    encoder = build_encoder(row.config, row.seed).eval()
    (record,) = probe_encoder(row, Pretrained(encoder), RecordStore(tmp_path / 'row'), ['knn'])
    save_encoder(encoder, store.run_folder('mine'), {})
    per_class = row.config.data.per_class
    table, file = probe('mine', 'scenes', store, protocols=('knn',), per_class=per_class)
    assert store.find() == [] and file.parent == tmp_path / 'probes'
    kept = json.loads(file.read_text())
    assert kept['scores'] == {k: v for k, v in record['scores'].items() if not k.endswith('/block')}
    assert kept['n_val'] == record['n_val'] and kept['evaluation']['knn'] == record['evaluation']


@pytest.mark.slow
def test_a_file_without_a_class_token_is_imported_and_probed(tmp_path):
    "The image tower of SigLIP: every block has scores of its patch tokens, and of no prefix tokens."
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)
    model = open_timm('vit_base_patch16_siglip_224', shape)
    save_file(model.state_dict(), tmp_path / 'siglip.safetensors')
    table, file = probe(str(tmp_path / 'siglip.safetensors'), 'scenes', RecordStore(tmp_path), per_class=2)
    assert list(table.index) == ['1', '2', 'best'] and set(table.columns) == {
        ('linear', 'patch'),
        ('knn', 'patch'),
    }
    assert table.notna().all(axis=None) and file.parent == tmp_path / 'probes'
