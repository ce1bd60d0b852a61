"""Segmenting images that have no labels.

Shapes: ``K`` classes, ``H x W`` pixels of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from pmm_fast import ops
from pmm_fast.config import Config, EvalConfig, EvalProtocol, resolve_protocol, validate
from pmm_fast.data.inputs import read_upright, upright
from pmm_fast.data.labels import get_space
from pmm_fast.data.survey import many
from pmm_fast.engine import checkpoint
from pmm_fast.engine.build import AMP_TYPES, pick_device, place
from pmm_fast.engine.inference import (
    coarse_logits,
    is_out_of_memory,
    predict_logits,
    segment,
    to_device,
)
from pmm_fast.models import Segmentor
from pmm_fast.viz.predictions import Prediction

Picture = str | Path | Image.Image | np.ndarray


class PredictionError(ValueError):
    """An image that cannot be predicted, or a network that cannot predict."""


class Predictor:
    """A trained network that segments images: ``Predictor("runs/demo/pinmem")("street.jpg")``.

    Args:
        path_or_model: folder of a run, checkpoint file, or a network, which is then moved and put into evaluation mode.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        protocol: name of a test protocol (``whole``, ``sliding``, ...), or one of ``config.resolve_protocol``.
        amp: mixed precision.
        amp_dtype: its type, ``bf16`` or ``fp16``.
        probabilities: keep those of every class in each prediction: 2 K bytes a pixel.
        seed: of the noise of protocols that have noise, not negative; an image gets the same whenever it is asked for.
        tile_batch: tiles and mirrored images that go through the network at once; 0: eight on a GPU, one on a CPU.

    Attributes:
        model: the network, on ``device``.
        device: where it is.
        space: its classes.
        protocol: how images are segmented.

    Raises:
        ValueError: an unreadable checkpoint (``CheckpointError``), an unknown protocol or device, another wrong
            argument, or a network that does not say which classes it was trained for (``PredictionError``).
    """

    def __init__(
        self,
        path_or_model: str | Path | Segmentor,
        device: str = "auto",
        protocol: str | EvalProtocol = "whole",
        amp: bool = False,
        amp_dtype: Literal["bf16", "fp16"] = "bf16",
        probabilities: bool = False,
        seed: int = 304,
        tile_batch: int = 0,
    ) -> None:
        _check(amp_dtype, seed, tile_batch)
        self.device = pick_device(device)
        self.protocol = _resolved(protocol) if isinstance(protocol, str) else protocol
        model = path_or_model if isinstance(path_or_model, Segmentor) else checkpoint.load(path_or_model)
        if model.label_space is None:
            raise PredictionError(
                "the network does not say which classes it was trained for: set its label_space, or give the file one "
                "with  python -m pmm_fast.convert IN OUT --label-space NAME"
            )
        self.space = get_space(model.label_space)
        if self.space.num_classes != model.num_classes:
            raise PredictionError(
                f"the network has {model.num_classes} classes, its label space {model.label_space} "
                f"{self.space.num_classes}"
            )
        self._amp_dtype = AMP_TYPES[amp_dtype] if amp else None
        place(model, self.device, self._amp_dtype)
        self.model = model.eval()
        self._probabilities, self._seed, self._tile_batch = probabilities, seed, tile_batch

    def __call__(self, image: Picture) -> Prediction:
        """Segment an image.

        Args:
            image: a file, a PIL image, or uint8 ``[H, W, 3]`` RGB; files and PIL images are turned as their EXIF
                orientation asks.

        Returns:
            The prediction, of the (turned) image's size.

        Raises:
            ValueError: a file that cannot be read (``DataError``), another dtype, shape or depth, an image that the
                network refuses or answers with what is not finite, or too little memory (``PredictionError``).
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[Picture]) -> list[Prediction]:
        """Segment images, those of equal size together.

        Where the protocol is one pass over the whole image (``whole`` is), images go through the network as one batch,
        which gives what each alone does but for rounding; under any other protocol one after the other.

        Args:
            images: as for a call.

        Raises:
            ValueError: as for a call.
        """
        pictures = [to_rgb(image) for image in images]
        together = self._takes_batches() and len({picture.size for picture in pictures}) == 1 and len(pictures) > 1
        try:
            if together:
                return self._batch(pictures)
            return [self._one(picture) for picture in pictures]
        except ValueError as error:
            raise PredictionError(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            at_once = many(len(pictures) if together else 1, "image")
            raise PredictionError(
                f"{self.device} has too little memory for {at_once} of {' x '.join(map(str, pictures[0].size))}; "
                "smaller batches, mixed precision (amp) or the protocol sliding take less"
            ) from error

    def _takes_batches(self) -> bool:
        """Whether the protocol is one pass over the image as it is."""
        protocol = self.protocol
        sliding_or_noisy = protocol.method == "sliding" or protocol.noise or protocol.flip
        return not (self._probabilities or sliding_or_noisy or protocol.height or protocol.scales != (1.0,))

    def _batch(self, images: list[Image.Image]) -> list[Prediction]:
        pixels = [to_device(image, self.device) for image in images]
        logits = coarse_logits(self.model, pixels, amp_dtype=self._amp_dtype, tile_batch=len(pixels))
        size = images[0].height, images[0].width
        # each image is one tile, which covers it
        found = [ops.segment_tiles(each[None], [0], [0], size, size, confidence=True) for each in logits]
        return [self._prediction(image, *maps) for image, maps in zip(images, found, strict=True)]

    def _one(self, image: Image.Image) -> Prediction:
        size = image.height, image.width
        arguments = (self.model, image, size, self.protocol, self.device, self._amp_dtype, self._seed)
        if not self._probabilities:
            return self._prediction(image, *segment(*arguments, confidence=True, tile_batch=self._tile_batch))
        probabilities = predict_logits(*arguments, tile_batch=self._tile_batch).softmax(0)
        confidence, ids = probabilities.max(0)
        return self._prediction(image, ids.byte(), confidence, probabilities.half())

    def _prediction(
        self, image: Image.Image, ids: Tensor, confidence: Tensor | None, probabilities: Tensor | None = None
    ) -> Prediction:
        assert confidence is not None
        every = None if probabilities is None else probabilities.cpu().numpy()
        return Prediction(ids.cpu().numpy(), confidence.cpu().numpy(), image, self.space, every)


def to_rgb(image: Picture) -> Image.Image:
    """A picture of any kind that a predictor takes as an upright RGB image.

    Raises:
        ValueError: a file that cannot be read (``DataError``), another dtype, shape or depth (``PredictionError``).
    """
    if isinstance(image, str | Path):
        return read_upright(Path(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise PredictionError(f"image: expected uint8 [H, W, 3], RGB, got {image.dtype} {list(image.shape)}")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise PredictionError(f"image: expected a path, a PIL image or a uint8 array, got {type(image).__name__}")
    if image.mode.startswith(("I", "F")):
        raise PredictionError(f"image: expected 8 bits a channel, got mode {image.mode}")
    return upright(image).convert("RGB")


def _check(amp_dtype: str, seed: int, tile_batch: int) -> None:
    if amp_dtype not in AMP_TYPES:
        raise PredictionError(f"amp_dtype: expected one of {', '.join(AMP_TYPES)}, got {amp_dtype!r}")
    if tile_batch < 0:
        raise PredictionError(f"tile_batch: expected at least 0, got {tile_batch}")
    if seed < 0:
        raise PredictionError(f"seed: expected at least 0, got {seed}")


def _resolved(name: str) -> EvalProtocol:
    settings = EvalConfig(protocol=name)
    validate(Config(eval=settings), training=False)
    return resolve_protocol(settings)
