"Encoder files: an encoder is loaded bit by bit, plain timm opens it too, and other files are refused."

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from mimstudy.core.errors import StudyError
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.study.encoder_files import CONFIG_FILE, load_encoder, save_encoder
from mimstudy.study.records import RecordStore


@pytest.mark.parametrize(
    'encoder_class, shape',
    [
        (Encoder, dict()),
        (Encoder, dict(prefix=8, layer_scale=0.1, drop_path=0.2)),
        (Encoder, dict(prefix=3, init='conmim')),
        (RelativeEncoder, dict(layer_scale=0.1)),
    ],
)
def test_an_encoder_is_loaded_bit_by_bit(tmp_path, encoder_class, shape):
    torch.manual_seed(0)
    saved = encoder_class(size=32, patch=8, width=32, depth=2, heads=4, **shape).eval()
    save_encoder(saved, tmp_path / 'run', dict(name='invented'))
    x, before = torch.rand(2, 3, 32, 32), torch.get_rng_state()
    loaded = load_encoder(tmp_path / 'run')
    assert torch.equal(torch.get_rng_state(), before), 'loading draws no random number'
    assert type(loaded) is encoder_class and not loaded.training and loaded.config == saved.config
    assert torch.equal(loaded.forward_features(x), saved.forward_features(x))
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    statistics = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    written = json.loads((tmp_path / 'run' / CONFIG_FILE).read_text())
    assert written == dict(name='invented', statistics=statistics)


def test_the_weights_open_in_plain_timm(tmp_path):
    torch.manual_seed(0)
    saved = Encoder(size=32, patch=8, width=32, depth=2, heads=4, prefix=4).eval()
    plain = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, reg_tokens=3, num_classes=0
    ).eval()
    plain.load_state_dict(load_file(save_encoder(saved, tmp_path, {})))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(plain.forward_features(x), saved.forward_features(x))


def test_what_is_no_encoder_is_one_line(tmp_path):
    store = RecordStore(tmp_path)
    with pytest.raises(StudyError, match='no encoder in the run never'):
        store.encoder('never')
    store.run_folder('bad').mkdir(parents=True)
    (store.run_folder('bad') / 'encoder.safetensors').write_bytes(b'not a tensor')
    with pytest.raises(StudyError, match='bad/encoder.safetensors is no encoder'):
        store.encoder('bad')


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')

    monkeypatch.setattr('mimstudy.study.encoder_files.save_file', full)
    with pytest.raises(StudyError, match='encoder.safetensors cannot be written: No space left'):
        save_encoder(Encoder(size=16, patch=8, width=8, depth=1, heads=1), tmp_path, {})
    assert [file.name for file in tmp_path.iterdir()] == [CONFIG_FILE]
