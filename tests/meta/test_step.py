"""The step against independent formulations: finite differences, the Hessian-vector formula, plain module calls."""

import copy

import pytest
import torch
from torch.func import functional_call

from pmm_fast import meta, ops
from pmm_fast.meta import losses as L
from tests.meta.tiny import CLASSES, TinySegmentor, tiny_batch, tiny_noise, tiny_problem
from tests.tolerances import EXACT, FINITE_DIFFERENCE, relative_error


def flatten(grads, names):
    return torch.cat([grads[name].reshape(-1) for name in names])


def objective(model, params, buffers, memory, mtr, mte, noise, hyper, constant_feature):
    """L_in(theta) + L_out(theta') written out with whole-module calls; the encoder copy that writes M' is given."""

    class Pass(torch.nn.Module):
        def __init__(self, inner, body):
            super().__init__()
            self.inner, self.body = inner, body

        def forward(self):
            return self.body(self.inner)

    def call(state, body):
        state = {f"inner.{k}": v for k, v in {**state, **{k: v.clone() for k, v in buffers.items()}}.items()}
        return functional_call(Pass(model, body), state | {"inner.memory.slots": memory}, ())

    def read(net, batch, slots, gumbel):
        feature, low_level, aux = net.encoder(batch.images)
        value, scores = ops.memory_read(feature, slots, gumbel)
        logits = net.decoder(net.memory.fusion(feature, value), low_level)
        total = ops.upsample_cross_entropy(logits, batch.labels)
        total = total + hyper.aux_weight * L.auxiliary_loss(net.aux_head(aux), batch.labels)
        return total + hyper.cohesion_weight * ops.upsample_cross_entropy(scores, batch.labels), feature

    def inner(net):
        total, feature = read(net, mtr, memory, noise.train)
        pooled = ops.masked_average_pool(net.memory.writer(feature), mtr.labels, CLASSES)
        written = ops.update_memory(memory, *pooled, hyper.memory_momentum)
        total = total + hyper.divergence_weight * L.divergence_loss(written)
        return total + hyper.classifier_weight * L.classifier_loss(net.memory.classifier(written))

    def outer(net):
        feature = net.encoder(mtr.images).feature.detach() if constant_feature is None else constant_feature
        pooled = ops.masked_average_pool(net.memory.writer(feature), mtr.labels, CLASSES)
        rewritten = ops.update_memory(memory, *pooled, hyper.memory_momentum)
        return read(net, mte, rewritten, noise.test)[0], feature

    loss_in = call(params, inner)
    grads = torch.autograd.grad(loss_in, list(params.values()), create_graph=True)
    adapted = {k: v - hyper.inner_lr * g for (k, v), g in zip(params.items(), grads, strict=True)}
    loss_out, feature = call(adapted, outer)
    return loss_in + loss_out, feature


def independent(problem):
    """The objective as a function of the parameters, with the writing encoder frozen where it stood."""
    params, buffers, memory, mtr, mte, noise, hyper = problem
    model = TinySegmentor()
    leaves = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
    _, feature = objective(model, leaves, buffers, memory, mtr, mte, noise, hyper, None)
    return leaves, lambda theta: objective(model, theta, buffers, memory, mtr, mte, noise, hyper, feature)[0]


def test_order_2_equals_autograd_of_the_written_out_objective():
    problem = tiny_problem()
    leaves, function = independent(problem)
    value = function(leaves)
    expected = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    result = meta.step(*problem)
    assert float(result.losses["total"]) == pytest.approx(float(value.detach()), rel=1e-12)
    for name in leaves:
        assert relative_error(result.grads[name], expected[name]) < EXACT or expected[name].abs().max() < 1e-12, name


