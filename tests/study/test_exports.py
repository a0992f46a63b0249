"Exported encoders open in plain timm, say how they are read, and are found by the name of their row."

import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from conftest import assert_close
from safetensors.torch import save_file
from typer.testing import CliRunner

from mimstudy.cli.commands import app
from mimstudy.core.errors import StudyError
from mimstudy.parts.encoder import Encoder, block_features
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.study.encoder_files import save_encoder
from mimstudy.study.exports import export_encoder, encoder_folder, write_timm
from mimstudy.study.imports import import_encoder
from mimstudy.study.model_card import model_card, plain_text
from mimstudy.study.plan import named_experiment
from mimstudy.study.records import RecordStore, record
from mimstudy.study.timm_models import open_timm

SHAPE = dict(size=32, patch=8, width=64, depth=2, heads=1)
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomised(encoder):
    "The encoder with random values in all parameters, also in those that start at 0 or 1."
    torch.manual_seed(0)
    with torch.no_grad():
        for p in encoder.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    return encoder.eval()


def mimstudy(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def check_refused(done, message=''):
    "The command ended with status 2 and one line of error."
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith('error: ') and message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


KINDS = {
    'plain': lambda: Encoder(**SHAPE),
    'layer scale': lambda: Encoder(**SHAPE, layer_scale=0.1),
    'proxies': lambda: Encoder(**SHAPE, prefix=8, mlp_ratio=2.0),
    'relative': lambda: RelativeEncoder(**SHAPE),
    'fine-tuned': lambda: RelativeEncoder(**SHAPE, tuned=True),
}

READER = '''
import json, sys, timm, torch
folder = sys.argv[1]
x = torch.load(sys.argv[2], weights_only=True)
config = json.load(open(f'{folder}/config.json'))
hub = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
weights = f'{folder}/model.safetensors'
options = dict(num_classes=0, checkpoint_path=weights, **config['model_args'])
file = timm.create_model(config['architecture'], **options)
models = (hub, file.eval())
assert not any(name.startswith('mimstudy') for name in sys.modules)
with torch.no_grad():
    tokens = [model.forward_features(x) for model in models]
    features = [model(x) for model in models]
torch.save([tokens, features, torch.tensor(hub.default_cfg['mean'])], sys.argv[2])
'''


@pytest.mark.parametrize('kind', KINDS)
def test_plain_timm_opens_it_in_a_fresh_process(kind, tmp_path):
    encoder = randomised(KINDS[kind]())
    save_encoder(encoder, tmp_path / 'run', dict(name='a training'))
    export_encoder(tmp_path / 'run', tmp_path / 'out')
    about = json.loads((tmp_path / 'out' / 'config.json').read_text())['mimstudy']
    assert about['config'] == dict(name='a training') and about['commit'] and about['versions']['torch']
    torch.save(X, tmp_path / 'x.pt')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(
        HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1'
    )
    done = subprocess.run(
        [sys.executable, '-c', READER, str(tmp_path / 'out'), str(tmp_path / 'x.pt')],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-500:]
    tokens, features, mean = torch.load(tmp_path / 'x.pt', weights_only=True)
    with torch.no_grad():
        for theirs in tokens:
            assert_close(theirs, encoder.forward_features(X), rel=1e-6)
        for theirs in features:
            assert_close(theirs, encoder(X), rel=1e-6)
    assert_close(mean, torch.tensor([0.485, 0.456, 0.406]))


@pytest.mark.parametrize('damage', ['kind', 'shape', 'json', 'config'])
def test_damaged_encoder_files(tmp_path, damage):
    save_encoder(Encoder(**SHAPE), tmp_path, {})
    header = {'kind': 'Encoder', 'encoder': json.dumps(SHAPE)}
    if damage == 'kind':
        header['kind'] = 'Decoder'
    elif damage == 'shape':
        header['encoder'] = '{"shape": 3}'
    elif damage == 'json':
        header['encoder'] = '{'
    else:
        (tmp_path / 'config.json').write_text('{')
    save_file(Encoder(**SHAPE).state_dict(), tmp_path / 'encoder.safetensors', metadata=header)
    message = 'config.json' if damage == 'config' else 'no encoder of this study'
    check_refused(mimstudy('export', tmp_path, tmp_path / 'out'), message)
    assert not (tmp_path / 'out').exists()


def test_an_imported_model_of_timm_is_exported(tmp_path):
    "DINOv3 has no class in this study; plain timm opens it again."
    tiny = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)
    model = randomised(open_timm('vit_small_patch16_dinov3', tiny))
    save_file(model.state_dict(), tmp_path / 'dinov3.safetensors')
    done = mimstudy('import', tmp_path / 'dinov3.safetensors', '--heads', '2', '--to', tmp_path / 'out')
    assert done.exit_code == 0, done.output
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    with torch.no_grad():
        assert again.forward_features(X).equal(model.forward_features(X))


