import torch
from torch import nn

from pmm_fast import meta, ops
from pmm_fast.models import build_model
from pmm_fast.models.batchnorm import BatchNorm2d


def test_other_types_are_as_they_were():
    torch.manual_seed(0)
    ours, plain = BatchNorm2d(3), nn.BatchNorm2d(3)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 3, 5, 5).to(dtype)
        assert torch.equal(ours(x), plain(x)) and ours(x).dtype == dtype


def test_second_derivative_of_small_values_is_finite_in_fp16():
    x = (torch.randn(4, 3, 5, 5) * 0.01).half().requires_grad_()

    def second_derivative(layer):
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum() * 1e-6, x)[0]

    assert second_derivative(BatchNorm2d(3)).isfinite().all()
    assert not second_derivative(nn.BatchNorm2d(3)).isfinite().all()  # or this class has no reason to be


def test_order_2_step_in_fp16_is_near_float32():
    torch.manual_seed(0)
    model = build_model("deeplabv3plus_resnet18", 4, channels=8, aux_dropout=0.0).train()
    params, buffers, memory = meta.split_state(model)
    memory.copy_(ops.normalize(torch.rand_like(memory), 1))
    batches = [meta.Batch(torch.randn(3, 3, 32, 48), torch.randint(0, 4, (3, 32, 48))) for _ in range(2)]
    gradients = []
    for autocast, scale in ((None, 1.0), (torch.float16, 16.0)):
        hyper = meta.Hyper(meta.Network(model), autocast=autocast, loss_scale=scale)
        grads = meta.step(params, buffers, memory, *batches, meta.Noise(), hyper).grads
        gradients.append(torch.cat([value.flatten() for value in grads.values()]))
    assert gradients[1].isfinite().all()
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95
