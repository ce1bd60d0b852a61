"""The DALI loader: the crops of the torch loader, every kind of image file, clear errors, and nothing left running."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pmm_fast.config.schema import DataConfig
from pmm_fast.data.folder import DataError, FolderDomain, open_domain
from pmm_fast.data.loader import PREFETCH, make_loader
from pmm_fast.data.sampling import Iterations, Sampling
from tests.data.trees import write_png16

pytest.importorskip("nvidia.dali")
from pmm_fast.data.dali import Assembly, build_pipeline

CPU = torch.device("cpu")
# a crop that DALI resamples, against Pillow's: mean difference, and the share of values that are more than 3 levels
# away (Pillow rounds and clips between its passes, DALI does not; 0.45 and 2e-4 measured)
MEAN_LEVELS, FAR_SHARE = 0.6, 1e-3


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise: an image like a photograph, small when compressed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + rng.integers(-6, 7, pixels.shape)).clip(0, 255).astype(np.uint8))


def make_folder(root: Path, images: dict[str, Image.Image], **options: object) -> FolderDomain:
    """A folder of images, each saved as its name says, with labels of noise."""
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for number, (name, image) in enumerate(images.items()):
        image.save(root / "images" / name, **options)  # type: ignore[arg-type]
        rng = np.random.default_rng(number)
        labels = rng.integers(0, 19, image.size[::-1]).astype(np.uint8)
        Image.fromarray(labels).save((root / "labels" / name).with_suffix(".png"))
    return open_domain(str(root), DataConfig(), "train")


def config(**options: object) -> DataConfig:
    return DataConfig(**{"crop": [40, 56], "batch_per_domain": 4, "workers": 2, **options})  # type: ignore[arg-type]


def load(loader: str, domain: FolderDomain, stop: int = 3, **options: object):
    return list(make_loader([domain], config(loader=loader, **options), 5, 0, stop))


def assert_same(domain: FolderDomain, **options: object) -> None:
    for first, second in zip(load("torch", domain, **options), load("dali", domain, **options), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_kind_of_image_is_read_as_pillow_does(tmp_path: Path) -> None:
    image = scene(60, 90)
    kinds = {
        "colour.png": image,
        "palette.png": image.quantize(64),
        "grey.png": image.convert("L"),
        "alpha.png": image.convert("RGBA"),
        "bits.png": image.convert("1"),
        "photo.jpg": image,
        "grey.jpg": image.convert("L"),
        "inks.jpg": image.convert("CMYK"),
    }
    for name, kind in kinds.items():
        assert_same(make_folder(tmp_path / name, {name: kind}), stop=2)
    for options in ({"subsampling": 0}, {"progressive": True}, {"quality": 30, "subsampling": 2}):
        assert_same(make_folder(tmp_path / str(options), {"a.jpg": scene(67, 131)}, **options), stop=2)


def test_the_orientation_tag_is_not_obeyed(tmp_path: Path) -> None:
    # Pillow leaves it to its caller, and labels have no tag
    tag = Image.Exif()
    tag[0x0112] = 6
    domain = make_folder(tmp_path, {"a.jpg": scene(48, 80)}, exif=tag)
    assert_same(domain)


def test_images_smaller_than_the_crop(tmp_path: Path) -> None:
    assert_same(make_folder(tmp_path, {"a.png": scene(9, 13), "b.png": scene(100, 20)}))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> FolderDomain:
    root = tmp_path_factory.mktemp("photos")
    images = {f"{i}.{kind}": scene(120 + 7 * i, 200 - 11 * i, i) for i, kind in enumerate(("png", "jpg", "png", "jpg"))}
    return make_folder(root / "d", images)


def assemble(domain: FolderDomain, device: torch.device, resize: bool | None, **options: object):
    """Batches of an assembly in this thread."""
    settings = config(crop=[96, 128], **options)
    sampling = Sampling([domain], settings, 5)
    with ThreadPoolExecutor(2) as pool:
        assembly = Assembly(sampling, 2, device, pool, resize)
        return [assembly.batch(keys) for keys in Iterations(sampling, settings, 0, 4)]


def assert_resampled_alike(exact, resampled) -> None:
    for first, second in zip(exact, resampled, strict=True):
        assert torch.equal(first.labels, second.labels.cpu()) and torch.equal(first.looks, second.looks.cpu())
        difference = (first.images.int() - second.images.cpu().int()).abs().float()
        assert difference.mean() < MEAN_LEVELS and (difference > 3).float().mean() < FAR_SHARE
        # black where there is no image, in both
        outside = (first.labels == 255)[:, :, None].expand_as(difference)
        assert not difference[outside].any()


def test_resampling_by_dali(photos: FolderDomain) -> None:
    """What runs on a GPU, run by DALI's operators for the CPU."""
    exact = assemble(photos, CPU, False, scale=[0.5, 2.0])
    resampled = assemble(photos, CPU, True, scale=[0.5, 2.0])
    assert_resampled_alike(exact, resampled)
    assert any((batch.labels == 255).any() for batch in exact)
    assert not all(torch.equal(a.images, b.images) for a, b in zip(exact, resampled, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(photos: FolderDomain) -> None:
    device = torch.device("cuda", 0)
    exact = assemble(photos, CPU, False)
    batches = list(make_loader([photos], config(crop=[96, 128], loader="dali"), 5, 0, 4, device=device))
    assert all(batch.images.is_cuda and batch.labels.is_pinned() and batch.looks.is_pinned() for batch in batches)
    assert_resampled_alike(exact, batches)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:300]), r"a\.png: cannot be read as an image"),
        (lambda path: path.write_bytes(b"rubbish"), r"a\.png: cannot be read as an image"),
        (lambda path: path.unlink(), r"a\.png: cannot be read as an image: .*No such file"),
        (lambda path: Image.new("I;16", (90, 60)).save(path), r"a\.png: expected an 8-bit image, got mode I;16"),
        (lambda path: write_png16(path, np.zeros((60, 90, 3), int)), r"a\.png: expected .*, got 16 bits, mode RGB"),
        (lambda path: scene(60, 91).save(path), r"image and label differ in size: .*a\.png is 91x60.*is 90x60"),
    ],
    ids=["truncated", "rubbish", "missing", "16 bits grey", "16 bits", "size"],
)
def test_faults_are_named(tmp_path: Path, damage, message: str) -> None:
    domain = make_folder(tmp_path / "town", {"a.png": scene(60, 90)})
    damage(domain.pairs[0][0])
    with pytest.raises(DataError, match=rf"^domain '.*town': .*{message}") as caught:
        load("dali", domain)
    assert "\n" not in str(caught.value)
    assert not _running()


