"""The whitening loss, what selects its covariances, and its place in the step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pmm_fast import meta
from pmm_fast.models.blocks import WhitenedFeatures
from pmm_fast.models.instance_norm import InstanceNorm2d, WhiteningMasks
from tests.meta.tiny import CHANNELS, TinyEncoder, TinySegmentor, tiny_batch
from tests.tolerances import EXACT, FINITE_DIFFERENCE, relative_error


class WhitenedEncoder(TinyEncoder):
    """Two maps to be whitened: the normalised first one, and that again after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second = InstanceNorm2d(CHANNELS, affine=False), nn.Conv2d(CHANNELS, 3, 3)

    def forward(self, images: Tensor) -> WhitenedFeatures:
        maps = self.norm(self.conv(images))
        feature = nn.functional.softplus(self.bn(maps))
        return WhitenedFeatures(feature, feature, feature, (maps, self.norm(self.second(maps))))


def whitened_model(selected: bool = True) -> TinySegmentor:
    """A network with a whitening loss, of covariances drawn at random."""
    model = TinySegmentor(memory=False)
    model.encoder, model.whitening = WhitenedEncoder().double(), WhiteningMasks((CHANNELS, 3))
    torch.manual_seed(5)
    for mask in model.whitening.buffers():
        mask.copy_((torch.rand(mask.shape) < 0.6 * selected).triu(1))
    assert not selected or all(mask.any() for mask in model.whitening.buffers())
    return model


def whitened_problem(selected: bool = True, weight: float = 0.6) -> tuple:
    """State, batch and settings of a step with a whitening loss."""
    model = whitened_model(selected)
    params, buffers, _ = meta.split_state(model)
    return params, buffers, tiny_batch(1), meta.Hyper(meta.Network(model), "agg", whitening_weight=weight)


def run(params: meta.State, buffers: meta.State, batch: meta.Batch, hyper: meta.Hyper) -> meta.StepResult:
    return meta.step(params, buffers, None, batch, None, meta.Noise(), hyper)


def plain_covariance(x: np.ndarray) -> np.ndarray:
    """Of the channels of one image ``[C, h, w]``, number by number."""
    channels, count = x.shape[0], x[0].size
    return np.array([[(x[c] * x[d]).sum() / (count - 1) for d in range(channels)] for c in range(channels)])


def plain_loss(maps: list[Tensor], masks: list[Tensor]) -> float:
    total = 0.0
    for x, mask in zip(maps, masks, strict=True):
        chosen = [(int(c), int(d)) for c, d in mask.nonzero()]
        covariances = [plain_covariance(image) for image in x.detach().numpy()]
        total += sum(abs(cov[c, d]) for cov in covariances for c, d in chosen) / (len(x) * max(len(chosen), 1))
    return total / len(maps)


# --- the loss ------------------------------------------------------------------------------------------------------


def test_loss_is_its_definition_and_a_map_without_covariances_counts_as_0() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(3, c, 4, 5, dtype=torch.float64) for c in (4, 6)]
    masks = [torch.ones(4, 4).triu(1).bool(), (torch.rand(6, 6) < 0.3).triu(1)]
    for chosen in (masks, [masks[0], torch.zeros(6, 6, dtype=torch.bool)]):
        assert float(meta.whitening_loss(maps, chosen)) == pytest.approx(plain_loss(maps, chosen), rel=EXACT)
    none = [torch.zeros_like(mask) for mask in masks]
    leaf = maps[0].clone().requires_grad_()
    loss = meta.whitening_loss([leaf, maps[1]], none)
    assert loss == 0 and not torch.autograd.grad(loss, leaf)[0].any()


def test_derivatives_of_the_loss_of_both_orders() -> None:
    torch.manual_seed(0)
    norm, mask = InstanceNorm2d(3, affine=False), torch.ones(3, 3).triu(1).bool()
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: meta.whitening_loss([norm(x)], [mask]), (x,))
    assert torch.autograd.gradgradcheck(lambda x: meta.whitening_loss([norm(x)], [mask]), (x,))


def test_covariances_of_half_precision_are_summed_in_float32() -> None:
    # 4096 products of 1: bf16 stops counting at 256
    maps = torch.ones(1, 2, 64, 64, dtype=torch.bfloat16)
    found = meta.covariance(maps)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((1, 2, 2), 4096 / 4095))


# --- the selection -------------------------------------------------------------------------------------------------


def test_variance_within_pairs() -> None:
    torch.manual_seed(0)
    plain, jittered = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    found = meta.pair_variance(plain, jittered).numpy()
    for index in range(2):
        pair = [plain_covariance(images[index].numpy()) for images in (plain, jittered)]
        expected = np.triu(np.var(pair, axis=0, ddof=1), 1)
        np.testing.assert_allclose(found[index], expected, rtol=EXACT)


