"""The training loop: what it computes, and how it stops when something is wrong (resuming: ``test_resume``)."""

from __future__ import annotations

import copy
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pmm_fast
from pmm_fast import meta, ops
from pmm_fast.config import ConfigError, validate
from pmm_fast.data import make_loader
from pmm_fast.data.loader import Loader
from pmm_fast.engine import build, checkpoint
from pmm_fast.engine import trainer as trainer_module
from pmm_fast.engine.checkpoint import CheckpointError
from pmm_fast.engine.feed import Feed
from pmm_fast.engine.optim import LossScale
from pmm_fast.engine.trainer import NonFiniteLossError, Trainer
from pmm_fast.models import recompute
from tests.engine.test_checkpoint import file_size_limit
from tests.street_folders import CLASSES, log_lines, same, tiny_config, train

READ = {"seg", "aux"}
MEMORY = {"cohesion", "divergence", "classifier", "top_weight"}
QUIET = {"model.aux_dropout": 0.0, "memory.gumbel": False}


def fed(loader: Loader) -> list[tuple[Tensor, Tensor]]:
    """All batches of a loader as the network gets them."""
    return list(Feed(loader, torch.device("cpu")))


def poison(monkeypatch: pytest.MonkeyPatch, domain: int, iteration: int) -> None:
    """Put a NaN into one pixel of one domain, from an iteration on."""

    class Poisoned(Feed):
        count = 0

        def __next__(self) -> tuple[Tensor, Tensor]:
            images, labels = super().__next__()
            if self.count >= iteration:
                images[domain, 0, 0, 3, 5] = torch.nan
            self.count += 1
            return images, labels

    def feed(trainer: Trainer) -> Feed:
        # after the memory was initialised, from images as they are
        monkeypatch.setattr(trainer_module, "Feed", Poisoned)
        return original(trainer)

    original = Trainer._feed
    monkeypatch.setattr(Trainer, "_feed", feed)


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["agg", "pinmem"])
def test_an_update_is_sgd_with_the_mean_of_the_micro_batches(domains: Path, tmp_path: Path, mode: str) -> None:
    options = {**QUIET, "meta.mode": mode, "optim.accumulate": 2, "optim.iterations": 1, "meta.inner_lr": 0.1}
    config = tiny_config(domains, tmp_path, options)
    trainer = Trainer(config)
    theta, buffers, memory = (copy.deepcopy(part) for part in (trainer.params, trainer.buffers, trainer.memory))
    captured = []
    if memory is not None:
        # the memory is initialised between here and the first iteration: taken when that begins
        iterate = trainer._iterate

        def first(batches: Iterator[Any]) -> Any:
            captured.append(trainer.memory.clone())
            return iterate(batches)

        trainer._iterate = first  # type: ignore[method-assign]
    trainer.run()

    train_domains, test_domains = trainer._split(0) if mode == "pinmem" else ([0, 1], [])
    assert sorted(train_domains + test_domains) == [0, 1]
    hyper = build.create_hyper(config, trainer.network, 0.1)
    grads, written = [], []
    for images, labels in fed(make_loader(trainer.sources, config.data, config.seed, 0, 2)):
        mtr, mte = (
            meta.Batch(torch.cat([images[d] for d in side]), torch.cat([labels[d] for d in side])) if side else None
            for side in (train_domains, test_domains)
        )
        result = meta.step(theta, buffers, captured[0] if captured else None, mtr, mte, meta.Noise(), hyper)
        buffers = result.buffers
        grads.append(result.grads)
        written.append(mtr)
    assert len(grads) == 2
    for name, value in trainer.params.items():
        mean = (grads[0][name] + grads[1][name]) / 2
        # weight decay is part of the gradient; momentum has no past yet
        expected = -0.01 * (mean + 5e-4 * theta[name])
        error = (value - theta[name] - expected).abs().max()
        assert error <= 3e-7 * (theta[name].abs().max() + expected.abs().max()), name
    for name, value in trainer.buffers.items():
        assert torch.equal(value, buffers[name]), name
    if mode == "pinmem":
        _check_memory(trainer, captured[0], written)


