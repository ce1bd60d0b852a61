"""The sections of a report that need the networks: examples, memory, features.

What cannot be made says so in its place: ``EXCUSES`` are what that may be for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from pmm_fast.config import Config, resolve_protocol
from pmm_fast.config.eval_protocols import describe_eval
from pmm_fast.data import open_domain
from pmm_fast.data.labels import LabelSpace
from pmm_fast.data.survey import evenly_spaced
from pmm_fast.engine.build import amp_type
from pmm_fast.engine.features import Features, collect_features, memory_slots, read_assignment
from pmm_fast.engine.inference import image_seed, is_out_of_memory, segment
from pmm_fast.engine.logging import progress_bar
from pmm_fast.models import Segmentor
from pmm_fast.viz.activation import OPACITY, activation, default_classes, viridis
from pmm_fast.viz.comparison import Example, difference, difference_key
from pmm_fast.viz.embedding import draw_embedding, embed
from pmm_fast.viz.matrices import draw_similarity
from pmm_fast.viz.overlays import overlay
from pmm_fast.viz.report import Block, Gallery, Heading, Legend, Note, Picture, Text

PHOTO_WIDTH = 512
"""Pixels that a photograph is reduced to: a report must fit into a mail."""

MAP_WIDTH = 320
"""The same for activation maps, of which there are many."""

FEATURE_IMAGES = 16
"""Images of each domain in the t-SNE; each gives a point a class."""

COLOURINGS: tuple[Literal["class"], Literal["domain"]] = ("class", "domain")
"""What the colour of a point in a t-SNE means, in turn."""

EXCUSES = (ValueError, OSError, ImportError)
"""What a section may run into that is no bug: data that are not here or damaged, packages that are not installed, and
what ``enough_memory`` makes of too little memory."""


@dataclass(frozen=True)
class Run:
    """A trained network.

    Attributes:
        name: what it is called in the report.
        path: its folder or checkpoint, as it was given.
        place: what it is known by (``config.runs.run_place``).
        config: what it was trained with.
        iteration: iterations done; None where the file does not say.
        model: the network, in eval mode.
    """

    name: str
    path: str
    place: Path
    config: Config
    iteration: int | None
    model: Segmentor


@dataclass(frozen=True)
class Seen:
    """What the networks say about a domain.

    Attributes:
        name: of the domain, as in the configuration.
        title: what the report calls it.
        examples: images with what each network predicts, in the order of the runs.
        problem: why there are none; empty where there are.
    """

    name: str
    title: str
    examples: list[Example] = field(default_factory=list)
    problem: str = ""


@contextmanager
def enough_memory(device: torch.device) -> Iterator[None]:
    """Makes an excuse of too little memory.

    Args:
        device: where is computed.

    Raises:
        ValueError: memory ran out; says what takes less.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"{device} has too little memory; --eval.tile_batch 1, --amp and --protocol sliding take less"
        ) from error


def look_at(name: str, title: str, runs: Sequence[Run], config: Config, images: int, device: torch.device) -> Seen:
    """Have every network segment evenly spaced images of a domain.

    Args:
        name: of the domain, as in the configuration.
        title: what the report calls it.
        runs: the networks, on ``device``.
        config: where the domain lies (``data``), how it is segmented (``eval``).
        images: how many.
        device: where to compute.
    """
    protocol, examples = resolve_protocol(config.eval), []
    try:
        domain = open_domain(name, config.data, "val")
        chosen = evenly_spaced(len(domain), images)
        for index in chosen:
            image, labels = domain.load(index)
            predictions = []
            for run in runs:
                with enough_memory(device):
                    found = segment(
                        run.model,
                        image,
                        (image.height, image.width),
                        protocol,
                        device,
                        amp_type(config),
                        image_seed(config.seed, index),
                        tile_batch=config.eval.tile_batch,
                    )
                    predictions.append(found.classes.cpu().numpy())
            examples.append(Example(domain.pairs[index][0].stem, image, labels, predictions))
    except EXCUSES as error:
        return Seen(name, title, problem=str(error))
    return Seen(name, title, examples)


# --- examples -----------------------------------------------------------------------------------------------------