def scatter(values: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances to the clusters' means."""
    return sum(((values[labels == k] - values[labels == k].mean()) ** 2).sum() for k in range(labels.max() + 1))


def test_clusters_are_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        count, clusters = int(rng.integers(1, 12)), int(rng.integers(1, 6))
        values = rng.choice([rng.normal(size=count), rng.integers(0, 4, count) / 7, rng.exponential(size=count) ** 3])
        found = meta.cluster_numbers(values, clusters)
        different = np.unique(values)
        size = min(clusters, len(different))
        every = (
            np.searchsorted(different[list(cuts)], values, side="right")
            for cuts in itertools.combinations(range(1, len(different)), size - 1)
        )
        assert sorted(set(found.tolist())) == list(range(size))
        assert scatter(values, found) <= min(scatter(values, labels) for labels in every) + EXACT
        # they rise with the values, and equal values are together
        order = np.argsort(values)
        assert (np.diff(found[order]) >= 0).all()
        assert all(len(set(found[values == value])) == 1 for value in different)


def test_clusters_of_many_values() -> None:
    # as many as the largest map of a ResNet-50 has, half of them 0
    rng = np.random.default_rng(0)
    values = np.concatenate([np.zeros(512 * 513 // 2), rng.exponential(1e-4, 512 * 511 // 2), [0.5, 0.6, 0.9]])
    found = meta.cluster_numbers(values, 3)
    assert found[-3:].tolist() == [1, 1, 2] and not found[:-3].any()


def test_selected_are_all_but_the_lowest_cluster_zeros_included() -> None:
    variance = torch.zeros(5, 5)
    rows, columns = torch.triu_indices(5, 5, 1)
    variance[rows, columns] = torch.tensor([10, 10.1, 20, 10.2, 10.3, 20.1, 10, 20.3, 10.5, 0.2])
    mask = meta.select_covariances(variance, 3)
    # of the ten numbers alone, those about 10 would be in the lowest of two clusters
    assert mask.dtype == torch.bool and torch.equal(mask, variance > 1)
    assert torch.equal(meta.select_covariances(variance, 2), variance > 1)
    assert not meta.select_covariances(torch.zeros(4, 4), 3).any()


# --- in the step ---------------------------------------------------------------------------------------------------


def test_step_adds_the_weighted_loss() -> None:
    params, buffers, batch, hyper = whitened_problem()
    result = run(params, buffers, batch, hyper)
    maps = hyper.network("encoder", params, {k: v.clone() for k, v in buffers.items()}, batch.images).whitened
    expected = plain_loss(list(maps), [buffers[name] for name in hyper.network.masks])
    found = {name: float(value) for name, value in result.losses.items()}
    assert expected > 0.01 and found["train/whitening"] == pytest.approx(expected, rel=EXACT)
    parts = found["train/seg"] + 0.4 * found["train/aux"] + 0.6 * expected
    assert found["total"] == pytest.approx(parts, rel=EXACT)
    assert all(torch.equal(result.buffers[name], buffers[name]) for name in hyper.network.masks)
    # what the loss adds to the gradient
    without = run(params, buffers, batch, replace(hyper, whitening_weight=0.0))
    name = "encoder.conv.weight"
    weight = params[name].detach().clone().requires_grad_()
    state = {key: value.clone() for key, value in buffers.items()}
    maps = hyper.network("encoder", params | {name: weight}, state, batch.images).whitened
    loss = meta.whitening_loss(maps, [buffers[mask] for mask in hyper.network.masks])
    added = 0.6 * torch.autograd.grad(loss, weight)[0]
    assert relative_error(result.grads[name] - without.grads[name], added) < EXACT


def test_gradient_by_finite_differences() -> None:
    params, buffers, batch, hyper = whitened_problem(weight=5.0)
    result = run(params, buffers, batch, hyper)
    name, step = "encoder.conv.weight", 1e-5
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(params[name].shape, generator=generator, dtype=torch.float64)
    totals = [
        run(params | {name: params[name].detach() + sign * step * along}, buffers, batch, hyper).losses["total"]
        for sign in (1, -1)
    ]
    expected = (result.grads[name] * along).sum()
    assert relative_error((totals[0] - totals[1]) / (2 * step), expected) < FINITE_DIFFERENCE


def test_masks_of_nothing_change_nothing() -> None:
    params, buffers, batch, hyper = whitened_problem(selected=False)
    result, without = (run(params, buffers, batch, h) for h in (hyper, replace(hyper, whitening_weight=0.0)))
    assert result.losses["train/whitening"] == 0
    assert all(torch.equal(result.grads[name], without.grads[name]) for name in result.grads)


def test_compiled_once_for_all_masks() -> None:
    params, buffers, batch, hyper = whitened_problem()
    compiled = meta.CompiledStep("graph", strict=True, say=lambda line: None)
    arguments = (None, batch, None, meta.Noise(), hyper)
    compiled(params, buffers, *arguments)
    other = buffers | {name: ~buffers[name] for name in hyper.network.masks}
    found, expected = compiled(params, other, *arguments), meta.step(params, other, *arguments)
    assert compiled.graphs == 1
    assert all(torch.equal(found.grads[name], expected.grads[name]) for name in expected.grads)


def test_other_modes_are_refused() -> None:
    network = whitened_problem()[-1].network
    with pytest.raises(ValueError, match="mode 'mldg' has no whitening loss"):
        meta.Hyper(network, "mldg")