def _check_memory(trainer: Trainer, before: Tensor, batches: list[meta.Batch]) -> None:
    """The memory is that of the module in evaluation mode, written with all micro-batches and not with one of them."""
    model = trainer.model.eval()

    def rewritten(chosen: list[meta.Batch]) -> Tensor:
        sums = mass = torch.zeros(())
        with torch.no_grad():
            for batch in chosen:
                feature = model.memory.writer(model.encoder(batch.images).feature)
                found = ops.masked_average_pool(feature, batch.labels, CLASSES)
                sums, mass = sums + found[0], mass + found[1]
        return ops.update_memory(before, sums, mass, 0.8)

    torch.testing.assert_close(model.memory.slots, rewritten(batches), rtol=1e-5, atol=1e-6)
    assert (model.memory.slots - rewritten(batches[:1])).abs().max() > 1e-4
    assert (model.memory.slots - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "mode, order, train_losses, test_losses",
    [
        ("agg", 1, READ, set()),
        ("memory-agg", 1, READ | MEMORY, set()),
        ("mldg", 1, READ, READ),
        ("mldg", 2, READ, READ),
        ("pinmem", 1, READ | MEMORY, READ | {"cohesion"}),
        ("pinmem", 2, READ | MEMORY, READ | {"cohesion"}),
    ],
)
def test_modes_train_log_and_predict(
    domains: Path, tmp_path: Path, mode: str, order: int, train_losses: set[str], test_losses: set[str]
) -> None:
    trainer = Trainer(tiny_config(domains, tmp_path, {"meta.mode": mode, "meta.order": order}))
    assert trainer.run() == tmp_path
    names = {f"train/{name}" for name in train_losses} | {f"test/{name}" for name in test_losses}
    names |= {"total", "train"} | ({"test"} if test_losses else set())
    lines = log_lines(tmp_path)
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert line["losses"].keys() == names
        assert line["losses"]["total"] == pytest.approx(line["losses"]["train"] + line["losses"].get("test", 0.0))
        assert line["gradient_norm"] > 0 and line["inner_lr"] == line["lr"] / 4
    assert (lines[0]["lr"], lines[1]["lr"]) == (0.01, pytest.approx(0.01 * 2.718281828**-0.09))

    model = pmm_fast.load(tmp_path, label_space="idd_lite7")
    images = torch.randn(2, 3, 48, 64)
    logits = model(images).logits
    assert logits.shape == (2, CLASSES, 48, 64) and logits.isfinite().all()
    assert torch.equal(logits, trainer.model.eval()(images).logits)
    slots = checkpoint.read(tmp_path)["model"]["state"].get("memory.slots")
    assert (slots is None) == (mode in ("agg", "mldg"))
    if slots is not None:
        torch.testing.assert_close(slots.norm(dim=1), torch.ones(CLASSES))
    assert checkpoint.read_config(tmp_path) == trainer.config
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "config.yaml", "metrics.jsonl"]


def test_the_order_reaches_the_update(domains: Path, tmp_path: Path) -> None:
    options = {**QUIET, "meta.mode": "mldg", "meta.inner_lr": 0.1, "optim.iterations": 1}
    states = [train(domains, tmp_path / str(n), {**options, "meta.order": n})["model"]["state"] for n in (1, 2)]
    difference = torch.cat([(states[0][k] - states[1][k]).flatten() for k in states[0] if k.endswith("weight")])
    assert difference.abs().max() > 1e-5


def test_memory_starts_from_the_features_of_the_data(domains: Path, tmp_path: Path) -> None:
    # not from the strongly augmented images, nor from those that training starts with
    options = {"memory.init_passes": 2, "memory.init_iterations": 3, "data.strong_domains": [0]}
    config = tiny_config(domains, tmp_path, options)
    trainer = Trainer(config)
    trainer._initialise_memory()
    model, sums = copy.deepcopy(trainer.model).eval(), torch.zeros(CLASSES, 8)
    stream = trainer_module.INIT_STREAM
    assert stream != 0
    loader = make_loader(trainer.sources, config.data, config.seed, 0, 6, stream=stream, strong=lambda batch: ())
    batches = fed(loader)
    with torch.no_grad():
        for images, labels in batches:
            feature = model.encoder(images.flatten(0, 1)).feature
            sums += ops.masked_average_pool(feature, labels.flatten(0, 1), CLASSES)[0]
    assert len(batches) == 6
    torch.testing.assert_close(trainer.memory, ops.normalize(sums, 1), rtol=1e-4, atol=1e-5)


def test_a_class_that_is_never_met_is_told(domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = train(domains, tmp_path, {"data.label_space": "cityscapes19", "optim.iterations": 1})
    assert (
        "12 of 19 classes were not met while the memory was initialised; their slots are 0" in capsys.readouterr().err
    )
    norms = content["model"]["state"]["memory.slots"].norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0] * 7 + [0.0] * 12))