def example_blocks(runs: Sequence[Run], seen: Sequence[Seen], space: LabelSpace, config: Config) -> list[Block]:
    """A gallery an image: the image, its truth, what each network says, and where the others differ from the first.

    Args:
        runs: the networks.
        seen: what they say about each domain.
        space: classes and colours.
        config: whose protocol they were segmented with.
    """
    blocks: list[Block] = [
        Text(
            "Evenly spaced validation images of each domain, as every network segments them "
            f"({describe_eval(resolve_protocol(config.eval))}); classes are painted over the image, ignored pixels are "
            "grey."
        ),
        Legend(list(zip(space.classes, space.colours, strict=True))),
    ]
    if len(runs) > 1:
        others = "the other run" if len(runs) > 2 else runs[1].name
        blocks += [Text("Differences:"), Legend(difference_key(runs[0].name, others))]
    for domain in seen:
        blocks.append(Heading(f"{domain.title} ({role(domain.name, runs)})"))
        if domain.problem:
            blocks.append(Note(f"No pictures: {domain.problem}"))
        blocks += [_example_gallery(example, domain.title, runs, space) for example in domain.examples]
    return blocks


def role(name: str, runs: Sequence[Run]) -> str:
    """Whether a domain was trained on, in words."""
    trained = [run.name for run in runs if name in run.config.data.sources]
    if len(trained) in (0, len(runs)):
        return "trained on" if trained else "unseen"
    return f"trained on by {', '.join(trained)}"


def _example_gallery(example: Example, title: str, runs: Sequence[Run], space: LabelSpace) -> Gallery:
    where = f"{example.title} of {title}"
    pictures = [
        _photo(example.image, "image", f"Photograph {where}"),
        _photo(overlay(example.image, example.labels, space), "truth", f"True classes painted over {where}"),
    ]
    for run, prediction in zip(runs, example.predictions, strict=True):
        picture = overlay(example.image, prediction, space)
        pictures.append(_photo(picture, run.name, f"Classes that {run.name} predicts, painted over {where}"))
    for run, prediction in zip(runs[1:], example.predictions[1:], strict=True):
        picture = difference(example.image, example.labels, example.predictions[0], prediction)
        caption = f"{runs[0].name} against {run.name}"
        pictures.append(
            _photo(picture, caption, f"Where {runs[0].name} and {run.name} differ from the truth in {where}")
        )
    return Gallery(pictures, example.title)


def _photo(image: Image.Image, caption: str, alt: str, width: int = PHOTO_WIDTH) -> Picture:
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    return Picture(image, caption, alt, photograph=True)


# --- memory -------------------------------------------------------------------------------------------------------


def memory_blocks(runs: Sequence[Run], seen: Sequence[Seen], space: LabelSpace, config: Config) -> list[Block]:
    """Similarity of the slots of every memory, and where its slots are read in an image of each domain."""
    blocks: list[Block] = []
    with_memory = [run for run in runs if run.model.memory is not None]
    for run in runs:
        if run not in with_memory:
            blocks.append(Note(f"{run.name} has no memory (mode {run.config.meta.mode})."))
    similarities = []
    for run in with_memory:
        slots = memory_slots(run.model)
        caption = f"{run.name}: {describe_slots(slots, space.classes)}"
        alt = f"Matrix of the cosines between the memory slots of {run.name}"
        similarities.append(Picture(draw_similarity(slots, space.classes), caption, alt))
    if similarities:
        about = "Cosines between the slots, one a class: the less alike, the better the memory tells classes apart."
        blocks += [Heading("Similarity of the slots"), Gallery(similarities, about, size="large")]
        blocks += [
            Heading("Where slots are read"),
            Text(
                "The weight of each slot in the read, stretched at every pixel from the least read slot (violet) to "
                "the most read one (yellow): how a slot ranks among the others there, not how large its weight is."
            ),
        ]
    for domain in seen:
        for run in with_memory if domain.examples else ():
            try:
                blocks.append(_activation_gallery(run, domain, space, config))
            except EXCUSES as error:
                blocks.append(Note(f"Nothing of {run.name} on {domain.title}: {error}"))
        if with_memory and domain.problem:
            blocks.append(_unread(domain))
    return blocks


