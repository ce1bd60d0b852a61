"""What files a domain has: from a name of the configuration to a ``Listing`` of its images and labels.

A listing also holds what is wrong with the files, so that a check can name every fault; ``folder.open_listing`` makes a
domain of one that has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pmm_fast.config.schema import DataConfig, DomainConfig
from pmm_fast.config.validate import domain_problems
from pmm_fast.data.datasets import (
    DATASETS,
    Dataset,
    Layout,
    dataset_names,
    dataset_of_folder,
    find_folders,
    get_dataset,
    recognise,
)
from pmm_fast.data.files import IMAGE_SUFFIXES, DataError, LabelFormat, check_encoding, label_suffixes
from pmm_fast.data.labels import mapping, nearest, suggestion
from pmm_fast.data.scan import (
    PARTIAL,
    PREPARED,
    SPLITS,
    Found,
    Selection,
    Split,
    index_files,
    is_begun,
    read_prepared,
    select,
)
from pmm_fast.data.split_lists import LISTS, shipped_list

STREETS_VAL_IMAGES = 40
STREETS_SPACE = "cityscapes19"


@dataclass(frozen=True)
class Listing:
    """The files of one split of a domain, and what is wrong with them.

    Attributes:
        name: the name it was listed by.
        split: ``train`` or ``val``.
        dataset: data set and variant, as ``datasets.get_dataset`` takes them; empty for a plain folder.
        layout: name of the layout that was recognised, ``prepared`` for a prepared folder; empty for a plain one.
        image_root: folder below which the images lie.
        label_root: folder below which the labels lie.
        images: every image on disk, by the name that it shares with its label.
        labels: every label on disk, by that name.
        duplicates: pairs of files of one kind that share one of the split's names.
        keys: names of the split's images that are on disk, sorted; their labels may be missing.
        absent: names on the split's list without an image on disk, as the list has them.
        absent_at: where the first of them stands.
        left_out: names of images on disk that no list knows, neither that of this split nor of another.
        list_name: the list that was applied; empty without one.
        label_format: see ``files.read_labels``.
        source_space: label space or id table of the files.
        target_space: label space to learn.
        image_suffix: what an image's stem carries beyond the shared name.
        label_suffix: what a label's stem carries beyond it.
        notes: facts worth telling.
    """

    name: str
    split: str
    dataset: str
    layout: str
    image_root: Path
    label_root: Path
    images: dict[str, Path]
    labels: dict[str, Path]
    duplicates: tuple[tuple[Path, Path], ...]
    keys: tuple[str, ...]
    absent: tuple[str, ...]
    left_out: tuple[str, ...]
    label_format: LabelFormat
    source_space: str
    target_space: str
    notes: tuple[str, ...]
    absent_at: str = ""
    list_name: str = ""
    image_suffix: str = ""
    label_suffix: str = ""

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """Names of the split's images without a label."""
        return tuple(key for key in self.keys if key not in self.labels)

    def expected_label(self, key: str) -> Path:
        """Where the label of an image is looked for."""
        image = self.images[key].relative_to(self.image_root)
        stem = image.stem.removesuffix(self.image_suffix) + self.label_suffix
        return self.label_root / image.parent / f"{stem}{label_suffixes(self.label_format)[0]}"


