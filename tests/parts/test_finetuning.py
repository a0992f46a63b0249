"The copy of an encoder with which fine-tuning begins."

import torch
from conftest import assert_close
from small_encoder import BOTH_ENCODERS, SCENES, X, small_encoder
from torch.nn import functional as F

from mimstudy.parts.encoder import block_features
from mimstudy.parts.finetuning import prepare_finetuning
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.parts.views import normalise, resize_only


@BOTH_ENCODERS
def test_the_copy_computes_the_same_and_leaves_the_original(encoder_class):
    original = small_encoder(encoder_class).eval()
    copy = prepare_finetuning(original)
    for (p, q), (r, s) in zip(block_features(original, X), block_features(copy, X), strict=True):
        assert p.equal(r) and q.equal(s)
    state = {name: w.clone() for name, w in original.state_dict().items()}
    with torch.no_grad():
        for p in copy.parameters():
            p.add_(1.0)
    assert all(w.equal(state[name]) for name, w in original.state_dict().items())


@BOTH_ENCODERS
def test_position_embeddings_are_resized_with_the_grid(encoder_class):
    "Features of an image at twice the size are closest to those of the same place."
    original = small_encoder(encoder_class).eval()
    maps = []
    for encoder, size in ((original, 32), (prepare_finetuning(original, size=64), 64)):
        _, patches = block_features(encoder, normalise(resize_only(SCENES.images, size)))[0]
        maps.append(patches.transpose(1, 2).unflatten(2, encoder.grid))
    small, large = maps
    shrunk = F.interpolate(large, (4, 4), mode='area').flatten(1)
    same_image = F.cosine_similarity(shrunk, small.flatten(1)).mean()
    other_image = F.cosine_similarity(shrunk.roll(1, 0), small.flatten(1)).mean()
    assert same_image > other_image + 0.1


def test_the_relative_encoder_gets_a_table_for_each_block():
    tuned = prepare_finetuning(small_encoder(RelativeEncoder))
    tables = [p for name, p in tuned.named_parameters() if name.endswith('relative_position_bias_table')]
    assert len(tables) == 3 and all(table.equal(tables[0]) for table in tables)
    assert_close(prepare_finetuning(tuned).eval()(X), tuned.eval()(X))