def describe_slots(slots: np.ndarray, classes: Sequence[str]) -> str:
    """The memory in a sentence: empty slots, mean cosine, and the two classes that are most alike.

    Args:
        slots: ``[K, C]``, unit rows, zero for a class never seen.
        classes: K names.
    """
    there = np.flatnonzero(np.linalg.norm(slots, axis=1) > 0)
    empty = [name for position, name in enumerate(classes) if position not in there]
    parts = [f"empty: {', '.join(empty)}" if empty else "no slot is empty"]
    if len(there) > 1:
        cosines = slots[there] @ slots[there].T
        rows, columns = np.triu_indices(len(there), 1)
        pairs = cosines[rows, columns]
        top = int(pairs.argmax())
        first, second = classes[there[rows[top]]], classes[there[columns[top]]]
        parts.append(f"mean cosine {pairs.mean():.2f}; most alike: {first} and {second} ({pairs[top]:.2f})")
    return "; ".join(parts) + "."


def _activation_gallery(run: Run, domain: Seen, space: LabelSpace, config: Config) -> Gallery:
    image = domain.examples[0].image
    device = next(run.model.parameters()).device
    with enough_memory(device):
        assignment = read_assignment(run.model, image, device, amp_type(config))
    height = max(1, round(MAP_WIDTH * image.height / image.width))
    small = image.resize((MAP_WIDTH, height), Image.Resampling.LANCZOS)
    maps, where = activation(assignment, (height, MAP_WIDTH)), f"{domain.examples[0].title} of {domain.title}"
    pictures = [_photo(small, "image", f"Photograph {where}")]
    for index in default_classes(space):
        picture = Image.blend(small, Image.fromarray(viridis(maps[index])), OPACITY)
        name = space.classes[index]
        pictures.append(_photo(picture, name, f"Where {run.name} reads the slot of {name} in {where}"))
    about = f"{run.name} on {domain.title} ({role(domain.name, [run])}), {domain.examples[0].title}"
    return Gallery(pictures, about, size="small")


# --- features -----------------------------------------------------------------------------------------------------


def feature_blocks(runs: Sequence[Run], seen: Sequence[Seen], space: LabelSpace, config: Config) -> list[Block]:
    """The t-SNE of every network's features with its slots, coloured by class and by domain."""
    blocks: list[Block] = []
    for run in runs:
        blocks.append(Heading(run.name))
        found, titles = [], []
        blocks += [_unread(domain) for domain in seen if domain.problem]
        for domain in progress_bar(f"features of {run.name}", [each for each in seen if not each.problem]):
            try:
                found.append(_features(run, domain, config))
                titles.append(domain.title if domain.name in run.config.data.sources else f"{domain.title} (unseen)")
            except EXCUSES as error:
                blocks.append(Note(f"Nothing of {domain.title}: {error}"))
        try:
            blocks.append(_embedding_gallery(run, found, titles, space, config.seed))
        except EXCUSES as error:
            blocks.append(Note(f"No t-SNE: {error}"))
    return blocks


def _unread(domain: Seen) -> Note:
    return Note(f"Nothing of {domain.title}: it could not be read or segmented (see Examples).")


def _features(run: Run, seen: Seen, config: Config) -> Features:
    domain = open_domain(seen.name, config.data, "val")
    device = next(run.model.parameters()).device
    chosen = evenly_spaced(len(domain), FEATURE_IMAGES)
    with enough_memory(device):
        return collect_features(run.model, domain, chosen, device, amp_type(config), progress=False)


def _embedding_gallery(
    run: Run, found: Sequence[Features], titles: Sequence[str], space: LabelSpace, seed: int
) -> Gallery:
    if not found:
        raise ValueError("no domain could be read")
    points = np.concatenate([features.points for features in found])
    classes = np.concatenate([features.classes for features in found])
    domains = np.repeat(np.arange(len(found)), [len(features.points) for features in found])
    slots = None if run.model.memory is None else memory_slots(run.model)
    xy = embed(points, slots, seed)
    points_xy, slots_xy = xy[: len(points)], None if slots is None else xy[len(points) :]
    pictures = []
    for colour in COLOURINGS:
        drawn = draw_embedding(points_xy, classes, domains, space, titles, slots_xy, colour)
        alt = f"Two-dimensional map of the features of {run.name}, coloured by {colour}"
        pictures.append(Picture(drawn, f"coloured by {colour}", alt))
    about = (
        f"t-SNE of {len(points)} class means of features, one for every class in each of {FEATURE_IMAGES} images of a "
        "domain or fewer, before the memory is read"
    )
    about += "; triangles: the slots of the memory." if slots is not None else "; this network has no memory."
    return Gallery(pictures, f"{about} Near is alike; distances between far groups mean little.", size="large")