def list_domain(name: str, config: DataConfig, split: Split) -> Listing:
    """Find the domain that ``name`` stands for and list its files.

    A name is, in this order: a key of ``config.domains``; ``streets/NAME``, a generated domain (made on first use); a
    data set (``gtav``, ``gtav:official``, ``cityscapes``, ...) that lies below ``config.root`` in a folder of a usual
    name; a folder, as it stands or below ``config.root``.  A folder is read as a data set if its name and content say
    so, else it has ``images/`` and ``labels/`` of 8-bit ids, whose sub-folders ``train`` and ``val`` are used where
    they exist.  Prepared folders are always read in this last way, in the label space that they name.

    Args:
        name: the name, as in ``data.sources`` and ``data.unseen``.
        config: where data lie and which label space to learn.
        split: ``train`` or ``val``.

    Raises:
        DataError: nothing is known by that name (the nearest is suggested), or there is nothing to list.
        ValueError: unknown split or label space, or no mapping from the label space of the files.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if name in config.domains:
        return _list_configured(name, config.domains[name], config, split)
    if name.startswith("streets/"):
        return _list_streets(name, config, split)
    known = name.partition(":")[0] in DATASETS
    if known and (folder := _dataset_folder(get_dataset(name)[0], config)):
        return _list_dataset(name, name, folder, config, split)
    tried = dict.fromkeys((Path(name).expanduser().absolute(), _below_root(config, name)))
    for folder in tried:
        if name and folder.is_dir():
            return _list_folder(name, folder.resolve(), config, split)
    if known:
        raise DataError(_not_found(name, get_dataset(name)[0], config))
    domains = sorted([*config.domains, *(f"streets/{street}" for street in _street_names())])
    raise DataError(
        f"unknown domain {name!r}{nearest(name, [*domains, *dataset_names()])} (known: {', '.join(domains)}; "
        f"data sets: {', '.join(DATASETS)}); no such folder either: {', '.join(map(str, tried))}"
        + ("" if config.root else " (data.root is empty)")
    )


def _below_root(config: DataConfig, path: str) -> Path:
    """A path of the configuration, made absolute, so that it is not looked for below ``data.root`` again."""
    return (Path(config.root).expanduser() / Path(path).expanduser()).absolute()


# --- generated streets --------------------------------------------------------------------------------------------


def _street_names() -> list[str]:
    from pmm_fast.data.streets import STREETS

    return sorted(STREETS)


def _list_streets(name: str, config: DataConfig, split: str) -> Listing:
    # here and not at the top: the generator is only needed by those who use it
    from pmm_fast.data.streets import ensure_streets

    street, names = name.removeprefix("streets/"), _street_names()
    if street not in names:
        raise DataError(f"unknown generated domain {name!r}{suggestion(name, [f'streets/{n}' for n in names])}")
    count = config.streets_images if split == "train" else STREETS_VAL_IMAGES
    height, width = config.streets_size
    cache = Path(config.cache).expanduser() if config.cache else None
    mapping(STREETS_SPACE, config.label_space)  # refuses before anything is drawn
    folder = ensure_streets(street, split, count, (height, width), cache)
    # by name and not by listing: the cache may hold more, from another run or one that is drawing now
    keys = tuple(f"{index:05d}" for index in range(count))
    roots = folder / "images" / split, folder / "labels" / split
    images, labels = ({key: root / f"{key}.png" for key in keys} for root in roots)
    return Listing(
        name=name,
        split=split,
        dataset="",
        layout="",
        image_root=roots[0],
        label_root=roots[1],
        images=images,
        labels=labels,
        duplicates=(),
        keys=keys,
        absent=(),
        left_out=(),
        label_format="ids",
        source_space=STREETS_SPACE,
        target_space=config.label_space,
        notes=(f"generated, {width}x{height}, images in {roots[0]}",),
    )


# --- data sets by name --------------------------------------------------------------------------------------------


def _dataset_folder(dataset: Dataset, config: DataConfig) -> Path | None:
    """The data set's folder below ``data.root``; of several, the first in which something is recognised."""
    folders = find_folders(dataset, _below_root(config, "")) if config.root else []
    for folder in folders:
        if (folder / PREPARED).is_file() or any(recognise(dataset, folder, split) for split in SPLITS):
            return folder
    return folders[0] if folders else None


def _not_found(name: str, dataset: Dataset, config: DataConfig) -> str:
    folders = ", ".join(dataset.folders)
    place = f"below {config.root}" if config.root else "anywhere: data.root is empty, is --data.root missing?"
    return (
        f"no data for {name!r} ({dataset.title}) {place}; looked for a folder called (in any case) {folders}; "
        f"it is usually got from {dataset.source}"
    )


def _list_dataset(name: str, full_name: str, folder: Path, config: DataConfig, split: str) -> Listing:
    _refuse_incomplete(folder)
    if (folder / PREPARED).is_file():
        return _list_prepared(name, folder, config, split, full_name)
    dataset, variant = get_dataset(full_name)
    layout = recognise(dataset, folder, split)
    if layout is None:
        tried = "; or ".join(layout.describe(split) for layout in dataset.layouts)
        raise DataError(
            f"domain {name!r}: {folder} is in none of the layouts of {dataset.title} for split {split!r}; "
            f"looked for {tried}"
        )
    check_encoding(layout.label_format, layout.source_space, config.label_space, f"domain {name!r}: labels")
    lists = dataset.variants[variant] if layout.uses_list else {}
    return _list_files(
        name,
        config,
        split,
        layout.folders(folder, split),
        layout,
        {other: shipped_list(stem) for other, stem in lists.items()},
        [f"layout {layout.name}"],
        dataset.full_name(variant),
    )


def _count_note(full_name: str, split: str, count: int) -> list[str]:
    """What is said of a split that is not as large as is known of its data set."""
    if not full_name:
        return []
    dataset, variant = get_dataset(full_name)
    known = dataset.counts.get((variant, split), count)
    return [f"{count} of {known} known images"] if count != known else []


