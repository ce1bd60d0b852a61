"""Batches of both loaders: the same for any number of workers, any point of continuation and either loader, and clear
when files are at fault."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pmm_fast.config.schema import DataConfig
from pmm_fast.data.folder import DataError, FolderDomain, open_domain
from pmm_fast.data.loader import MixedDomains, choose_loader, make_loader
from pmm_fast.data.sampling import Batch, Key, Sampling


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[FolderDomain]:
    """Two domains of five 24x32 images; the labels of image i of domain d are all 5 d + i."""
    root = tmp_path_factory.mktemp("domains")
    for domain in range(2):
        for kind in ("images", "labels"):
            (root / str(domain) / kind).mkdir(parents=True)
        for index in range(5):
            rng = np.random.default_rng(5 * domain + index)
            image = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
            image.save(root / f"{domain}/images/{index}.png")
            label = Image.fromarray(np.full((24, 32), 5 * domain + index, np.uint8))
            label.save(root / f"{domain}/labels/{index}.png")
    return [open_domain(str(root / str(domain)), DataConfig(), "train") for domain in range(2)]


def config(**options: object) -> DataConfig:
    return DataConfig(**{"crop": [16, 20], "batch_per_domain": 3, "workers": 0, "loader": "torch", **options})  # type: ignore[arg-type]


@pytest.fixture(params=["torch", "dali"])
def loader(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def batches(domains: list[FolderDomain], start: int = 0, stop: int = 4, seed: int = 1, stream: int = 0, **options):
    strong = options.pop("strong", None)
    return list(make_loader(domains, config(**options), seed, start, stop, stream, strong=strong))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_shapes(domains: list[FolderDomain], loader: str) -> None:
    made = make_loader(domains, config(loader=loader), 1, 2, 5)
    assert type(made).__name__ == {"torch": "TorchLoader", "dali": "DaliLoader"}[loader] and len(made) == 3
    (first, *_) = got = list(made)
    assert len(got) == 3
    assert first.images.shape == (2, 3, 3, 16, 20) and first.images.dtype == torch.uint8
    assert first.images[0].is_contiguous(memory_format=torch.channels_last)
    assert first.labels.shape == (2, 3, 16, 20) and first.labels.dtype == torch.uint8 and first.labels.is_contiguous()
    assert first.looks.shape == (2, 3, 9) and first.looks.dtype == torch.float32


def test_both_loaders_give_the_same_batches(domains: list[FolderDomain]) -> None:
    pytest.importorskip("nvidia.dali")
    options = {"crop": [20, 36], "flip": 0.5}
    assert same(batches(domains, loader="torch", **options), batches(domains, loader="dali", **options))


def test_choice_of_a_loader(monkeypatch: pytest.MonkeyPatch, domains: list[FolderDomain]) -> None:
    found = {"nvidia": True, "nvidia.dali": True}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found.get(name))
    assert choose_loader("auto") == ("dali", "DALI is installed")
    assert choose_loader("torch") == ("torch", "as asked") and choose_loader("dali") == ("dali", "as asked")
    for missing in ("nvidia.dali", "nvidia"):
        found[missing] = False
        assert choose_loader("auto") == ("torch", "DALI is not installed (the extra: pmm_fast[dali])")
        with pytest.raises(
            ValueError, match=r"^data\.loader: dali was asked for, but DALI is not installed .*\[dali\]"
        ):
            make_loader(domains, config(loader="dali"), 0, 0, 1)


def test_domains_stay_apart(domains: list[FolderDomain], loader: str) -> None:
    for batch in batches(domains, scale=[1.0, 1.0], loader=loader):
        assert batch.labels[0].max() < 5 and batch.labels[1].min() >= 5


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_data(domains: list[FolderDomain], workers: int, loader: str) -> None:
    assert same(batches(domains, loader=loader), batches(domains, workers=workers, loader=loader))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_load_the_parts_of_one_batch(domains: list[FolderDomain], ranks: int, loader: str) -> None:
    options = config(batch_per_domain=6, loader=loader)
    parts = [list(make_loader(domains, options, 1, 0, 2, rank=rank, ranks=ranks)) for rank in range(ranks)]
    whole = [
        Batch(*(torch.cat(tensors, 1) for tensors in zip(*batches, strict=True)))
        for batches in zip(*parts, strict=True)
    ]
    assert parts[0][0].images.shape[:2] == (2, 6 // ranks)
    assert same(whole, list(make_loader(domains, options, 1, 0, 2)))


def test_a_batch_that_ranks_cannot_share(domains: list[FolderDomain]) -> None:
    with pytest.raises(ValueError, match=r"^data\.batch_per_domain: expected a multiple of 2, .*, got 3$"):
        make_loader(domains, config(batch_per_domain=3), 0, 0, 1, rank=1, ranks=2)


def test_a_rank_that_is_not_there(domains: list[FolderDomain]) -> None:
    with pytest.raises(ValueError, match=r"^rank: expected 0\.\.1, one of 2 processes, got 2$"):
        make_loader(domains, config(batch_per_domain=4), 0, 0, 1, rank=2, ranks=2)


def test_continuing_equals_not_stopping(domains: list[FolderDomain], loader: str) -> None:
    whole = batches(domains, 0, 6, loader=loader)
    assert same(whole[4:], batches(domains, 4, 6, loader=loader))
    assert not same(whole[:2], whole[4:])
    assert batches(domains, 3, 3, workers=2, loader=loader) == []


def test_seed_stream_and_repetition(domains: list[FolderDomain]) -> None:
    first = batches(domains)
    assert same(first, batches(domains))
    assert not same(first, batches(domains, seed=2))
    assert not same(first, batches(domains, stream=1))


def test_the_global_generators_are_left_alone(domains: list[FolderDomain], loader: str) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = batches(domains, workers=1, loader=loader)
    after = (torch.rand(1), np.random.rand())
    torch.manual_seed(0)
    np.random.seed(0)
    assert after == (torch.rand(1), np.random.rand())
    torch.manual_seed(99)
    assert same(first, batches(domains, workers=1, loader=loader))


def test_strong_domains_change_only_themselves(domains: list[FolderDomain]) -> None:
    weak, strong = batches(domains, jitter=0.0), batches(domains, jitter=0.0, strong_domains=[1])
    for a, b in zip(weak, strong, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.looks[0], b.looks[0]) and (b.looks[1, :, 0] >= 0).all() and (a.looks[..., 0] < 0).all()
    assert same(weak, batches(domains, jitter=0.0, strong_domains=[1], strong=lambda iteration: ()))


def test_strong_by_iteration(domains: list[FolderDomain], loader: str) -> None:
    weak = batches(domains, jitter=0.0, loader=loader)
    mixed = batches(domains, jitter=0.0, loader=loader, workers=1, strong=lambda iteration: {iteration % 2})
    for iteration, (a, b) in enumerate(zip(weak, mixed, strict=True)):
        assert (b.looks[iteration % 2, :, 0] >= 0).all() and torch.equal(a.images, b.images)
        assert torch.equal(a.looks[1 - iteration % 2], b.looks[1 - iteration % 2])


def test_images_are_drawn_uniformly_with_replacement(domains: list[FolderDomain]) -> None:
    dataset = MixedDomains(Sampling(domains, config(crop=[1, 1], scale=[1.0, 1.0]), seed=3))
    counts = np.zeros((2, 5), int)
    repeats = 0
    for iteration in range(300):
        drawn = [[int(dataset[Key(iteration, d, s, False)][1]) for s in range(3)] for d in range(2)]  # type: ignore[arg-type]
        for d in range(2):
            np.add.at(counts[d], np.array(drawn[d]) - 5 * d, 1)
            repeats += len(set(drawn[d])) < 3
    # 900 draws: 180 each, standard deviation 12
    assert np.abs(counts - 180).max() < 5 * 12
    # three draws of five repeat with probability 1 - 4/5 * 3/5 = 0.52, standard deviation 12 of 600
    assert abs(repeats - 312) < 5 * 12.3


@pytest.mark.parametrize("workers", [0, 1])
def test_file_errors_arrive_with_their_own_message(tmp_path: Path, workers: int, loader: str) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        Image.new("RGB" if kind == "images" else "L", (8, 8)).save(tmp_path / kind / "a.png")
    domain = open_domain(str(tmp_path), DataConfig(), "train")
    (tmp_path / "images/a.png").write_bytes(b"rubbish")
    with pytest.raises(DataError) as caught:
        batches([domain], workers=workers, loader=loader)
    message = str(caught.value)
    assert message.startswith(f"domain {str(tmp_path)!r}: {tmp_path}/images/a.png: cannot be read as an image")
    assert "Traceback" not in message and "\n" not in message


def test_worker_threads(domains: list[FolderDomain]) -> None:
    class Threads(FolderDomain):
        def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
            return super().load(index)[0], np.full((24, 32), torch.get_num_threads(), np.uint8)

    spy = [Threads(**vars(domain)) for domain in domains]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert batches(spy, stop=1, scale=[1.0, 1.0])[0].labels.unique().tolist() == [3]
        assert batches(spy, stop=1, scale=[1.0, 1.0], workers=1)[0].labels.unique().tolist() == [1]
    finally:
        torch.set_num_threads(before)


def test_the_dataset_can_be_sent_to_a_process(domains: list[FolderDomain]) -> None:
    dataset = MixedDomains(Sampling(domains, config(), seed=3))
    again = pickle.loads(pickle.dumps(dataset))
    for first, second in zip(dataset[Key(0, 1, 2, True)], again[Key(0, 1, 2, True)], strict=True):
        assert torch.equal(first, second)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"strong_domains": [2]}, {}, r"data.strong_domains: expected positions 0..1 in data.sources, got 2"),
        ({"strong_domains": [-1]}, {}, r"data.strong_domains: .* got -1"),
        ({"batch_per_domain": 0}, {}, r"data.batch_per_domain: expected 1 or more, got 0"),
        ({"workers": -1}, {}, r"data.workers: expected 0 or more, got -1"),
        ({"crop": [0, 1]}, {}, r"crop: expected"),
        ({}, {"seed": -1}, r"seed: expected 0 or more, got -1"),
        ({}, {"stream": -1}, r"stream: expected 0 or more, got -1"),
        ({}, {"start": 5}, r"expected 0 <= start <= stop, got start 5, stop 4"),
        ({}, {"domains": []}, r"expected at least one source domain"),
        ({}, {"domains": [FolderDomain("void", [], "ids", "idd_lite7", "idd_lite7")]}, r"'void': expected images"),
    ],
)
def test_wrong_arguments(domains: list[FolderDomain], options: dict, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(**{"domains": domains, "config": config(**options), "seed": 0, "start": 0, "stop": 4, **arguments})


def test_the_package_is_light_and_gives_its_names() -> None:
    code = (
        "import sys, pmm_fast.data as data\n"
        "assert 'torch' not in sys.modules and 'PIL' not in sys.modules\n"
        "assert {'make_loader', 'open_domain'} <= set(dir(data))\n"
        "assert all(hasattr(data, name) for name in dir(data)) and not hasattr(data, 'absent')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
