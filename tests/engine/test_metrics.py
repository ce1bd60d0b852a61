"""Scores against a loop over pixels, numbers by hand, and counts that float32 could not hold."""

from __future__ import annotations

import math

import pytest
import torch

from pmm_fast.engine.metrics import Confusion, confusion_matrix


def filled(matrix: list[list[int]]) -> Confusion:
    return Confusion(len(matrix), matrix=torch.tensor(matrix))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_confusion_matrix_equals_a_loop(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    classes = 5
    label = torch.randint(0, classes + 1, (2, 9, 11), generator=generator)
    label[label == classes] = 255
    prediction = torch.randint(0, classes, label.shape, generator=generator)
    expected = torch.zeros(classes, classes, dtype=torch.int64)
    for truth, guess in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if truth != 255:
            expected[truth, guess] += 1
    label = label.to(dtype)
    result = confusion_matrix(prediction.to(torch.uint8), label, classes)
    assert result.dtype == torch.int64 and torch.equal(result, expected)
    # not its own transpose, so rows and columns are told apart
    assert not torch.equal(expected, expected.T)


def test_another_ignore_label() -> None:
    label = torch.tensor([0, 1, 9])
    assert confusion_matrix(torch.tensor([0, 0, 1]), label, 2, ignore=9).tolist() == [[1, 0], [1, 0]]
    assert confusion_matrix(torch.tensor([0, 0, 1]), label, 10).sum() == 3


def test_all_ignored() -> None:
    confusion = Confusion(3)
    confusion.update(torch.zeros(4, dtype=torch.uint8), torch.full((4,), 255, dtype=torch.uint8))
    assert int(confusion.matrix.sum()) == 0
    assert all(math.isnan(value) for value in (confusion.miou(), confusion.pixel_accuracy(), confusion.fwiou()))


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([0, 1], [0, 2], "label holds 2, expected 0..1 or 255 for ignore"),
        ([0, 1], [0, -1], "label holds -1, expected 0..1 or 255"),
        ([0, 2], [0, 1], "prediction holds 2, expected 0..1$"),
        ([0, 1, 1], [0, 1], r"prediction \(3,\) and label \(2,\) differ in shape"),
    ],
)
def test_values_that_are_no_classes(prediction: list[int], label: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(prediction), torch.tensor(label), 2)


def test_a_prediction_where_the_label_is_ignored_may_be_anything() -> None:
    assert confusion_matrix(torch.tensor([7, 1]), torch.tensor([255, 1]), 2).tolist() == [[0, 0], [0, 1]]


def test_scores_by_hand() -> None:
    # class 2 is predicted but not there (IoU 0), class 3 is neither (no IoU)
    confusion = filled([[6, 2, 0, 0], [1, 8, 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    iou = confusion.iou()
    assert iou[:3].tolist() == pytest.approx([6 / 9, 8 / 14, 0.0]) and math.isnan(iou[3])
    assert confusion.miou() == pytest.approx((6 / 9 + 8 / 14) / 3)
    assert confusion.pixel_accuracy() == pytest.approx(14 / 20)
    assert confusion.class_accuracies()[:2].tolist() == pytest.approx([6 / 8, 8 / 12])
    assert confusion.class_accuracy() == pytest.approx((6 / 8 + 8 / 12) / 2)
    assert confusion.fwiou() == pytest.approx((8 * 6 / 9 + 12 * 8 / 14) / 20)


def test_counts_beyond_float32_are_exact() -> None:
    big = 2**24
    confusion = filled([[big, 0], [0, 1]])
    for _ in range(3):
        confusion.update(torch.tensor([0]), torch.tensor([0]))
    assert confusion.matrix[0, 0] == big + 3
    confusion.update(torch.tensor([1]), torch.tensor([0]))
    assert confusion.iou()[0] == (big + 3) / (big + 4)


def test_update_adds_and_instances_share_nothing() -> None:
    first, second = Confusion(2), Confusion(2)
    first.update(torch.tensor([[0, 1]]), torch.tensor([[1, 1]]))
    first.update(torch.tensor([[0]]), torch.tensor([[0]]))
    assert first.matrix.tolist() == [[1, 0], [1, 1]] and second.matrix.sum() == 0


def test_a_matrix_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match=r"matrix must be int64 \[2, 2\], got torch.int64 \[3, 3\]"):
        Confusion(2, matrix=torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must be int64 \[2, 2\], got torch.float32"):
        Confusion(2, matrix=torch.zeros(2, 2))
