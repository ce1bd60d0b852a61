"""Predictions as pictures and files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pmm_fast import predict as program
from pmm_fast.data.files import read_labels
from pmm_fast.data.labels import colourise, get_space
from pmm_fast.viz.overlays import overlay
from pmm_fast.viz.predictions import KINDS, OPACITY, Prediction, cityscapes_ids, output_file
from tests.tiny_network import noise

SPACE = get_space("cityscapes19")


def prediction(space: str = "cityscapes19", probabilities: bool = True) -> Prediction:
    """Classes 0, 1, 2, ... row by row, more confident from pixel to pixel."""
    count = get_space(space).num_classes
    ids = (np.arange(48).reshape(6, 8) % count).astype(np.uint8)
    confidence = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    every = np.random.default_rng(1).random((count, 6, 8)).astype(np.float16) if probabilities else None
    return Prediction(ids, confidence, Image.fromarray(noise(6, 8)), get_space(space), every)


def test_pictures():
    found = prediction()
    assert found.overlay() == overlay(found.image, found.ids, SPACE, OPACITY)
    assert found.overlay(0) == found.image and found.overlay(1) != found.overlay()
    colours = found.colours()
    assert colours.mode == "P" and np.array_equal(np.asarray(colours), found.ids)
    assert np.array_equal(np.asarray(colours.convert("RGB")), colourise(found.ids, SPACE))
    grey = np.asarray(found.confidence_map())
    assert grey.dtype == np.uint8 and np.array_equal(grey.ravel(), np.linspace(0, 255, 48).round())
    assert np.array_equal(found.pixels(), [3] * 10 + [2] * 9)


def test_ids_of_cityscapes():
    found = prediction()
    assert np.array_equal(np.asarray(found.id_map()), found.ids)
    # the table of the data set's own scripts
    native = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert cityscapes_ids(SPACE).tolist() == native
    assert np.array_equal(np.asarray(found.id_map("cityscapes")), np.array(native)[found.ids])
    # without terrain, truck and train
    assert cityscapes_ids(get_space("synthia16")).tolist() == [i for i in native if i not in (22, 27, 31)]
    with pytest.raises(ValueError, match=r"idd_lite7: its classes drivable, .* have no ids in Cityscapes"):
        prediction("idd_lite7").id_map("cityscapes")


def test_files_are_read_back(tmp_path):
    found = prediction()
    files = found.save(tmp_path, "town/street.1", KINDS, ids="cityscapes")
    assert files == [output_file(tmp_path, kind, "town/street.1") for kind in KINDS]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(files)
    by_kind = dict(zip(KINDS, files, strict=True))
    assert by_kind["overlay"] == tmp_path / "overlay/town/street.1.png"
    for kind, picture in (("overlay", found.overlay()), ("confidence", found.confidence_map())):
        with Image.open(by_kind[kind]) as stored:
            assert stored.mode == picture.mode and np.array_equal(np.asarray(stored), np.asarray(picture))
    # both are label files that can be trained on
    for label_format, kind, space in (
        ("colours", "colours", SPACE.name),
        ("ids", "colours", SPACE.name),
        ("ids", "ids", "cityscapes_ids"),
    ):
        assert np.array_equal(read_labels(by_kind[kind], label_format, space, SPACE.name), found.ids)
    with np.load(by_kind["probabilities"]) as arrays:
        assert np.array_equal(arrays["probabilities"], found.probabilities)
        assert tuple(arrays["classes"]) == SPACE.classes


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"kind: expected overlay, .* got 'classes'"):
        prediction().save(tmp_path, "a", ["classes"])
    with pytest.raises(ValueError, match=r"build the Predictor with probabilities=True"):
        prediction(probabilities=False).save(tmp_path, "a", ["probabilities"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        prediction().save(tmp_path / "file", "a")


def test_the_program_offers_every_kind():
    assert program.KINDS == KINDS