def test_workers_do_not_change_training(domains: Path, tmp_path: Path) -> None:
    states = [train(domains, tmp_path / str(count), {"data.workers": count}) for count in (0, 1)]
    assert same(states[0]["model"], states[1]["model"]) and same(states[0]["training"], states[1]["training"])
    assert log_lines(tmp_path / "0") == log_lines(tmp_path / "1")


def test_the_seed_changes_training(domains: Path, tmp_path: Path) -> None:
    states = [train(domains, tmp_path / str(seed), {"seed": seed, "optim.iterations": 1}) for seed in (0, 1)]
    assert not same(states[0]["model"], states[1]["model"])


def test_splits_put_every_domain_on_either_side(domains: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(domains, tmp_path, {"data.sources": ["alpha", "beta", "gamma"], "seed": 3}))
    splits = [trainer._split(iteration) for iteration in range(40)]
    assert all(sorted(train_side + test_side) == [0, 1, 2] for train_side, test_side in splits)
    assert {len(train_side) for train_side, _ in splits} == {1, 2}
    assert all({d for split in splits for d in split[side]} == {0, 1, 2} for side in (0, 1))
    assert splits == [trainer._split(iteration) for iteration in range(40)]


# --- one source domain (the G,G protocol) -------------------------------------------------------------------------


@pytest.mark.parametrize("mode, times", [("pinmem", 2), ("mldg", 2), ("agg", 1), ("memory-agg", 1)])
def test_one_source_is_taken_twice_by_meta_learning(domains: Path, tmp_path: Path, mode: str, times: int) -> None:
    config = tiny_config(domains, tmp_path, {"data.sources": ["alpha"], "meta.mode": mode, "optim.iterations": 1})
    trainer = Trainer(config)
    assert [domain.name for domain in trainer.sources] == ["alpha"] * times
    assert trainer.sources[0] is trainer.sources[-1]
    images, _ = next(trainer._feed())
    assert len(images) == times
    if times == 2:
        assert not torch.equal(images[0], images[1])
    trainer.run()
    assert len(log_lines(tmp_path)) == 1


@pytest.mark.parametrize(
    "sources, mode, strong, last",
    [
        (["alpha"], "agg", [0], 0),
        (["alpha"], "pinmem", [0, 1], 1),
        (["alpha", "beta"], "agg", [0, 1], 1),
        (["alpha", "alpha"], "pinmem", [1], 1),
    ],
)
def test_strong_domains_are_positions(
    domains: Path, tmp_path: Path, sources: list[str], mode: str, strong: list[int], last: int
) -> None:
    config = tiny_config(domains, tmp_path, {"data.sources": sources, "meta.mode": mode, "data.strong_domains": strong})
    validate(config)
    feed = Trainer(config)._feed()
    assert len(next(feed)[0]) == last + 1
    config.data.strong_domains = [last + 1]
    with pytest.raises(
        ConfigError, match=f"strong_domains: no position {last + 1}: data.sources has positions 0..{last}"
    ):
        validate(config)


def test_a_strong_position_changes_that_copy_alone(domains: Path, tmp_path: Path) -> None:
    def first(strong: list[int]) -> Tensor:
        options = {"data.sources": ["alpha"], "data.strong_domains": strong, "data.jitter": 0.0}
        return next(Trainer(tiny_config(domains, tmp_path, options))._feed())[0]

    weak, strong = first([]), first([1])
    assert torch.equal(weak[0], strong[0]) and not torch.equal(weak[1], strong[1])


# --- when something is wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, mode", [(2, "pinmem"), (1, "agg")])
def test_images_that_are_not_finite(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, mode: str
) -> None:
    options = {
        "data.sources": ["alpha", "beta", "gamma"],
        "data.batch_per_domain": batch,
        "meta.mode": mode,
        "optim.iterations": 9,
        "checkpoint_every": 1,
    }
    poison(monkeypatch, domain=1, iteration=2)
    with pytest.raises(NonFiniteLossError) as caught:
        train(domains, tmp_path, options)
    message = str(caught.value)
    assert message.startswith("iteration 3: loss or gradient is not finite, from domain beta; losses: train/seg ")
    assert "total nan" in message and "gradient norm nan" in message
    assert message.endswith(f"The last checkpoint in {tmp_path} is untouched.")
    content = checkpoint.read(tmp_path)
    assert content["training"]["iteration"] == 2
    assert all(value.isfinite().all() for value in content["model"]["state"].values())
    assert pmm_fast.load(tmp_path)(torch.randn(1, 3, 48, 64)).logits.isfinite().all()
    assert [line["iteration"] for line in log_lines(tmp_path)] == [1, 2]