def test_order_2_equals_finite_differences():
    problem = tiny_problem()
    grads = meta.step(*problem).grads
    leaves, function = independent(problem)
    generator = torch.Generator().manual_seed(5)
    for name in leaves:
        direction = torch.randn(leaves[name].shape, generator=generator, dtype=torch.float64)
        step = 1e-5 / direction.norm()
        up, down = (
            function(leaves | {name: (leaves[name] + sign * step * direction).detach().requires_grad_()})
            for sign in (1, -1)
        )
        found = float((up - down).detach() / (2 * step))
        expected = float((grads[name] * direction).sum())
        assert found == pytest.approx(expected, rel=1e-5, abs=FINITE_DIFFERENCE), name


@pytest.mark.parametrize("mode", ["pinmem", "mldg"])
def test_order_2_minus_order_1_is_the_hessian_term(mode):
    """g2 - g1 = -alpha H_in g_out, with the Hessian-vector product by differences of the inner gradient."""
    params, buffers, memory, mtr, mte, noise, hyper = tiny_problem(mode)
    inner_mode = {"pinmem": "memory-agg", "mldg": "agg"}[mode]
    inner_hyper = meta.Hyper(hyper.network, inner_mode, cohesion_weight=hyper.cohesion_weight)
    names = list(params)

    def inner_gradient(theta):
        return flatten(meta.step(theta, buffers, memory, mtr, None, noise, inner_hyper).grads, names)

    def shifted(vector, step):
        parts = vector.split([params[name].numel() for name in names])
        return {n: params[n].detach() + step * p.view_as(params[n]) for n, p in zip(names, parts, strict=True)}

    first, second = (
        flatten(
            meta.step(params, buffers, memory, mtr, mte, noise, meta.Hyper(**(vars(hyper) | {"order": order}))).grads,
            names,
        )
        for order in (1, 2)
    )
    outer = first - inner_gradient(params)
    step = 1e-5 / float(outer.norm())
    hessian_vector = (inner_gradient(shifted(outer, step)) - inner_gradient(shifted(outer, -step))) / (2 * step)
    assert relative_error(second - first, -hyper.inner_lr * hessian_vector) < 1e-5
    # the two orders must be far apart, or the comparison shows nothing
    assert relative_error(second, first) > 100 * 1e-5


@pytest.mark.parametrize("mode", ["pinmem", "memory-agg", "mldg", "agg"])
@pytest.mark.parametrize("order", [1, 2])
def test_changes_none_of_its_arguments(mode, order):
    problem = tiny_problem(mode, order=order)
    before = copy.deepcopy(problem[:6])
    result = meta.step(*problem)
    for old, new in zip(before[:2], problem[:2], strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
        assert all(value.grad is None for value in new.values())
    if problem[2] is not None:
        assert torch.equal(before[2], problem[2])
    assert not any(g.requires_grad for g in result.grads.values())
    assert result.grads.keys() == problem[0].keys()


def test_buffers_are_those_of_the_meta_train_pass_alone():
    params, buffers, memory, mtr, mte, noise, hyper = tiny_problem()
    result = meta.step(params, buffers, memory, mtr, mte, noise, hyper)
    model = TinySegmentor().train()
    features = model.encoder(mtr.images)
    model.memory.writer(features.feature)
    read, _ = ops.memory_read(features.feature, memory, noise.train)
    model.memory.fusion(features.feature, read)
    expected = dict(model.named_buffers())
    changed = 0
    for name, value in result.buffers.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)
        changed += not torch.equal(value, buffers[name])
    assert changed == len(buffers) == 9


def test_agg_is_the_plain_gradient():
    params, buffers, _, batch, _, noise, hyper = tiny_problem("agg")
    model = TinySegmentor(memory=False).train()
    features = model.encoder(batch.images)
    loss = ops.upsample_cross_entropy(model.decoder(features.feature, features.low_level), batch.labels)
    loss = loss + 0.4 * L.auxiliary_loss(model.aux_head(features.aux), batch.labels)
    loss.backward()
    result = meta.step(params, buffers, None, batch, None, noise, hyper)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result.grads[name], parameter.grad, rtol=1e-10, atol=1e-14)


