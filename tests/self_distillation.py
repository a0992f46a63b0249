"Properties of MoCo v3, DINO and iBOT: which parameters get gradients, and the EMA update of the teacher."

import torch


def check_gradients(task, batch):
    "Every parameter of the student gets a gradient, none of the teacher."
    task(batch, 0.5)['loss'].backward()
    for name, p in task.named_parameters():
        if name.startswith('teacher.'):
            assert p.grad is None and not p.requires_grad
        else:
            assert p.grad.isfinite().all() and p.grad.any(), name


def check_teacher_update(
    task,  # with a `teacher` of starting momentum 0.9
):
    "Half-way through the training the momentum is 0.95; the student does not change."
    with torch.no_grad():
        for p in task.parameters():
            p.add_(torch.randn_like(p))
    parameters = dict(task.named_parameters())
    before = {name: p.clone() for name, p in parameters.items()}
    task.after_step(0.5)
    for name, p in parameters.items():
        if not name.startswith('teacher.'):
            assert p.equal(before[name])
            continue
        expected = 0.95 * before[name] + 0.05 * before[name.removeprefix('teacher.')]
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
