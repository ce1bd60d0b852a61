"""The training loop."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pmm_fast import meta
from pmm_fast.config import Config, describe_order, to_dict, to_yaml
from pmm_fast.data import choose_loader, make_loader
from pmm_fast.data.crop import crop_backend
from pmm_fast.data.loader import Loader
from pmm_fast.data.sampling import Strong
from pmm_fast.engine import build, checkpoint
from pmm_fast.engine.distributed import Ranks
from pmm_fast.engine.feed import Feed
from pmm_fast.engine.logging import RunLog, progress_bar
from pmm_fast.engine.optim import (
    LossScale,
    build_optimizer,
    gradient_norm,
    inner_learning_rate,
    learning_rate,
)
from pmm_fast.engine.whitening import select_masks

# streams of random numbers that depend on the seed and the iteration alone, so that resuming needs no state
SPLIT_STREAM = 1
# of images for the first memory, or for the selection of covariances: no run has both
INIT_STREAM = 2
# and those after it: rank r takes NOISE_STREAM + r
NOISE_STREAM = 3


class NonFiniteLossError(ValueError):
    """Training met a loss or gradient that is not finite."""


class Trainer:
    """One training run.

    Args:
        config: the resolved configuration.
        ranks: this process among those that train together, all of them with the same configuration; None: it is alone.

    Raises:
        ValueError: data, weights, device or folder that the configuration names are not usable.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.folder = build.run_folder(config)
        self._check_folder()
        self.device = build.pick_device(self.ranks.device(config.device))
        with self.ranks.first_alone():
            self.sources = build.open_sources(config)
            self.model, backbone = build.create_model(config)
        self.layout = build.memory_format(build.amp_type(config), self.device)
        build.place(self.model, self.device, build.amp_type(config))
        build.set_float32_precision(config.tf32)
        self.network = meta.Network(self.model, self.ranks.group, config.checkpoint_activations)
        self.step: Callable[..., meta.StepResult] = meta.step
        self.generator = torch.Generator(self.device)
        self.params, self.buffers, self.memory = meta.split_state(self.model)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scale = LossScale(config.amp and config.amp_dtype == "fp16")
        self.iteration = 0
        method = f"{config.meta.mode}, {describe_order(config)}"
        norms = "" if config.model.instance_norm == "none" else f" with instance norms ({config.model.instance_norm})"
        self._say(f"{method}; {config.model.architecture}{norms} on {self._where()}; {backbone}")
        loader, reason = choose_loader(config.data.loader)
        self._say(f"loader: {loader} ({reason}); crops: {crop_backend()}")
        for domain in {domain.name: domain for domain in self.sources}.values():
            self._say(f"source {domain.describe()}")

    def run(self) -> Path:
        """Train to the last iteration, writing checkpoints and logs.

        Returns:
            The run's folder, with ``checkpoint.pt``, ``config.yaml`` and ``metrics.jsonl``.

        Raises:
            NonFiniteLossError: names the iteration, the losses and the domain they come from.
            ValueError: the model is not the same on all ranks.
        """
        # before anything is written: a checkpoint that does not fit leaves the run's files as they are
        if self.config.resume:
            self._restore()
        self._check_ranks()
        self._choose_step()
        with contextlib.ExitStack() as stack:
            log = None
            if self.ranks.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "config.yaml").write_text(to_yaml(self.config))
                log = stack.enter_context(
                    contextlib.closing(RunLog(self.folder, self.iteration, self.config.tensorboard))
                )
            if self.memory is not None and not self.config.resume:
                self._initialise_memory()
            self._loop(log)
        return self.folder

    def _choose_step(self) -> None:
        """Compile the step if that is asked for, or pays in the iterations that are left."""
        left = self.config.optim.iterations - self.iteration
        engine = meta.choose_engine(self.config.compile, self.device, left)
        if engine:
            self._compile(engine)

    def _compile(self, engine: str) -> None:
        """Begin anew with a step that is compiled, and checked, when it is first called."""
        self.step = meta.CompiledStep(engine, self.config.strict, self._say)

    def _loop(self, log: RunLog | None) -> None:
        """The iterations; what is logged is the same on all ranks, and one of them writes it."""
        config, total = self.config, self.config.optim.iterations
        # both closed also by an error, whose message would otherwise continue the bar's line
        with (
            contextlib.closing(self._feed()) as feed,
            self._progress(total, f"train {config.meta.mode}", initial=self.iteration) as progress,
        ):
            selection = self._selection_iteration()
            while self.iteration < total:
                if self.iteration == selection:
                    self._select_covariances()
                start = time.perf_counter()
                losses, norm = self._iterate(feed)
                self.iteration += 1
                progress.update()
                if log is not None and (self.iteration % config.log_every == 0 or self.iteration == total):
                    progress.set_postfix(loss=f"{losses['total']:.3f}", refresh=False)
                    values = {"lr": learning_rate(config.optim, self.iteration - 1), "gradient_norm": norm}
                    values["inner_lr"] = inner_learning_rate(config, self.iteration - 1)
                    values |= {"loss_scale": self.scale.scale, "data_wait": feed.share_waited()}
                    log.write(self.iteration, losses, seconds=time.perf_counter() - start, **values)
                if self.iteration % config.checkpoint_every == 0 or self.iteration == total:
                    self._save()

    def _iterate(self, feed: Iterator[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], float]:
        """One optimiser step and what follows it; returns the losses and the norm of the gradient."""
        config = self.config
        micro_batches = [next(feed) for _ in range(config.optim.accumulate)]
        train, test = self._split(self.iteration)
        hyper = build.create_hyper(
            config, self.network, inner_learning_rate(config, self.iteration), loss_scale=self.scale.scale
        )
        total_grads: meta.State = {}
        total_losses: dict[str, Tensor] = {}
        buffers, train_batches = self.buffers, []
        for index, (images, labels) in enumerate(micro_batches):
            mtr = _take(images, labels, train, self.layout)
            train_batches.append(mtr)
            mte = _take(images, labels, test, self.layout) if test else None
            noise = self._noise((len(mtr.images), len(mte.images) if mte else 0), index)
            result = self.step(self.params, buffers, self.memory, mtr, mte, noise, hyper)
            _accumulate(total_grads, result.grads, config.optim.accumulate)
            _accumulate(total_losses, result.losses, config.optim.accumulate)
            buffers = result.buffers
        # one transfer for all of them: each would make a GPU wait
        *values, norm = torch.stack([*total_losses.values(), gradient_norm(total_grads)]).tolist()
        losses = dict(zip(total_losses, values, strict=True))
        finite = np.isfinite(norm) and np.isfinite(losses["total"])
        self.scale.update(bool(finite))
        # an update that is skipped leaves no trace: an infinity in the batch-norm statistics would never fade
        if finite:
            meta.copy_tensors([self.buffers[name] for name in buffers], list(buffers.values()))
            self._update(total_grads, train_batches, hyper)
        elif self.scale.exhausted:
            self._stop_non_finite(losses, norm, micro_batches, hyper)
        return losses, norm

    def _update(self, grads: meta.State, train_batches: list[meta.Batch], hyper: meta.Hyper) -> None:
        """SGD step from theta with the summed gradient, then the memory's rewrite."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim, self.iteration)
        for name, parameter in self.params.items():
            parameter.grad = grads[name]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.memory is not None:
            self.memory.copy_(meta.rewrite_memory(self.params, self.buffers, self.memory, train_batches, hyper))

    def _split(self, iteration: int) -> tuple[list[int], list[int]]:
        domains = len(self.sources)
        if self.config.meta.mode not in meta.META_MODES:
            return list(range(domains)), []
        return meta.draw_split(domains, np.random.default_rng([self.config.seed, SPLIT_STREAM, iteration]))

    def _noise(self, sizes: tuple[int, int], micro_batch: int) -> meta.Noise:
        """What is random in a step, from the seed, the iteration and the rank alone."""
        stream = NOISE_STREAM + self.ranks.rank
        sequence = np.random.SeedSequence([self.config.seed, stream, self.iteration, micro_batch])
        self.generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)
        gumbel = self.memory is not None and self.config.memory.gumbel
        channels = self.model.aux_head.dropped_channels
        return meta.draw_noise(sizes, channels, self.config.model.aux_dropout, gumbel, self.generator)

    def _feed(self) -> Feed:
        """The training data of the iterations that are left."""
        accumulate = self.config.optim.accumulate
        start, stop = self.iteration * accumulate, self.config.optim.iterations * accumulate
        always = set(self.config.data.strong_domains)

        def strong(batch: int) -> set[int]:
            """The split of an iteration is known before its images are drawn, so they can be augmented for it."""
            return always.union(self._split(batch // accumulate)[1]) if self.config.data.strong_meta_test else always

        return Feed(self._loader(start, stop, strong), self.device)

    def _loader(self, start: int, stop: int, strong: Strong, stream: int = 0) -> Loader:
        ranks = self.ranks
        config = self.config
        return make_loader(
            self.sources, config.data, config.seed, start, stop, stream, self.device, strong, ranks.rank, ranks.size
        )

    def _initialise_memory(self) -> None:
        """Two passes over the training data with its plain augmentation, encoder only."""
        config = self.config
        passes = config.memory.init_passes * config.memory.init_iterations
        hyper = build.create_hyper(config, self.network, inner_lr=0.0)
        assert self.memory is not None

        with contextlib.closing(Feed(self._loader(0, passes, _none_strong, INIT_STREAM), self.device)) as feed:
            batches = (
                _take(images, labels, list(range(len(images))))
                for images, labels in self._progress(passes, "initialise memory", feed)
            )
            memory, mass = meta.initialise_memory(self.params, self.buffers, batches, self.memory, hyper)
        self.memory.copy_(memory)
        unseen = int((mass == 0).sum())
        if unseen:
            met = f"{unseen} of {len(mass)} classes were not met while the memory was initialised"
            self._say(f"{met}; their slots are 0")

    def _selection_iteration(self) -> int | None:
        """The iteration before which the covariances to be whitened are selected; None where they are, or none are."""
        whitening = self.model.whitening
        # a run that is resumed has the masks that it had
        if whitening is None or any(mask.any() for mask in whitening.buffers()):
            return None
        start, total = max(self.config.whitening.start, self.iteration), self.config.optim.iterations
        if start < total:
            self._say(f"whitening: its loss is on after iteration {start}, when the covariances are selected")
        else:
            self._say(f"whitening.start: {start} is not before the last of {total} iterations: the loss stays 0")
        return start

    def _select_covariances(self) -> None:
        """Set the masks of the whitening loss, once in a run."""
        assert self.model.whitening is not None
        state = (self.network, self.params, self.buffers)
        found = select_masks(*state, self.sources, self.config, INIT_STREAM, self.device, self.ranks, self._progress)
        counts = []
        for mask, chosen in zip(self.model.whitening.buffers(), found, strict=True):
            mask.copy_(chosen)
            counts.append(f"{int(chosen.sum())} of {len(mask) * (len(mask) - 1) // 2}")
        self._say(f"whitening: selected {', '.join(counts)} covariances of the maps")
        # a compiled step was checked with a loss of 0
        if isinstance(self.step, meta.CompiledStep):
            self._compile(self.step.engine)

    def _check_folder(self) -> None:
        exists = (self.folder / checkpoint.FILE_NAME).exists()
        if self.config.resume and not exists:
            raise checkpoint.CheckpointError(f"resume: {self.folder} holds no {checkpoint.FILE_NAME} to continue from")
        if exists and not self.config.resume:
            raise ValueError(f"out: {self.folder} already holds a run; continue it with --resume or name another --out")

    def _check_ranks(self) -> None:
        """The ranks hold the same model, memory included; else their sums mean nothing."""
        self.ranks.check_equal(self.model.state_dict(), f"iteration {self.iteration}: the model")

    def _save(self) -> None:
        self._check_ranks()
        if not self.ranks.first:
            return
        training: dict[str, Any] = {
            "iteration": self.iteration,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scale.state_dict(),
        }
        content = {"format": checkpoint.FORMAT, "model": checkpoint.describe_model(self.model)}
        content |= {"config": to_dict(self.config), "training": training}
        checkpoint.write(self.folder / checkpoint.FILE_NAME, content)

    def _restore(self) -> None:
        path = self.folder / checkpoint.FILE_NAME
        content = checkpoint.read(path)
        stored, training = content["model"], content.get("training")
        if training is None:
            raise checkpoint.CheckpointError(f"{path}: holds a model but no training state to resume")
        # a checkpoint may be older than a setting; if that changes the network, its weights will not fit
        settings = self.model.settings | stored["settings"]
        for key, found in (("label_space", stored["label_space"]), ("settings", settings)):
            if found != (wanted := getattr(self.model, key)):
                raise checkpoint.CheckpointError(f"{path}: cannot resume: its {key} is {found}, this run's is {wanted}")
        checkpoint.load_state(self.model, stored["state"], path)
        self.optimizer.load_state_dict(training["optimizer"])
        # its groups came with the checkpoint's options; this run's count
        for group in self.optimizer.param_groups:
            group.update(momentum=self.config.optim.momentum, weight_decay=self.config.optim.weight_decay)
        self.scale.load_state_dict(training["scaler"])
        self.iteration = training["iteration"]
        changed = _changed_options(content["config"], to_dict(self.config))
        self._say(f"resumed at iteration {self.iteration}" + "".join(f"; changed: {option}" for option in changed))

    def _stop_non_finite(
        self, losses: dict[str, float], norm: float, batches: list[tuple[Tensor, Tensor]], hyper: meta.Hyper
    ) -> None:
        """Find the domain whose images give the non-finite loss, and stop; the last checkpoint stays."""
        guilty = set()
        for images, labels in batches:
            for position, domain in enumerate(self.sources):
                # twice: batch norm needs two images, and normalises these as it does one
                batch = _take(images, labels, [position, position])
                found = meta.read_losses(self.params, self.buffers, self.memory, batch, hyper)
                if not all(torch.isfinite(value) for value in found.values()):
                    guilty.add(domain.name)
        where = f"domain {', '.join(sorted(guilty))}"
        if not guilty:
            where = "no single domain (each one's forward is finite): perhaps optim.lr or meta.inner_lr is too high"
        elif len(guilty) > 1 and guilty == {domain.name for domain in self.sources}:
            where = f"every domain ({', '.join(sorted(guilty))}): perhaps optim.lr is too high"
        values = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        saved = (self.folder / checkpoint.FILE_NAME).exists()
        raise NonFiniteLossError(
            f"iteration {self.iteration + 1}: loss or gradient is not finite, from {where}; "
            f"losses: {values}; gradient norm {norm:.4g}. "
            + (f"The last checkpoint in {self.folder} is untouched." if saved else "There is no checkpoint yet.")
        )

    def _where(self) -> str:
        if self.ranks.group is None:
            return str(self.device)
        return f"{self.ranks.size} processes, the first on {self.device}"

    def _say(self, text: str) -> None:
        if self.ranks.first:
            # above a progress bar, not in its line
            tqdm.write(text, file=sys.stderr)

    def _progress(self, total: int, text: str, iterable: Iterable[Any] | None = None, initial: int = 0) -> Any:
        """A progress bar on the first rank."""
        return progress_bar(text, iterable, total, initial=initial, shown=self.ranks.first)


def _changed_options(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options that two configurations differ in, but for ``resume`` itself, as ``optim.lr 0.01 -> 0.1``."""
    found = []
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            found += [f"{key}.{change}" for change in _changed_options(before, value)]
        elif key != "resume" and value != before:
            found.append(f"{key} {before} -> {value}")
    return found


def _none_strong(iteration: int) -> tuple[int, ...]:
    return ()


def _take(
    images: Tensor, labels: Tensor, domains: list[int], layout: torch.memory_format = torch.contiguous_format
) -> meta.Batch:
    """The images of some domains ``[D, B, ...]`` as one batch, domain by domain."""
    # picked by slices: a list of positions would be copied to the GPU, and make the host wait
    chosen_images, chosen_labels = (torch.cat([part[domain] for domain in domains]) for part in (images, labels))
    return meta.Batch(chosen_images.contiguous(memory_format=layout), chosen_labels)


def _accumulate(total: dict[str, Tensor], new: dict[str, Tensor], count: int) -> None:
    for name, value in new.items():
        share = value if count == 1 else value / count
        total[name] = share if name not in total else total[name] + share