def test_a_fault_that_shows_while_decoding(tmp_path: Path) -> None:
    # the header is whole, so that DALI is the first to notice
    domain = make_folder(tmp_path / "town", {"a.png": scene(60, 90), "b.png": scene(60, 90, 1)})
    path = domain.pairs[1][0]
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"^domain '.*town': .*b\.png: cannot be read as an image"):
        load("dali", domain)
    label = domain.pairs[0][1]
    label.write_bytes(label.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"^domain '.*town': .*labels.*a\.png"):
        load("dali", FolderDomain(**{**vars(domain), "pairs": domain.pairs[:1]}))


def _running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pmm_fast loader"]


def test_loading_runs_ahead_by_a_few_batches_and_can_be_stopped(
    photos: FolderDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    original = Assembly.batch
    monkeypatch.setattr(Assembly, "batch", lambda self, keys: made.append(keys) or original(self, keys))
    batches = iter(make_loader([photos], config(loader="dali"), 5, 0, 10**6))
    next(batches)
    deadline = time.monotonic() + 10
    while len(made) < 1 + PREFETCH + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    # one taken, the queue full, one waiting to be put
    assert len(made) == 1 + PREFETCH + 1 and len(_running()) == 1
    batches.close()
    assert not _running() and len(made) == 1 + PREFETCH + 1
    with pytest.raises(StopIteration):
        next(batches)


def test_a_loop_that_is_left_ends_the_loading(photos: FolderDomain) -> None:
    batches = iter(make_loader([photos], config(loader="dali"), 5, 0, 10**6))
    for _ in batches:
        break
    (thread,) = _running()
    del batches
    thread.join(10)
    assert not thread.is_alive()


def test_no_pipeline_outlives_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected in a process that was forked later, a pipeline would wait for threads that are not there."""
    built: list[weakref.ref] = []

    def build(*arguments: object) -> object:
        pipeline = build_pipeline(*arguments)  # type: ignore[arg-type]
        built.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr("pmm_fast.data.dali.build_pipeline", build)
    domain = make_folder(tmp_path / "town", {"a.png": scene(60, 90)})
    path = domain.pairs[0][0]
    path.write_bytes(path.read_bytes()[:-2000])
    gc.disable()
    try:
        with pytest.raises(DataError) as caught:
            load("dali", domain)
        assert len(built) == 1 and built[0]() is None and caught.value is not None
    finally:
        gc.enable()


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    domain = make_folder(tmp_path / "town", {"a.png": scene(60, 90)})
    image, labels = domain.pairs[0]
    strange = Path(os.fsdecode(os.fsencode(image.parent) + b"/gr\xfcn.png"))
    image.rename(strange)
    assert_same(FolderDomain(**{**vars(domain), "pairs": [(strange, labels)]}))


def test_what_dali_alone_cannot_read(tmp_path: Path) -> None:
    domain = make_folder(tmp_path / "town", {"a.png": scene(60, 90)})
    path = domain.pairs[0][0]
    scene(60, 90).save(path, "GIF")
    load("torch", domain)
    with pytest.raises(
        DataError, match=rf"^DALI failed on one of {path}, which Pillow can read .*--loader torch.*: ."
    ) as e:
        load("dali", domain)
    assert "\n" not in str(e.value)
