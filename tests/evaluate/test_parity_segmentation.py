"SemanticMIM's segmentation probe against the official code: logits, loss, gradients, predictions, mIoU."

import torch
from conftest import assert_close
from mimstudy.evaluate.segmentation import (
    confusion_matrix,
    mean_iou,
    pixel_logits,
    linear_segmentation_head,
    segmentation_loss,
)


def head_of(g):
    head = linear_segmentation_head(16, 21)
    head.load_state_dict({'weight': g['head.weight'], 'bias': g['head.bias']})
    return head


def test_logits_loss_and_gradients(golden):
    g = golden('seg_probe')
    head = head_of(g)
    logits = pixel_logits(head, g['features'], 20)
    assert_close(logits, g['train_logits'])
    loss = segmentation_loss(logits, g['labels'][:, 0])
    assert_close(loss, g['loss'])
    loss.backward()
    assert_close(head.weight.grad, g['grad_weight'])
    assert_close(head.bias.grad, g['grad_bias'])
    assert (g['train_labels'] == 255).any() and segmentation_loss(logits, g['train_labels'][:, 0]) == loss


def test_predictions_and_score(golden):
    g = golden('seg_probe')
    predictions = pixel_logits(head_of(g), g['features'], 28).argmax(1)
    assert predictions.equal(g['eval_preds'][:, 0].long())
    counts = confusion_matrix(predictions, g['labels'][:, 0], 21)
    assert counts.equal(g['confusion'])
    assert abs(mean_iou(counts, 'zero') / 100 / g['miou'].item() - 1) < 5e-6


def test_absent_classes(golden):
    g = golden('seg_probe')
    counts = confusion_matrix(g['preds_b'][:, 0].long(), g['labels_b'][:, 0], 21)
    assert counts.equal(g['confusion_b'])
    present = ((counts.sum(0) + counts.sum(1)) > 0).sum().item()
    assert present < 21 and abs(mean_iou(counts, 'zero') / 100 / g['miou_b'].item() - 1) < 5e-6
    assert abs(mean_iou(counts) - mean_iou(counts, 'zero') * 21 / present) < 1e-10


def test_confusion_matrices_of_batches_can_be_added():
    torch.manual_seed(0)
    preds, labels = torch.randint(0, 5, (2, 6, 9, 9))
    labels[:, 0] = 255
    expected = torch.zeros(5, 5, dtype=torch.long)
    for p, t in zip(preds.flatten().tolist(), labels.flatten().tolist()):
        if t != 255:
            expected[t, p] += 1
    assert confusion_matrix(preds, labels, 5).equal(expected)
    assert (confusion_matrix(preds[:2], labels[:2], 5) + confusion_matrix(preds[2:], labels[2:], 5)).equal(
        expected
    )