# the model card


def card_of(folder):
    return (folder / 'README.md').read_text('utf-8')


@pytest.mark.parametrize('prefix', [1, 8])
def test_the_code_of_the_card_gives_the_features_that_are_scored(prefix, tmp_path):
    encoder = randomised(Encoder(**SHAPE, prefix=prefix))
    encoder.pretrained_cfg = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    write_timm(encoder, tmp_path, {})
    code = re.search(r'```python\n(.*?)```', card_of(tmp_path), re.DOTALL)[1]
    names = {}
    exec(code.replace("folder = '.'", f'folder = {str(tmp_path)!r}'), names)
    black = -torch.tensor([0.5, 0.4, 0.3]) / torch.tensor([0.2, 0.25, 0.3])
    with torch.no_grad():
        tokens, patches = block_features(encoder, black.view(1, 3, 1, 1).expand(1, 3, 32, 32))[-1]
    assert_close(names['patches'], patches.mean(1), rel=1e-5)
    assert_close(names['prefix'], tokens.mean(1), rel=1e-5)
    with torch.no_grad():
        first = names['model'].forward_head(encoder.norm(torch.cat([tokens, patches], 1)))
    assert first.equal(encoder.norm(tokens)[:, 0]), "timm's model(x) is the first prefix token"


def test_that_a_proxy_is_not_the_mean_is_said_everywhere(tmp_path):
    save_encoder(Encoder(**SHAPE, prefix=8), tmp_path / 'run', {})
    done = mimstudy('export', tmp_path / 'run', tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    for text in (done.stdout, config['mimstudy']['pooling'], card_of(tmp_path / 'out')):
        assert "timm's model(x) is the first prefix token alone" in text
        assert 'the mean of all 8 prefix tokens' in text


HOSTILE = '[x](javascript:alert(1))\n# h\n|<script>alert(1)</script>`$(id)` ![i](http://a/b.png)\x1b[31m'


def test_what_comes_from_files_is_escaped():
    config = dict(
        name=HOSTILE, method=HOSTILE, data=dict(dataset=HOSTILE), optim=[HOSTILE], eval_model=HOSTILE
    )
    one = dict(table=HOSTILE, row=HOSTILE, dataset=HOSTILE, seed=0, scores={f'{HOSTILE}/best/patch': 1.0})
    card = model_card(Encoder(**SHAPE), dict(config=config, source=HOSTILE, commit=HOSTILE), [one])
    assert '<' not in card and '\x1b' not in card
    text = card.replace(re.search(r'```python.*?```', card, re.DOTALL)[0], '')
    for mark in ('[', ']', '(java', '`', '|alert', '!', '# h'):
        for found in re.finditer(re.escape(mark), text):
            line = text[: found.start()].splitlines()[-1] if found.start() else ''
            is_ours = text.splitlines()[text[: found.start()].count('\n')].startswith('Mean [')
            assert is_ours or line.endswith('\\'), (mark, line)
    assert len(plain_text('a' * 10**6)) < 300


# rows


def trained_row(folder, **values):
    "A results folder with the encoder and a record of one row."
    row = named_experiment('semanticmim-t1/beit', 'smoke', **values)
    store = RecordStore(folder)
    save_encoder(randomised(Encoder(**SHAPE, prefix=8)), store.run_folder(row.train_id), row.values)
    store.add(record(row, 'linear', {'linear/best/patch': 41.25, 'linear/best/patch/block': 2}, 10))
    return store, row


def test_a_row_is_exported_by_its_name(tmp_path):
    trained_row(tmp_path / 'results', seed=3)
    words = ('export', 'semanticmim-t1/beit', tmp_path / 'out', '--scale', 'smoke', '--seed', '3')
    done = mimstudy(*words, '--results', tmp_path / 'results')
    assert done.exit_code == 0, done.output
    card = card_of(tmp_path / 'out')
    assert '| semanticmim-t1 | beit | scenes | 3 | linear/best/patch | 41.2 |' in card
    assert '- method: beit' in card and '- dataset: scenes' in card
    with torch.no_grad():
        found = import_encoder(tmp_path / 'out').encoder
        assert found(X).equal(randomised(Encoder(**SHAPE, prefix=8))(X))


def test_a_row_without_an_encoder_says_what_trains_it(tmp_path):
    trained_row(tmp_path, seed=3)

    def refused(row, seed, message):
        words = ('export', row, tmp_path / 'out', '--scale', 'smoke', '--seed', seed, '--results', tmp_path)
        check_refused(mimstudy(*words), message)
        assert not (tmp_path / 'out').exists()

    command = 'mimstudy run semanticmim-t1 --rows beit --scale smoke --data scenes --seeds 4'
    refused('semanticmim-t1/beit', 4, f'is not trained in {tmp_path.name}; this trains it: {command}')
    refused('semanticmim-t1/pixels', 3, 'no encoder is trained')
    refused('semanticmim-t1/bait', 3, 'did you mean beit')
    refused('semanticmim-t2/beit', 3, 'did you mean semanticmim-t1')
    refused(tmp_path / 'nowhere', 3, 'neither TABLE/ROW, nor the folder of a run')


def test_a_row_with_records_alone(tmp_path):
    "Its records exist, so mimstudy run would do nothing in this folder."
    store, row = trained_row(tmp_path)
    store.add(record(row, 'knn', {'knn/best/patch': 1.0}, 10))
    for file in store.run_folder(row.train_id).iterdir():
        file.unlink()
    with pytest.raises(StudyError, match='has scores but no encoder .* --results DIR'):
        encoder_folder(row, store)


def test_a_published_encoder_is_found(tmp_path):
    "Also if its records are published and nothing of the row is in the own folder."
    store, row = trained_row(tmp_path / 'own')
    published = RecordStore(tmp_path / 'published')
    store.publish_encoder(row.train_id, published)
    fresh = RecordStore(tmp_path / 'fresh')
    fresh.published = published
    folder = encoder_folder(row, fresh)
    assert folder == tmp_path / 'published' / 'encoders' / row.train_id
    (folder / 'encoder.safetensors').unlink()
    with pytest.raises(StudyError, match='beit is not trained in fresh'):
        encoder_folder(row, fresh)
    for protocol in row.protocols:
        published.add(record(row, protocol, {f'{protocol}/best/patch': 1.0}, 10))
    with pytest.raises(StudyError, match='has scores but no encoder .* --results DIR'):
        encoder_folder(row, fresh)


def test_the_folder_of_a_rows_notebook_says_where_its_encoder_is(tmp_path):
    store, row = trained_row(tmp_path)
    folder = store.run_folder(row.id)
    folder.mkdir(parents=True)
    (folder / 'row.ipynb').write_text('{}')
    check_refused(mimstudy('export', folder, tmp_path / 'out'), 'mimstudy export TABLE/ROW')