def test_not_finite_before_the_first_checkpoint(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, domain=0, iteration=0)
    with pytest.raises(NonFiniteLossError, match=r"^iteration 1: .* domain alpha; .* There is no checkpoint yet\.$"):
        train(domains, tmp_path)
    assert not (tmp_path / checkpoint.FILE_NAME).exists()


@pytest.mark.parametrize(
    "mode, message",
    [
        # after the update, everything is
        ("agg", r"^iteration 2: .* from every domain \(alpha, beta\): perhaps optim.lr is too high"),
        # after the inner step, which nobody sees from outside
        ("mldg", r"^iteration 1: .* from no single domain .*: perhaps optim.lr or meta.inner_lr is too high"),
    ],
)
def test_a_learning_rate_that_is_too_high(domains: Path, tmp_path: Path, mode: str, message: str) -> None:
    with pytest.raises(NonFiniteLossError, match=message):
        train(domains, tmp_path, {"meta.mode": mode, "optim.lr": 1e30, "optim.iterations": 5})


def test_a_gradient_alone_that_is_not_finite(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_gradients(monkeypatch, [1])
    with pytest.raises(NonFiniteLossError, match=r"^iteration 1: .* no single domain .* gradient norm inf"):
        train(domains, tmp_path, {"meta.mode": "agg"})


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """An overflow in the given calls of the step (from 1): an infinite gradient, and infinite statistics with it."""
    count, original = 0, meta.step

    def step(*arguments: Any) -> meta.StepResult:
        nonlocal count
        result, count = original(*arguments), count + 1
        if count in calls:
            result.grads[next(iter(result.grads))].view(-1)[0] = torch.inf
            result.buffers[next(name for name in result.buffers if "running_var" in name)].fill_(torch.inf)
        return result

    monkeypatch.setattr(meta, "step", step)


def test_fp16_skips_an_overflow_and_lowers_the_scale(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"amp": True, "amp_dtype": "fp16", "meta.mode": "agg", "optim.iterations": 1, "checkpoint_every": 1}
    before = train(domains, tmp_path, options)
    assert before["training"]["scaler"]["scale"] == 4096 and log_lines(tmp_path)[0]["loss_scale"] == 4096
    assert before["training"]["optimizer"]["state"]
    spoil_gradients(monkeypatch, [1])
    skipped = train(domains, tmp_path, {**options, "optim.iterations": 2, "resume": True})
    line = log_lines(tmp_path)[1]
    assert line["loss_scale"] == skipped["training"]["scaler"]["scale"] == 2048
    assert line["gradient_norm"] is None and line["losses"]["total"] > 0
    assert skipped["training"]["iteration"] == 2
    # no update, no decay, no momentum, no batch-norm statistics
    assert same(skipped["model"], before["model"])
    assert same(skipped["training"]["optimizer"]["state"], before["training"]["optimizer"]["state"])
    after = train(domains, tmp_path, {**options, "optim.iterations": 3, "resume": True})
    assert after["training"]["scaler"]["scale"] == 2048 and log_lines(tmp_path)[2]["gradient_norm"] > 0
    assert not same(after["model"], before["model"])


def test_fp16_losses_and_gradient_are_those_of_full_precision(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "LossScale", lambda enabled: LossScale(enabled, scale=64.0))
    options = {**QUIET, "amp": True, "amp_dtype": "fp16", "meta.mode": "mldg", "meta.order": 1, "optim.iterations": 1}
    half = log_lines(Trainer(tiny_config(domains, tmp_path / "half", options)).run())[0]
    full = log_lines(Trainer(tiny_config(domains, tmp_path / "full", {**options, "amp": False})).run())[0]
    assert (half["loss_scale"], full["loss_scale"]) == (64, 1)
    assert half["losses"] != full["losses"]
    for name, value in full["losses"].items():
        assert half["losses"][name] == pytest.approx(value, rel=0.2), name
    # the scale of 64 is out of the gradient again
    assert half["gradient_norm"] == pytest.approx(full["gradient_norm"], rel=0.5)


def test_fp16_gives_up_when_no_scale_is_small_enough(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "LossScale", lambda enabled: LossScale(enabled, scale=2.0))
    poison(monkeypatch, domain=1, iteration=0)
    options = {"amp": True, "amp_dtype": "fp16", "meta.mode": "agg", "optim.iterations": 9}
    with pytest.raises(NonFiniteLossError, match=r"^iteration 2: .* from domain beta"):
        train(domains, tmp_path, options)
    (line,) = log_lines(tmp_path)
    assert line["loss_scale"] == 1 and line["losses"]["total"] is None


def test_a_full_disk_stops_training_and_keeps_the_checkpoint(domains: Path, tmp_path: Path) -> None:
    train(domains, tmp_path, {"optim.iterations": 1})
    before = (tmp_path / checkpoint.FILE_NAME).read_bytes()
    with file_size_limit(1_000_000), pytest.raises(CheckpointError) as caught:
        train(domains, tmp_path, {"optim.iterations": 2, "resume": True})
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert str(caught.value).endswith("the previous checkpoint is untouched")
    assert (tmp_path / checkpoint.FILE_NAME).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "config.yaml", "metrics.jsonl"]
    # with space again, the run goes on
    assert train(domains, tmp_path, {"optim.iterations": 2, "resume": True})["training"]["iteration"] == 2