def _refuse_incomplete(folder: Path) -> None:
    """A folder that ``pmm_fast.data.prepare`` began and has not completed lacks files that nothing else tells of."""
    if folder.name.endswith(PARTIAL) or (is_begun(folder) and not (folder / PREPARED).is_file()):
        raise DataError(f"{folder} was not completed; call python -m pmm_fast.data.prepare again")


def _list_prepared(name: str, folder: Path, config: DataConfig, split: str, full_name: str = "") -> Listing:
    """A folder that was prepared, which must be that of ``full_name`` where one is given."""
    record = read_prepared(folder)
    if full_name and record.dataset:
        dataset, variant = get_dataset(full_name)
        if dataset.full_name(variant) != record.dataset:
            raise DataError(
                f"{folder / PREPARED}: expected {dataset.full_name(variant)}, but it was prepared from {record.dataset}"
            )
    definition = DomainConfig(
        images=_split_folder(folder, "images", split), labels=_split_folder(folder, "labels", split)
    )
    listing = _list_generic(name, replace(definition, root=str(folder), label_space=record.label_space), config, split)
    notes = ["layout prepared", *_count_note(record.dataset, split, len(listing.keys))]
    if record.images == "jpeg":
        notes.append(f"images: jpeg, quality {record.quality}")
    return replace(listing, dataset=record.dataset, layout="prepared", notes=(*notes, *listing.notes))


# --- plain folders ------------------------------------------------------------------------------------------------


def _list_folder(name: str, folder: Path, config: DataConfig, split: str) -> Listing:
    _refuse_incomplete(folder)
    if (folder / PREPARED).is_file():
        return _list_prepared(name, folder, config, split)
    if dataset := dataset_of_folder(folder):
        return _list_dataset(name, dataset.name, folder, config, split)
    images, labels = (_split_folder(folder, kind, split) for kind in ("images", "labels"))
    return _list_generic(name, DomainConfig(root=str(folder), images=images, labels=labels), config, split)


def _split_folder(root: Path, kind: str, split: str) -> str:
    """``images/train`` where there are such folders, else ``images``."""
    if (root / kind / split).is_dir():
        return f"{kind}/{split}"
    # falling back to all images would mix training images into a test
    others = [other for other in SPLITS if (root / kind / other).is_dir()]
    if others:
        raise DataError(f"{root / kind} has a folder {others[0]!r} but none called {split!r}")
    return kind


def _list_configured(name: str, domain: DomainConfig, config: DataConfig, split: str) -> Listing:
    if not (domain.root or domain.dataset or config.root):
        raise DataError(f"data.domains.{name}.root is empty, and so is data.root: is --data.root missing?")
    if problems := domain_problems(name, domain):
        raise DataError("; ".join(problems))
    if not domain.dataset:
        return _list_described(name, domain, config, split)
    dataset, _ = get_dataset(domain.dataset)
    if domain.root:
        folder = _existing(_domain_root(domain, config, split), name, "data set", _root_hint(domain, config))
        return _list_dataset(name, domain.dataset, folder, config, split)
    found = _dataset_folder(dataset, config)
    if found is None:
        raise DataError(_not_found(name, dataset, config))
    return _list_dataset(name, domain.dataset, found, config, split)


def _list_described(name: str, domain: DomainConfig, config: DataConfig, split: str) -> Listing:
    """A folder that is described, as far as it is not left to what is there."""
    folder = _domain_root(domain, config, split)
    _refuse_incomplete(folder)
    if (folder / PREPARED).is_file() and replace(domain, root="") == DomainConfig():
        return _list_prepared(name, folder, config, split)
    if not domain.list_file and "{split}" not in domain.root + domain.images + domain.labels:
        images, labels = (_split_folder(folder, kind, split) for kind in (domain.images, domain.labels))
        domain = replace(domain, images=images, labels=labels)
    return _list_generic(name, domain, config, split)


def _domain_root(domain: DomainConfig, config: DataConfig, split: str) -> Path:
    return _below_root(config, domain.root.replace("{split}", split))


def _root_hint(domain: DomainConfig, config: DataConfig) -> str:
    is_clear = config.root or Path(domain.root).expanduser().is_absolute()
    return "" if is_clear else "; data.root is empty: is --data.root missing?"


