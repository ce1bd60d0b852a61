"""Segmentation scores from a confusion matrix.

K classes; the matrix is int64 ``[K, K]``, rows the truth, columns the prediction, entries pixels.  Counts stay integers
until a ratio is taken in float64: summed in float32, as the released code does, they stop growing at 2^24.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int, ignore: int = 255) -> Tensor:
    """Count the pixels of every pair of true and predicted class.

    Args:
        prediction: predicted classes, any integer dtype and shape, in ``0 .. num_classes - 1``.
        label: true classes, same shape, any integer dtype; pixels equal to ``ignore`` are not counted.
        num_classes: K.
        ignore: the label that is not counted.

    Returns:
        int64 ``[K, K]`` on the device of ``label``; rows truth, columns prediction.

    Raises:
        ValueError: shapes differ, or a counted label or prediction is not a class.
    """
    if prediction.shape != label.shape:
        raise ValueError(
            f"confusion_matrix: prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape"
        )
    counted = label != ignore
    truth, guess = label[counted].long(), prediction[counted].long()
    for name, values in (("label", truth), ("prediction", guess)):
        wrong = values[(values < 0) | (values >= num_classes)]
        if wrong.numel():
            raise ValueError(
                f"confusion_matrix: {name} holds {int(wrong[0])}, expected 0..{num_classes - 1}"
                + (f" or {ignore} for ignore" if name == "label" else "")
            )
    return torch.bincount(truth * num_classes + guess, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass
class Confusion:
    """A running confusion matrix and the scores it gives.

    Attributes:
        num_classes: K.
        ignore: the label that is not counted.
        matrix: int64 ``[K, K]`` on the CPU, rows truth, columns prediction.
    """

    num_classes: int
    ignore: int = 255
    matrix: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        shape = (self.num_classes, self.num_classes)
        if self.matrix.numel() == 0:
            self.matrix = torch.zeros(shape, dtype=torch.int64)
        if tuple(self.matrix.shape) != shape or self.matrix.dtype != torch.int64:
            raise ValueError(
                f"Confusion: matrix must be int64 {list(shape)}, got {self.matrix.dtype} {list(self.matrix.shape)}"
            )

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add the pixels of a prediction; see ``confusion_matrix`` for the arguments."""
        self.matrix += confusion_matrix(prediction, label, self.num_classes, self.ignore).cpu()

    def iou(self) -> Tensor:
        """Intersection over union of every class: float64 ``[K]``, NaN for classes in neither truth nor prediction."""
        hits = self._hits()
        return hits / (self._truth() + self._predicted() - hits)

    def miou(self) -> float:
        """Mean of ``iou`` over the classes that have one, in 0..1; NaN if none has."""
        return float(self.iou().nanmean())

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that are right, in 0..1; NaN if none was counted."""
        return float(self._hits().sum() / self._truth().sum())

    def class_accuracies(self) -> Tensor:
        """Share of every class's pixels that are right: float64 ``[K]``, NaN for classes that are not in the truth."""
        return self._hits() / self._truth()

    def class_accuracy(self) -> float:
        """Mean of ``class_accuracies`` over the classes in the truth, in 0..1; NaN if there is none."""
        return float(self.class_accuracies().nanmean())

    def fwiou(self) -> float:
        """Frequency-weighted IoU: mean of ``iou`` weighted by the pixels of each class in the truth; NaN if none."""
        truth = self._truth()
        # a class absent from the truth has weight 0, but may have no IoU
        return float((truth * self.iou().nan_to_num()).sum() / truth.sum())

    def _hits(self) -> Tensor:
        return self.matrix.diagonal().double()

    def _truth(self) -> Tensor:
        return self.matrix.sum(1).double()

    def _predicted(self) -> Tensor:
        return self.matrix.sum(0).double()
