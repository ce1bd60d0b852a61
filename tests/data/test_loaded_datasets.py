"""Every data set in every layout and encoding, through both loaders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pmm_fast.config.schema import DataConfig
from pmm_fast.data.folder import open_domain
from pmm_fast.data.loader import choose_loader, make_loader
from tests.data import trees

LOADERS = ["torch", "dali"] if choose_loader("auto")[0] == "dali" else ["torch"]


@pytest.mark.parametrize(
    ("dataset", "layout"), [(dataset, layout) for dataset, layouts in trees.TREES.items() for layout in layouts]
)
def test_labels_arrive_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, layout: str) -> None:
    trees.use_small_lists(monkeypatch, tmp_path / "lists")
    expected = trees.make_tree(tmp_path / dataset, dataset, layout)["train"]
    names, maps = sorted(expected), [torch.from_numpy(expected[name]) for name in sorted(expected)]
    settings = DataConfig(root=str(tmp_path), label_space=trees.SPACE[dataset], scale=[1.0, 1.0], flip=0.0, workers=1)
    settings.crop = list(maps[0].shape)
    domain = open_domain(dataset, settings, "train")
    assert [path.name.startswith(name.split("/")[-1]) for (path, _), name in zip(domain.pairs, names, strict=True)]
    batches = []
    for settings.loader in LOADERS:
        batches.append(list(make_loader([domain], settings, 3, 0, 3)))
        seen = set()
        for batch in batches[-1]:
            for image, labels in zip(batch.images[0], batch.labels[0], strict=True):
                (index,) = (i for i, wanted in enumerate(maps) if torch.equal(labels, wanted))
                found = image[:, 3, 3].int().numpy()
                assert np.abs(found - trees.colour_of(names[index])).max() <= 3
                seen.add(index)
        assert seen == set(range(len(maps)))
    for first, second in zip(batches[0], batches[-1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
