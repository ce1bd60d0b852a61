"""One whole released training iteration (order 1): losses, every gradient, every update, buffers and memory."""

import copy

import numpy as np
import pytest
import torch

from pmm_fast import convert, meta
from tests import released
from tests.tolerances import RELEASED_NETWORK, RELEASED_STEP, RELEASED_STEP_SKIP, relative_error

pytestmark = released.needs_released


@pytest.fixture(scope="module")
def outcome():
    """Fixture numbers, the model after the iteration, the step's result and the rewritten memory."""
    arrays, numbers = released.load("deeplabv3plus_resnet50_step"), released.load_json("deeplabv3plus_resnet50_step")
    keys = released.released_keys("deeplabv3plus_resnet50")
    model = convert.from_released(released.released_weights(keys), arrays["memory_before"]).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0  # as the fixture was made
    params, buffers, memory = meta.split_state(model)
    hyper = meta.Hyper(meta.Network(model), order=1, inner_lr=numbers["inner_lr"])
    train, test = (meta.Batch(arrays["image"][:, domain], arrays["label"][:, domain]) for domain in (0, 1))
    result = meta.step(params, buffers, memory, train, test, meta.Noise(), hyper)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=numbers["lr"], momentum=0.9, weight_decay=5e-4)
    for name, parameter in params.items():
        parameter.grad = result.grads[name]
    optimizer.step()
    for name, value in result.buffers.items():
        buffers[name].copy_(value)
    rewritten = meta.rewrite_memory(params, buffers, memory, [train], hyper)
    return arrays, numbers, before, model, result, rewritten


def by_released_name(model, values):
    """Values by our parameter names, as by released names."""
    clone = copy.deepcopy(model)
    clone.load_state_dict(values, strict=False)
    return convert.to_released(clone)[0]


def test_losses(outcome):
    _, numbers, *_, result, _ = outcome
    for side, expected in zip(("train", "test"), numbers["losses"], strict=True):
        for name in ("seg", "aux", "cohesion"):
            assert float(result.losses[f"{side}/{name}"]) == pytest.approx(expected[name], rel=RELEASED_NETWORK)
        assert float(result.losses[side]) == pytest.approx(expected["total"], rel=RELEASED_NETWORK)
    for name in ("divergence", "classifier"):
        assert float(result.losses[f"train/{name}"]) == pytest.approx(numbers["losses"][0][name], rel=RELEASED_NETWORK)


@pytest.mark.parametrize("kind", ["grad", "delta"])
def test_every_gradient_and_update(outcome, kind):
    _, numbers, before, after, result, _ = outcome
    if kind == "grad":
        found = by_released_name(before, result.grads)
    else:
        old, new = convert.to_released(before)[0], convert.to_released(after)[0]
        found = {name: new[name].double() - old[name].double() for name in new}
    expected = numbers["params"]
    largest = max(entry[f"{kind}_norm"] for entry in expected.values())
    compared, worst = 0, 0.0
    for name, entry in expected.items():
        norm = entry[f"{kind}_norm"]
        if norm < RELEASED_STEP_SKIP * largest:
            continue
        head = found[name].flatten()[:8].double().numpy()
        difference = np.abs(head - np.array(entry[f"{kind}_head"])).max()
        worst = max(worst, difference / norm, abs(float(found[name].double().norm()) - norm) / norm)
        compared += 1
    print(f"{kind}: {compared} of {len(expected)} parameters, worst relative error {worst:.2e}")
    assert compared > 150 and worst < RELEASED_STEP


def test_memory_and_buffers_after(outcome):
    arrays, numbers, _, after, _, rewritten = outcome
    assert relative_error(rewritten, arrays["memory_after"]) < RELEASED_NETWORK
    state = convert.to_released(after)[0]
    for name, (total, norm) in numbers["buffers"].items():
        value = state[name].double()
        assert float(value.norm()) == pytest.approx(norm, rel=RELEASED_NETWORK), name
        assert float(value.sum()) == pytest.approx(total, abs=RELEASED_NETWORK * norm * value.numel() ** 0.5), name
