import pytest
import torch
import torch.nn.functional as F

from pmm_fast import ops
from pmm_fast.meta.losses import nearest_labels
from tests.ops import matrix
from tests.ops.inputs import make_inputs


def logits_and_labels(dtype=torch.float64, size=(3, 5), label_size=(7, 11), **options):
    inputs = make_inputs(classes=4, size=size, label_size=label_size, **options)
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    ), inputs.labels


@pytest.mark.parametrize("target", [matrix.REFERENCE, matrix.CPU], ids=["reference", "cpu"])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (7, 11), (2, 11), (14, 23)])
def test_equals_mean_over_labelled_pixels(align_corners, size, target):
    logits, labels = logits_and_labels(size=size)
    probabilities = F.interpolate(logits, (7, 11), mode="bilinear", align_corners=align_corners).softmax(1)
    terms = [-probabilities[b, int(labels[b, y, x]), y, x].log() for b, y, x in torch.nonzero(labels != 255).tolist()]
    with matrix.on(target):
        found = ops.upsample_cross_entropy(logits, labels, align_corners=align_corners)
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-12, atol=0)


def test_label_out_of_range():
    logits, labels = logits_and_labels()
    with pytest.raises(ValueError, match=r"labels hold 4, 200, expected classes in 0\.\.3"):
        ops.upsample_cross_entropy(logits, labels.clone().fill_(4).index_fill_(1, torch.tensor([0]), 200))


@pytest.mark.parametrize(("full", "size"), [((768, 768), (48, 48)), ((97, 130), (7, 9)), ((5, 5), (5, 5))])
def test_nearest_labels_follow_interpolate(full, size):
    labels = torch.randint(0, 19, (2, *full), dtype=torch.uint8)
    expected = F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0]
    assert torch.equal(nearest_labels(labels, size).float(), expected)
