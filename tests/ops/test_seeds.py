"""Noise from a seed: the generator itself, and the same noise on every backend, which never stores it."""

import math

import pytest
import torch

from pmm_fast import ops
from pmm_fast.ops import reference
from tests.ops import matrix
from tests.ops.matrix import CASES, pairs
from tests.tolerances import FORWARD, RECOVERED_NOISE, assert_accurate

SEEDS = [0, 1, 0x1234_5678_9ABC, -1, -(2**63), 2**63 - 1]
# counter, key and result of Philox-4x32-10, as its authors publish them with Random123
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    found = reference._philox_4x32_10([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(word) for word in found] == words


def test_noise_is_made_of_the_generator_as_documented():
    words = KNOWN[0][2]
    noise = ops.seeded_gumbel_noise(torch.tensor([0]), (1, 4, 1, 1), torch.float64).flatten()
    for word, value in zip(words, noise.tolist(), strict=True):
        assert value == pytest.approx(-math.log(-math.log(((word >> 9) + 0.5) * 2.0**-23)), rel=1e-14)


def test_position_and_slot_alone_decide():
    """More slots, more images: the noise of a position number and slot stays."""
    seed = torch.tensor([77])
    small = ops.seeded_gumbel_noise(seed, (1, 5, 3, 4))
    assert torch.equal(ops.seeded_gumbel_noise(seed, (2, 11, 3, 4))[:1, :5], small)
    assert torch.equal(
        ops.seeded_gumbel_noise(seed, (3, 5, 2, 2)).permute(0, 2, 3, 1).reshape(1, 3, 4, 5).permute(0, 3, 1, 2), small
    )


def test_noise_is_standard_gumbel():
    noise = ops.seeded_gumbel_noise(torch.tensor([3]), (2, 19, 48, 48), torch.float64)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.01)
    assert len(noise.unique()) > 0.99 * noise.numel()
    # slots and positions are independent of one another
    rows = noise.permute(1, 0, 2, 3).flatten(1)
    correlation = torch.corrcoef(rows) - torch.eye(19)
    assert float(correlation.abs().max()) < 0.06
    other = ops.seeded_gumbel_noise(torch.tensor([4]), (2, 19, 48, 48), torch.float64)
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.02


@pytest.mark.parametrize("target", matrix.TARGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_backend_draws_this_noise(target, seed):
    """Slots of zero leave the noise alone in the softmax, and one-hot values show the weights."""
    if target.interpreted and seed not in SEEDS[2:4]:
        pytest.skip("too slow to interpret")
    batch, slots, size = 2, 7, (3, 5)
    seeds = torch.tensor([seed], device=target.device)
    features = torch.randn(batch, 3, *size, dtype=torch.float64).to(target.device)
    memory, values = torch.zeros(slots, 3, dtype=torch.float64), torch.eye(slots, dtype=torch.float64)
    with matrix.on(target, "memory_read"):
        weights, _ = ops.memory_read(features, memory.to(target.device), seeds, 2.0, values.to(target.device))
    found = 2 * (weights.log() - weights[:, :1].log())
    noise = ops.seeded_gumbel_noise(seeds, (batch, slots, *size), torch.float64)
    torch.testing.assert_close(found, noise - noise[:, :1], rtol=0, atol=RECOVERED_NOISE)


@pytest.mark.parametrize(("name", "target"), pairs(("read-seed", "pass-one-seed"), ("read-seed", "pass-one-seed")))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_seed_is_its_noise_in_every_order(name, target, dtype):
    case = CASES[name]
    arguments = matrix.make(case, target.device, dtype=dtype, classes=5)
    features = arguments["features"]
    shape = (len(features), 5, *features.shape[2:])
    noise = ops.seeded_gumbel_noise(arguments["noise"], shape, torch.float64)
    incoming, tangents = matrix.directions(case, arguments)
    with matrix.on(target, case.operator):
        found = matrix.orders(case, arguments, incoming, tangents)
        expected = matrix.orders(case, arguments | {"noise": noise.to(dtype)}, incoming, tangents)
    for order, results in found.items():
        for key, result in results.items():
            assert_accurate(result, expected[order][key], expected[order][key], order, dtype)


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_read_and_pass_draw_the_same(target):
    arguments = matrix.make(CASES["pass"], target.device, dtype=torch.float32)
    seed = torch.tensor(9, device=target.device)
    with matrix.on(target):
        passed = ops.memory_pass(**(arguments | {"noise": seed}))[0]
        read = ops.memory_read(arguments["features"], arguments["memory"], seed)[0]
        other = ops.memory_read(arguments["features"], arguments["memory"], seed + 1)[0]
    torch.testing.assert_close(passed, read, rtol=0, atol=FORWARD[torch.float32])
    assert not torch.allclose(read, other, atol=1e-2)


def test_a_seed_has_one_element():
    arguments = matrix.make(CASES["read"])
    with pytest.raises(ValueError, match=r"a seed of noise must have one element, got shape \(2,\)"):
        ops.memory_read(**(arguments | {"noise": torch.tensor([1, 2])}))