def _list_generic(name: str, domain: DomainConfig, config: DataConfig, split: str) -> Listing:
    source = domain.label_space or config.label_space
    check_encoding(domain.label_format, source, config.label_space, f"data.domains.{name}")
    root, hint = _domain_root(domain, config, split), _root_hint(domain, config)
    image_root = _existing(root / domain.images.replace("{split}", split), name, "images", hint)
    label_root = _existing(root / domain.labels.replace("{split}", split), name, "labels", hint)
    layout = Layout(
        name="",
        images=domain.images,
        labels=domain.labels,
        image_suffix=domain.image_suffix,
        label_suffix=domain.label_suffix,
        label_format=domain.label_format,
        source_space=source,
    )
    lists, notes = {}, []
    if domain.list_file:
        lists = _find_lists(domain.list_file, root, name, split)
    elif "{split}" not in domain.root + domain.images and split not in Path(domain.images).parts:
        notes.append("no split: train and val are the same images")
    return _list_files(name, config, split, (image_root, label_root), layout, lists, notes)


def _existing(folder: Path, name: str, option: str, hint: str) -> Path:
    if not folder.is_dir():
        parent = next(p for p in folder.absolute().parents if p.is_dir())
        raise DataError(f"domain {name!r}: no folder {folder} for its {option} ({parent} exists){hint}")
    return folder


def _find_lists(list_file: str, root: Path, name: str, split: str) -> dict[str, Path]:
    """The list of the split, and those of the others where there are any; they may be one file."""

    def candidates(other: str) -> list[Path]:
        given = Path(list_file.replace("{split}", other)).expanduser()
        return [path for path in (root / given, LISTS / given) if path.is_file()]

    found: dict[str, Path] = {other: paths[0] for other in SPLITS if (paths := candidates(other))}
    if split not in found:
        wanted = list_file.replace("{split}", split)
        shipped = sorted(path.name for path in LISTS.glob("*.txt"))
        raise DataError(
            f"data.domains.{name}.list_file: no file {root / Path(wanted).expanduser()}, and no list of that name is "
            f"part of the package{suggestion(wanted, shipped)}"
        )
    return found


# --- files --------------------------------------------------------------------------------------------------------


def _list_files(
    name: str,
    config: DataConfig,
    split: str,
    roots: tuple[Path, Path],
    layout: Layout,
    lists: Mapping[str, Path],
    notes: list[str],
    dataset: str = "",
) -> Listing:
    images, labels = _scan(name, roots, layout)
    notes = [*notes, f"images in {roots[0]}"]
    if extra := sorted(labels.files.keys() - images.files.keys()):
        notes.append(f"{len(extra)} labels have no image (first: {extra[0]}), not used")
    if lists:
        chosen = select(images.files, lists, split, layout.image_suffix)
        shipped = lists[split].parent == LISTS
        notes.append(f"list {lists[split].stem if shipped else lists[split]}")
        notes += [f"{count} of its images are also in {other}" for other, count in chosen.shared.items()]
    else:
        chosen = Selection(tuple(sorted(images.files)), (), "", (), {})
    notes += _count_note(dataset, split, len(chosen.keys))
    keys = set(chosen.keys)
    return Listing(
        name=name,
        split=split,
        dataset=dataset,
        layout=layout.name,
        image_root=roots[0],
        label_root=roots[1],
        images=images.files,
        labels=labels.files,
        duplicates=tuple((one, other) for key, one, other in images.duplicates + labels.duplicates if key in keys),
        keys=chosen.keys,
        absent=chosen.absent,
        left_out=chosen.left_out,
        label_format=layout.label_format,
        source_space=layout.source_space,
        target_space=config.label_space,
        notes=tuple(notes),
        absent_at=chosen.absent_at,
        list_name=str(lists.get(split, "")),
        image_suffix=layout.image_suffix,
        label_suffix=layout.label_suffix,
    )


def _scan(name: str, roots: tuple[Path, Path], layout: Layout) -> tuple[Found, Found]:
    """Images and labels; a domain without either has nothing to list."""
    images = index_files(roots[0], IMAGE_SUFFIXES, layout.image_suffix, by_stem=layout.uses_list)
    extensions = label_suffixes(layout.label_format)
    labels = index_files(roots[1], extensions, layout.label_suffix, layout.not_suffix, layout.uses_list)
    for what, found, root, kinds, suffix in (
        ("image", images, roots[0], IMAGE_SUFFIXES, layout.image_suffix),
        ("label", labels, roots[1], extensions, layout.label_suffix),
    ):
        if not found.files:
            hint = f"; {found.others} files do not end with {what}_suffix {suffix!r}" if found.others else ""
            if found.kinds:
                there = (f"{count} {kind or 'extensionless'} files" for kind, count in sorted(found.kinds.items()))
                hint += f"; there are {', '.join(there)}"
            raise DataError(f"domain {name!r}: no {what} files ({' '.join(kinds)}) below {root}{hint}")
    return images, labels
