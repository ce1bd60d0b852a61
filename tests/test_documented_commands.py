"""Every command and every Python example of the documentation runs, on small data.

A command is given as it stands in the text, in a folder where what it names exists in miniature: ``DATA`` with every
data set, runs, checkpoints, images and a video.  Only what would take hours is made small: a training is one iteration
of a small network.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_fast import convert, train
from pmm_fast.data.labels import colourise, get_space
from tests.data import trees
from tests.test_readme import DOCUMENTS, FENCE, commands, text_of

SMALL_TRAINING = [
    *("--data.crop", "48", "64", "--data.batch_per_domain", "2", "--data.workers", "1", "--loader", "torch"),
    *("--data.streets_images", "2", "--data.streets_size", "64", "128", "--device", "cpu", "--iterations", "1"),
    # a network of the released code, so that it can be converted both ways
    *("--model.architecture", "deeplabv3plus_mobilenet_v2_released", "--model.output_stride", "16"),
    *("--model.channels", "8", "--model.weights", "none", "--memory.init_passes", "1", "--memory.init_iterations", "1"),
]
SMALL = {
    "pmm_fast.train": SMALL_TRAINING,
    "pmm_fast.evaluate": ["--eval.limit", "1", "--device", "cpu"],
    "pmm_fast.predict": ["--device", "cpu"],
    "pmm_fast.report": ["--device", "cpu"],
    "pmm_fast.export": ["--height", "64", "--width", "96", "--force"],
    "pmm_fast.data.verify": ["--workers", "1"],
    "pmm_fast.data.prepare": ["--workers", "1"],
}
"""Options that follow those of a command."""

FOLDERS = {"kitti": "kitti_semantics"}
"""Data sets that lie in a folder of another name."""


def all_commands() -> list[tuple[str, tuple[str, ...]]]:
    """Each command of the documents once, as module and arguments."""
    found = {
        (module, tuple(word.strip("[]") for word in words if word.strip("[].")))
        for path in DOCUMENTS
        for module, words in commands(text_of(path))
    }
    return sorted((module, words) for module, words in found if words and "--help" not in words)


# --- the world that the texts speak of ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the commands are given."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        trees.use_small_lists(patch, root / "lists", gtav_train_all=trees.GTAV["train"])
        for dataset, layouts in trees.TREES.items():
            trees.make_tree(root / "DATA" / FOLDERS.get(dataset, dataset), dataset, next(iter(layouts)))
        make_own_domains(root / "DATA")
        make_files(root)
        (root / "my_town.yaml").write_text(f"data: {{root: {root / 'DATA'}, sources: [./town], unseen: [./harbour]}}\n")
        for path in DOCUMENTS:
            for language, block in FENCE.findall(text_of(path)):
                if language == "yaml" and (named := re.match(r"# (\S+\.yaml)\n", block)):
                    (root / named.group(1)).write_text(block.replace("/data", str(root / "DATA")))
        for mode in ("agg", "pinmem"):
            small = [*SMALL_TRAINING, "--mode", mode, "--out", f"runs/demo/{mode}"]
            train.main(["--config", "gs_r50", "--data.root", str(root / "DATA"), *small])
        convert.main(["runs/demo/pinmem", "released.pth"])
        yield root


def make_own_domains(root: Path) -> None:
    """The three domains of the README's own data, in the layouts of its YAML file."""
    rng = np.random.default_rng(0)
    for split, name in (("train", "0001"), ("train", "0002"), ("val", "0101")):
        image = Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8))
        ids = rng.integers(0, 19, (64, 96)).astype(np.uint8)
        label = Image.fromarray(ids)
        save(image, root / "town/images" / split / f"{name}.png")
        save(label, root / "town/labels" / split / f"{name}.png")
        for folder in ("village", "harbour"):
            save(image, root / folder / "images" / split / f"{name}.png")
            save(label, root / folder / "labels" / split / f"{name}.png")
        save(image, root / "village/rgb" / f"{name}.png")
        save(Image.fromarray(colourise(ids, get_space("cityscapes19"))), root / "village/colours" / f"{name}.png")
        with (root / "village" / f"{split}.txt").open("a") as file:
            file.write(f"{name}\n")


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def make_files(root: Path) -> None:
    """Images to predict, and a checkpoint of the released code."""
    for name in ("street.jpg", "photos/a.jpg", "photos/b.jpg"):
        save(Image.effect_noise((96, 64), 60).convert("RGB"), root / name)
    save(Image.effect_noise((96, 64), 60).convert("RGB"), root / "drive/one/left/0.png")
    make_video(root / "drive.mp4")


def make_video(path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(2):
            frame = av.VideoFrame.from_image(Image.effect_noise((96, 64), 60).convert("RGB"))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def placed(world: Path, word: str) -> str:
    """A word of a command, with the folders of the texts in their place here."""
    for folder in ("/data", "/prepared", "/fast"):
        if word == folder or word.startswith(f"{folder}/"):
            return str(world / ("DATA" if folder == "/data" else folder[1:])) + word.removeprefix(folder)
    return word


def provide(world: Path, word: str) -> None:
    """Make a run, or a checkpoint of ours, that a command names and an earlier one would have left."""
    path = world / word
    if path.exists():
        return
    if re.fullmatch(r"RUN\d?|runs/[\w/-]+", word):
        shutil.copytree(world / "runs/demo/pinmem", path)
    elif path.suffix in (".pt", ".safetensors"):
        convert.main([str(world / "runs/demo/pinmem"), str(path)])


# --- commands -----------------------------------------------------------------------------------------------------


def name_of(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else " ".join(value)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "words"), all_commands(), ids=name_of)
def test_command_runs(world: Path, module: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [placed(world, word) for word in words] + SMALL.get(module, [])
    if module == "pmm_fast.train":
        arguments += ["--out", str(world / "trained")]
        shutil.rmtree(world / "trained", ignore_errors=True)
    elif module == "pmm_fast.convert":
        provide(world, arguments[0])
        (world / arguments[1]).unlink(missing_ok=True)
    else:
        for word in takewhile(lambda word: not word.startswith("-"), arguments):
            provide(world, word)
    main = importlib.import_module(module).main
    if "--print-config" in words:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert not stopped.value.code and "# " in capsys.readouterr().out
        return
    if module != "pmm_fast.data.verify" or "my_town.yaml" in words:
        main(arguments)
        return
    # a miniature has fewer images than the data set, and that is all that is wrong with it
    with pytest.raises(SystemExit):
        main(arguments)
    faults = re.findall(r"^ {8}([a-z ]+): ", capsys.readouterr().out, re.M)
    assert faults and set(faults) == {"count"}


# those of the others are run beside what they are about
WITH_EXAMPLES = ("checkpoints.md", "evaluate.md", "ops.md", "pictures.md", "predict.md")
EXAMPLES = [path for path in DOCUMENTS if path.name in WITH_EXAMPLES]


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_python_examples_run(world: Path, path: Path) -> None:
    blocks = [block for language, block in FENCE.findall(text_of(path)) if language == "python"]
    assert blocks
    provide(world, "model.safetensors")
    names: dict = {}
    for block in blocks:
        exec(compile(block, path.name, "exec"), names)
