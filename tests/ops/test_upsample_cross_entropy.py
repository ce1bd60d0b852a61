import pytest
import torch
import torch.nn.functional as F

from pmm_fast import ops
from pmm_fast.meta.losses import nearest_labels
from tests.ops.inputs import make_inputs
from tests.tolerances import FORWARD, relative_error


def logits_and_labels(dtype=torch.float64, size=(3, 5), label_size=(7, 11), **options):
    inputs = make_inputs(classes=4, size=size, label_size=label_size, **options)
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    ), inputs.labels


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (7, 11), (2, 11)])
def test_equals_mean_over_labelled_pixels(align_corners, size):
    logits, labels = logits_and_labels(size=size)
    probabilities = F.interpolate(logits, (7, 11), mode="bilinear", align_corners=align_corners).softmax(1)
    terms = [-probabilities[b, int(labels[b, y, x]), y, x].log() for b, y, x in torch.nonzero(labels != 255).tolist()]
    found = ops.upsample_cross_entropy(logits, labels, align_corners=align_corners)
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-12, atol=0)


def test_gradients_of_first_and_second_order():
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.upsample_cross_entropy(x, labels), logits)
    assert torch.autograd.gradgradcheck(lambda x: ops.upsample_cross_entropy(x, labels), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    logits, labels = logits_and_labels(dtype)
    loss = ops.upsample_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    assert relative_error(loss, ops.upsample_cross_entropy(logits.double(), labels)) < FORWARD[torch.float32]


def test_all_ignored_is_zero_with_zero_gradients():
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    loss = ops.upsample_cross_entropy(logits, torch.full_like(labels, 255))
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert loss == 0 and not grad.any()


def test_empty_batch_is_zero():
    assert ops.upsample_cross_entropy(torch.zeros(0, 4, 3, 5), torch.zeros(0, 6, 10, dtype=torch.uint8)) == 0


def test_extreme_logits_stay_finite_and_nan_is_not_hidden():
    logits, labels = logits_and_labels(torch.float32)
    assert ops.upsample_cross_entropy(logits * 1e4, labels).isfinite()
    assert ops.upsample_cross_entropy(torch.full_like(logits, float("nan")), labels).isnan()


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_types(label_dtype):
    logits, labels = logits_and_labels()
    expected = ops.upsample_cross_entropy(logits, labels)
    assert torch.equal(ops.upsample_cross_entropy(logits, labels.to(label_dtype)), expected)


def test_label_out_of_range():
    logits, labels = logits_and_labels()
    with pytest.raises(ValueError, match=r"labels hold 4, 200, expected classes in 0\.\.3"):
        ops.upsample_cross_entropy(logits, labels.clone().fill_(4).index_fill_(1, torch.tensor([0]), 200))


@pytest.mark.parametrize(("full", "size"), [((768, 768), (48, 48)), ((97, 130), (7, 9)), ((5, 5), (5, 5))])
def test_nearest_labels_follow_interpolate(full, size):
    labels = torch.randint(0, 19, (2, *full), dtype=torch.uint8)
    expected = F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0]
    assert torch.equal(nearest_labels(labels, size).float(), expected)