def test_missing_tensorboard_is_noticed_before_the_memory_is_initialised(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(Trainer, "_initialise_memory", lambda self: pytest.fail("too late"))
    with pytest.raises(ImportError, match=r"pmm_fast\[tensorboard\]"):
        train(domains, tmp_path, {"tensorboard": True})


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:x", "", "meta"])
def test_unknown_device(name: str) -> None:
    with pytest.raises(ValueError, match=f"^device: expected auto, cpu, cuda or cuda:N, got '{name}'$"):
        build.pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_no_gpu(name: str) -> None:
    with pytest.raises(ValueError, match=f"^device: '{name}' was asked for, but torch finds no GPU here$"):
        build.pick_device(name)


def test_a_gpu_number_that_is_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert build.pick_device("cuda:1") == torch.device("cuda:1") and build.pick_device("auto").type == "cuda"
    assert current == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match=r"^device: 'cuda:2' was asked for, but torch finds GPUs 0\.\.1 here$"):
        build.pick_device("cuda:2")


def test_missing_weights_file(domains: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no file {tmp_path}/none.pth .model.weights is"):
        train(domains, tmp_path / "run", {"model.weights": str(tmp_path / "none.pth")})
    assert not (tmp_path / "run").exists()


def test_weights_of_another_backbone(domains: Path, tmp_path: Path) -> None:
    other = pmm_fast.build_model("deeplabv3plus_resnet18", CLASSES, channels=8).encoder.backbone.state_dict()
    torch.save(other, tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/resnet18\.pth does not fit the backbone"):
        train(domains, tmp_path / "run", {"model.weights": str(tmp_path / "resnet18.pth")})


@pytest.mark.parametrize("options", [{}, {"meta.order": 1}, {"meta.mode": "agg"}], ids=["order 2", "order 1", "agg"])
def test_compiled_run_is_the_eager_one(
    domains: Path, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = options | {"optim.iterations": 3, "meta.inner_lr": 0.1}
    eager = train(domains, tmp_path / "eager", options | {"compile": "off"})
    capsys.readouterr()
    compiled = train(domains, tmp_path / "compiled", options | {"compile": "on", "strict": True})
    assert "compile: checked against eager mode" in capsys.readouterr().err
    assert same(eager["model"], compiled["model"])


def test_checkpointed_run_is_the_plain_one(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"optim.iterations": 1, "meta.order": 1}
    train(domains, tmp_path / "plain", options)
    calls = []
    apply = recompute._Forward.apply
    monkeypatch.setattr(recompute._Forward, "apply", lambda *args: calls.append(1) or apply(*args))
    train(domains, tmp_path / "again", options | {"checkpoint_activations": True})
    assert len(calls) > 20
    (plain,), (again,) = log_lines(tmp_path / "plain"), log_lines(tmp_path / "again")
    assert again["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    # gradients are added in another order (tests/models/test_recompute.py: to 1e-9 in float64)
    assert again["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-2)


def test_tf32_is_what_the_option_says(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in (True, False):
        train(domains, tmp_path / str(wanted), {"optim.iterations": 1, "tf32": wanted})
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == wanted
