"""The configuration of a run, as dataclasses: the one list of every option, its default and its meaning.

Defaults are those of the released recipe where it defines one (``docs/design.md`` lists the exceptions).  A preset
(``presets/*.yaml``) overrides defaults, the command line overrides the preset.  Each field's ``help`` is what
``--help`` prints.
"""

# option() is a dataclass field, not a shared default
# ruff: noqa: RUF009

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a default and the sentence that ``--help`` shows."""
    if isinstance(default, list | dict) or callable(default):
        factory = default if callable(default) else lambda: type(default)(default)
        return field(default_factory=factory, metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DomainConfig:
    """One labelled image folder.  ``{split}`` in a path is replaced by ``train`` or ``val``."""

    root: str = option("", "folder of the domain, absolute or below data.root; may be empty with `dataset`")
    dataset: str = option(
        "",
        "read it as this data set (gtav, gtav:official, synthia, ...): its layout is recognised, only root counts",
    )
    images: str = option("images", "folder of the images below root")
    labels: str = option("labels", "folder of the labels below root")
    list_file: str | None = option(
        None, "text file naming one image a line (path below `images`, with or without suffix); default: every image"
    )
    image_suffix: str = option("", "what an image's stem carries beyond the shared name, e.g. _leftImg8bit")
    label_suffix: str = option("", "what a label's stem carries beyond the shared name, e.g. _gtFine_labelTrainIds")
    label_format: Literal["ids", "ids16", "colours", "polygons"] = option(
        "ids",
        "ids: one 8-bit channel; ids16: 16-bit PNG, ids in its first channel; colours: RGB or palette PNG in the label "
        "space's colours; polygons: IDD's JSON",
    )
    label_space: str = option("", "label space of the files; default: data.label_space")


@dataclass
class DataConfig:
    """Where images come from and how training crops are made (augmentation: released code, `docs/design.md`)."""

    root: str = option("", "folder below which relative domain folders lie")
    label_space: str = option("cityscapes19", "classes to learn: cityscapes19, idd_lite7, ...")
    sources: list[str] = option(
        ["streets/noon", "streets/suburb", "streets/overcast"],
        "domains to train on: names from data.domains, streets/NAME (generated), or a folder with images/ and labels/",
    )
    unseen: list[str] = option(["streets/night", "streets/fog"], "domains never trained on, for evaluation only")
    leave_out: str = option("", "one of the sources: train on the others, and let it alone be unseen")
    domains: dict[str, DomainConfig] = option(dict, "definitions of named domains (YAML only)", cli=False)
    crop: list[int] = option([768, 768], "training crop, height width in pixels")
    batch_per_domain: int = option(4, "images of each source domain in one iteration")
    scale: list[float] = option([0.5, 2.0], "range of the random isotropic resize")
    flip: float = option(0.5, "probability of a horizontal flip")
    jitter: float = option(0.5, "probability of colour jitter (brightness, contrast, saturation 0.4, hue 0.1)")
    blur: bool = option(True, "Gaussian blur, sigma uniform in [0.15, 1.3] pixels")
    strong_domains: list[int] = option(
        [], "positions in data.sources that always get the strong jitter (0.8, 0.8, 0.8, 0.3)"
    )
    strong_meta_test: bool = option(
        False, "the meta-test domains of each iteration get the strong jitter, besides strong_domains"
    )
    loader: Literal["auto", "dali", "torch"] = option(
        "auto", "auto: DALI where it is installed, else torch; on a CPU both give the same bits"
    )
    workers: int = option(2, "loading processes (torch) or threads (DALI)")
    streets_images: int = option(160, "generated training images a domain")
    streets_size: list[int] = option([256, 512], "generated image size, height width in pixels")
    cache: str = option("", "folder of the generated streets; default: ~/.cache/pmm_fast")


@dataclass
class ModelConfig:
    """The network."""

    architecture: str = option(
        "deeplabv3plus_resnet50",
        "HEAD_BACKBONE: deeplabv3plus|deeplabv2 _ resnet18|resnet50|resnet101|mobilenet_v2|mobilenet_v2_released|"
        "shufflenet_v2|timm/NAME (extra: timm)",
    )
    output_stride: Literal[8, 16, 32] = option(16, "input pixels a feature position; deeplabv2 is always 8")
    channels: int = option(256, "width of the feature map and of the memory")
    aux_dropout: float = option(0.1, "channel dropout in the auxiliary head")
    instance_norm: Literal["none", "ibn", "isw"] = option(
        "none",
        "instance norms in the backbone's early stages: ibn: as IBN-Net; isw: as RobustNet, whose covariances are "
        "whitened by a loss (section whitening, mode agg)",
    )
    weights: str = option(
        "imagenet", "backbone initialisation: imagenet (must be found), none, or a file of torchvision's weights"
    )


@dataclass
class WhiteningConfig:
    """Instance selective whitening (RobustNet), for model.instance_norm isw."""

    weight: float = option(0.6, "weight of the whitening loss")
    start: int = option(4458, "iteration before which the covariances are selected; the loss is 0 until then")
    images: int = option(500, "images of each source domain in a trial, each plain and strongly jittered")
    trials: int = option(10, "trials of each domain; a covariance counts if every one of them selects it")
    clusters: int = option(3, "clusters of a trial's variances of covariances; all but the lowest are selected")


@dataclass
class MemoryConfig:
    """The categorical memory."""

    momentum: float = option(0.8, "weight of the old memory in an update")
    temperature: float = option(1.0, "temperature of the softmax over slots in the read")
    cohesion_temperature: float = option(1.0, "temperature of the cosines in the cohesion loss")
    gumbel: bool = option(True, "Gumbel noise in the read while training (Gumbel softmax)")
    init_passes: int = option(2, "passes over the training data that initialise the memory")
    init_iterations: int = option(743, "iterations that count as one pass")


@dataclass
class MetaConfig:
    """One iteration (Algorithm 1)."""

    mode: Literal["pinmem", "memory-agg", "mldg", "agg"] = option(
        "pinmem",
        "pinmem: memory and meta-learning; memory-agg: memory alone; mldg: meta-learning alone; agg: plain training",
    )
    order: Literal[1, 2] = option(2, "2: the exact meta-gradient; 1: first order, as in the released code")
    inner_lr_ratio: float = option(0.25, "inner learning rate as a share of the learning rate")
    inner_lr: float = option(0.0, "fixed inner learning rate; 0: inner_lr_ratio x learning rate")
    aux_weight: float = option(0.4, "weight of the auxiliary head's loss")
    cohesion_weight: float = option(0.02, "weight of the feature cohesion loss")
    divergence_weight: float = option(0.4, "weight of the memory divergence loss")
    classifier_weight: float = option(0.2, "weight of the memory classifier loss")


@dataclass
class OptimConfig:
    """SGD and its schedule."""

    iterations: int = option(30463, "training iterations")
    lr: float = option(0.01, "learning rate at the start")
    momentum: float = option(0.9, "SGD momentum")
    weight_decay: float = option(5e-4, "L2 weight decay, on every parameter")
    schedule: Literal["exp", "poly"] = option("exp", "exp: lr e^(-9 t/horizon); poly: lr (1 - t/horizon)^0.9")
    horizon: int = option(120000, "iterations after which the schedule reaches its end; 0: optim.iterations")
    accumulate: int = option(1, "micro-batches whose gradients are averaged into one update")


Resample = Literal["bicubic", "bilinear"]
MapillaryTest = Literal["native", "half", "centred", "released"]


@dataclass
class EvalConfig:
    """How a trained network is tested; an option that is not given (null) is as the protocol has it."""

    protocol: str = option(
        "whole",
        "whole, sliding, pooling, released-train, released-sliding, released-pooling or released-folder; each fixes "
        "all options below but the last two (docs/evaluate.md)",
    )
    scales: list[float] | None = option(None, "image scales whose scores are averaged")
    flip: bool | None = option(None, "average with the mirrored image")
    crop: int | None = option(None, "tile side of the sliding protocols, in pixels")
    overlap: float | None = option(None, "share of a tile covered by the next")
    height: int | None = option(None, "resize images to this height before testing (labels are not); 0: as they are")
    resample: Resample | None = option(None, "filter that resizes images")
    noise: bool | None = option(None, "Gumbel noise in the read of the memory, seeded by `seed` and the image")
    mapillary: MapillaryTest | None = option(
        None,
        "images and labels of Mapillary: as they are; at half size; at height 1536 cut or padded to 1536 x 1536 around "
        "the centre; the same with the released code's padding (road) and offset",
    )
    tile_batch: int = option(
        0, "tiles and mirrored images that go through the network at once; 0: eight on a GPU, one on a CPU"
    )
    limit: int = option(0, "test on this many images a domain at most (evenly spaced); 0: all")


@dataclass
class Config:
    """A run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    whitening: WhiteningConfig = field(default_factory=WhiteningConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    out: str = option("", "folder of the run; default: runs/PRESET/MODE, numbered when taken")
    seed: int = option(304, "seed of everything random")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    amp: bool = option(False, "mixed precision: autocast in the inner and the outer gradient")
    amp_dtype: Literal["bf16", "fp16"] = option("bf16", "type of mixed precision; fp16 scales the losses")
    compile: Literal["auto", "on", "off"] = option(
        "auto", "compile the step, checked against the plain one on the first batch; auto: where it was measured to pay"
    )
    strict: bool = option(False, "stop when the compiled step differs from the plain one, rather than go on without it")
    checkpoint_activations: bool = option(
        False, "keep a block's input and compute the rest again for its derivatives: slower, far less memory"
    )
    tf32: bool = option(False, "let float32 convolutions and products on a GPU round their inputs to 10 bits (TF32)")
    resume: bool = option(False, "continue the run in `out` from its last checkpoint")
    checkpoint_every: int = option(1000, "iterations between checkpoints")
    log_every: int = option(10, "iterations between log lines")
    tensorboard: bool = option(False, "also write TensorBoard events (extra: tensorboard)")