def test_order_1_is_the_sum_of_two_gradients():
    """Released identity: total gradient = grad L_in(theta) + grad L_out(theta')."""
    params, buffers, _, mtr, mte, noise, hyper = tiny_problem("mldg", order=1)
    plain = meta.Hyper(hyper.network, "agg")
    inner = meta.step(params, buffers, None, mtr, None, noise, plain).grads
    adapted = {name: params[name].detach() - hyper.inner_lr * inner[name] for name in params}
    outer = meta.step(adapted, buffers, None, mte, None, noise, plain).grads
    found = meta.step(params, buffers, None, mtr, mte, noise, hyper).grads
    for name in params:
        torch.testing.assert_close(found[name], inner[name] + outer[name], rtol=1e-10, atol=1e-14)


def test_inner_lr_zero_makes_the_orders_equal():
    first, second = (meta.step(*tiny_problem(order=order, inner_lr=0.0)) for order in (1, 2))
    for name in first.grads:
        torch.testing.assert_close(first.grads[name], second.grads[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("order", [1, 2])
def test_loss_scale_leaves_the_gradients(order):
    plain, scaled = (meta.step(*tiny_problem(order=order, loss_scale=scale)) for scale in (1.0, 1024.0))
    for name in plain.grads:
        torch.testing.assert_close(scaled.grads[name], plain.grads[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("order", [1, 2])
def test_autocast_stays_near_float32(order):
    """bf16 through the inner and the outer gradient: same direction, finite, float32 results."""
    grads = []
    for amp in (None, torch.bfloat16):
        params, buffers, memory, mtr, mte, noise, hyper = tiny_problem(order=order, autocast=amp)
        problem = [
            {k: v.detach().float() if v.is_floating_point() else v for k, v in d.items()} for d in (params, buffers)
        ]
        batches = [meta.Batch(b.images.float(), b.labels) for b in (mtr, mte)]
        result = meta.step(*problem, memory.float(), *batches, noise, hyper)
        grads.append(flatten(result.grads, list(params)))
        assert grads[-1].dtype == torch.float32 and grads[-1].isfinite().all()
    assert not torch.equal(*grads)
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99


def test_all_labels_ignored_gives_zero_read_gradients():
    params, buffers, memory, mtr, mte, noise, hyper = tiny_problem()
    blank = [meta.Batch(batch.images, torch.full_like(batch.labels, 255)) for batch in (mtr, mte)]
    result = meta.step(params, buffers, memory, *blank, noise, hyper)
    assert all(value.isfinite().all() for value in result.grads.values())
    assert not result.grads["encoder.conv.weight"].any()
    torch.testing.assert_close(result.memory, memory)  # no class present: the memory stays


def test_rewrite_uses_running_statistics_and_adds_micro_batches():
    params, buffers, memory, mtr, _, _, hyper = tiny_problem()
    whole = meta.rewrite_memory(params, buffers, memory, [mtr], hyper)
    parts = [meta.Batch(mtr.images[i : i + 1], mtr.labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(meta.rewrite_memory(params, buffers, memory, parts, hyper), whole, rtol=1e-10, atol=0)
    model = TinySegmentor().eval()
    written = model.memory.writer(model.encoder(mtr.images).feature)
    pooled = ops.masked_average_pool(written, mtr.labels, CLASSES)
    torch.testing.assert_close(whole, ops.update_memory(memory, *pooled, 0.8).detach(), rtol=1e-10, atol=1e-14)
    assert relative_error(whole, meta.step(*tiny_problem()).memory) > 1e-6


def test_initial_memory_is_the_mean_feature_of_each_class():
    params, buffers, memory, mtr, mte, _, hyper = tiny_problem()
    batches = [meta.Batch(batch.images, torch.where(batch.labels == 2, 255, batch.labels)) for batch in (mtr, mte)]
    found, mass = meta.initialise_memory(params, buffers, batches, memory, hyper)
    encoder = TinySegmentor().eval().encoder
    pooled = [ops.masked_average_pool(encoder(b.images).feature, b.labels, CLASSES) for b in batches]
    sums, expected_mass = (sum(parts) for parts in zip(*pooled, strict=True))
    torch.testing.assert_close(mass, expected_mass.detach())
    torch.testing.assert_close(found, ops.normalize(sums / expected_mass.clamp(min=1e-9)[:, None], 1).detach())
    assert not found[2].any() and mass[2] == 0


def test_draw_split_law():
    import numpy as np

    generator = np.random.default_rng(0)
    splits = [meta.draw_split(3, generator) for _ in range(3000)]
    sizes = [len(train) for train, _ in splits]
    assert all(sorted(train + test) == [0, 1, 2] and train and test for train, test in splits)
    assert 0.45 < sizes.count(1) / 3000 < 0.55
    assert all(0.45 < sum(domain in train for train, _ in splits) / 3000 < 0.55 for domain in range(3))
    with pytest.raises(ValueError, match="at least 2 domains, got 1"):
        meta.draw_split(1, generator)


def test_arguments_that_do_not_fit_the_mode():
    params, buffers, memory, mtr, mte, noise, hyper = tiny_problem()
    with pytest.raises(ValueError, match="'pinmem' needs a meta-test batch"):
        meta.step(params, buffers, memory, mtr, None, noise, hyper)
    with pytest.raises(ValueError, match="'pinmem' needs a memory"):
        meta.step(params, buffers, None, mtr, mte, noise, hyper)
    with pytest.raises(ValueError, match="does not fit a network that has memory"):
        meta.Hyper(hyper.network, "agg")
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        meta.Hyper(hyper.network, order=3)
    with pytest.raises(ValueError, match="mode must be pinmem"):
        meta.Hyper(hyper.network, mode="maml")


def test_losses_have_their_known_values():
    """Bounds of the method: an uninformative memory gives ln K, orthogonal slots no divergence."""
    assert float(L.divergence_loss(torch.eye(3, dtype=torch.float64))) == 0
    assert float(L.divergence_loss(torch.ones(3, 1, dtype=torch.float64))) == 1
    assert float(L.divergence_loss(-torch.eye(1))) == 0
    assert float(L.classifier_loss(torch.zeros(19, 19))) == pytest.approx(2.944, abs=1e-3)
    labels = torch.randint(0, 19, (2, 8, 8))
    assert float(L.cohesion_loss(torch.zeros(2, 19, 3, 3), labels)) == pytest.approx(2.944, abs=1e-3)
    peaked = torch.nn.functional.one_hot(torch.zeros(1, 4, 4, dtype=torch.long), 19).permute(0, 3, 1, 2).float()
    best = L.cohesion_loss(peaked, torch.zeros(1, 8, 8, dtype=torch.long))
    assert float(best) == pytest.approx(2.031, abs=1e-3)


def test_noise_matters_and_is_an_input():
    params, buffers, memory, mtr, mte, noise, hyper = tiny_problem()
    same = meta.step(params, buffers, memory, mtr, mte, noise, hyper)
    again = meta.step(params, buffers, memory, mtr, mte, noise, hyper)
    other = meta.step(params, buffers, memory, mtr, mte, meta.Noise(tiny_noise(8), tiny_noise(9)), hyper)
    assert torch.equal(same.grads["decoder.head.weight"], again.grads["decoder.head.weight"])
    assert not torch.equal(same.grads["decoder.head.weight"], other.grads["decoder.head.weight"])


def test_a_forgotten_parameter_is_an_error():
    params, buffers, memory, mtr, mte, noise, hyper = tiny_problem()
    params.pop("encoder.conv.bias")
    with pytest.raises(RuntimeError, match=r"conv\.bias"):
        meta.step(params, buffers, memory, mtr, mte, noise, hyper)


def test_read_losses_find_the_batch_that_is_not_finite():
    params, buffers, memory, mtr, _, _, hyper = tiny_problem()
    good = meta.read_losses(params, buffers, memory, mtr, hyper)
    assert set(good) == {"seg", "aux", "cohesion"} and all(value.isfinite() for value in good.values())
    broken = tiny_batch(1)
    broken.images[0, 0, 0, 0] = float("nan")
    assert meta.read_losses(params, buffers, memory, broken, hyper)["seg"].isnan()
