"""Unusual values on every backend: absent classes, everything ignored, zeros, huge numbers, NaN, infinity, labels."""

import pytest
import torch

from pmm_fast import ops
from tests.ops import matrix
from tests.ops.matrix import CASES, pairs

LABELLED = ("pool", "pass-values", "pass-one", "loss")
READING = ("read-noise", "read-seed", "pass-values", "pass-one")
FEATURED = ("pool", "read-values", "pass-values", "pass-one")
FLOAT32 = {"dtype": torch.float32, "channels": 20, "size": (4, 5)}
# label dtype, a value that is neither class nor ignored
WRONG = [
    (torch.uint8, 4),
    (torch.uint8, 254),
    (torch.int8, -2),
    (torch.int16, 300),
    (torch.int32, -1),
    (torch.int32, 256),
    (torch.int64, 2**40 + 1),
    (torch.int64, -(2**33)),
    (torch.int64, 2**32 + 255),
]


def on_cpu(cases, interpreted=()):
    """Only the CPU looks at labels while the host waits."""
    return pairs(cases, interpreted, gpu=False)


@pytest.mark.parametrize(("name", "target"), pairs(LABELLED, ("pass-one",)))
def test_absent_class(name, target):
    arguments = matrix.make(CASES[name], target.device, **FLOAT32)
    arguments["labels"] = arguments["labels"].masked_fill(arguments["labels"] == 2, 255)
    found = matrix.compare(name, arguments, target)["forward"]
    if "sums" in found:
        assert found["mass"][2] == 0 and not found["sums"][2].any() and (found["mass"][[0, 1, 3]] > 0).all()


@pytest.mark.parametrize(("name", "target"), pairs(LABELLED, ("pass-one", "loss")))
@pytest.mark.parametrize("ignore_index", [255, 2])
def test_everything_ignored(name, target, ignore_index):
    arguments = matrix.make(CASES[name], target.device, **FLOAT32) | {"ignore_index": ignore_index}
    arguments["labels"].fill_(ignore_index)
    found = matrix.compare(name, arguments, target)
    for key in ("sums", "mass", "loss"):
        assert not found["forward"].get(key, torch.zeros(1)).any()
    unread = {"features": name == "pool", "written": name == "pass-values", "logits": True, "loss": True, "sums": True}
    for order in ("backward", "double_backward"):
        for key, result in found[order].items():
            assert not unread.get(key) or not result.any(), (order, key)


@pytest.mark.parametrize(("name", "target"), on_cpu(("pool", "pass-values", "loss"), ("pool",)))
@pytest.mark.parametrize(("label_dtype", "ignore_index"), [(torch.int64, -100), (torch.int16, 1), (torch.uint8, 0)])
def test_ignore_index(name, target, label_dtype, ignore_index):
    """A negative one, and one that is a class otherwise: its pixels are then ignored."""
    case = CASES[name]
    arguments = matrix.make(case, target.device, label_dtype=label_dtype, ignored=0.0)
    plain = arguments["labels"].clone()
    arguments["labels"][:, :3] = ignore_index
    found = matrix.compare(name, arguments | {"ignore_index": ignore_index}, target)
    arguments["labels"] = torch.where(arguments["labels"] == ignore_index, 255, plain.long())
    same = matrix.compare(name, arguments, target)
    for order, results in found.items():
        assert all(torch.equal(result, same[order][key]) for key, result in results.items())


@pytest.mark.parametrize(("name", "target"), on_cpu(("pool", "pass-values", "loss"), ("pool", "pass-values", "loss")))
@pytest.mark.parametrize(("label_dtype", "value"), WRONG, ids=str)
def test_wrong_label(name, target, label_dtype, value):
    case = CASES[name]
    arguments = matrix.make(case, target.device, label_dtype=torch.int64, ignored=0.0)
    # a corner is always sampled
    arguments["labels"][1, -1, -1] = value
    arguments["labels"] = arguments["labels"].to(label_dtype)
    message = rf"labels hold {value}, expected classes in 0\.\.3 or the ignore index 255"
    with matrix.on(target, case.operator), pytest.raises(ValueError, match=message):
        matrix.call(case, arguments)


@pytest.mark.parametrize(("name", "target"), on_cpu(("pool", "pass-values", "loss"), ("pool", "loss")))
@pytest.mark.parametrize(("label_dtype", "value", "ignore_index"), [(torch.uint8, 255, -1), (torch.int8, -1, 255)])
def test_an_ignore_index_that_the_labels_cannot_hold(name, target, label_dtype, value, ignore_index):
    """It does not wrap around to a value that they can hold."""
    case = CASES[name]
    arguments = matrix.make(case, target.device, ignored=0.0) | {"ignore_index": ignore_index}
    with ops.use_backend("reference"):
        expected = matrix.call(case, arguments)
    arguments["labels"] = arguments["labels"].to(label_dtype)
    with matrix.on(target, case.operator):
        for result, other in zip(matrix.call(case, arguments), expected, strict=True):
            torch.testing.assert_close(result, other)
        arguments["labels"][1, -1, -1] = value
        with pytest.raises(ValueError, match=f"labels hold {value}, expected .* the ignore index {ignore_index}"):
            matrix.call(case, arguments)


@pytest.mark.parametrize(("name", "target"), pairs(FEATURED, FEATURED))
def test_zero_features(name, target):
    """Zero derivatives of every order with respect to them, and no NaN."""
    arguments = matrix.make(CASES[name], target.device, **FLOAT32)
    arguments["features"][0, :, 1, 1] = 0
    arguments["features"][1, :, :, 2:] = 0
    if "written" in arguments:
        arguments["written"][1, :, 0] = 0
    found = matrix.compare(name, arguments, target)
    for order in ("backward", "double_backward"):
        assert not found[order]["features"][0, :, 1, 1].any() or CASES[name].shared
        assert not found[order]["features"][1, :, 1:, 2:].any()


@pytest.mark.parametrize(("name", "target"), pairs(FEATURED, ("pass-one",)))
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_small_and_large_features(name, target, scale):
    """A derivative of order n scales with their size^-n."""
    arguments = matrix.make(CASES[name], target.device, **FLOAT32)
    arguments["features"] *= scale
    if "written" in arguments and not CASES[name].shared:
        arguments["written"] *= scale
    matrix.compare(name, arguments, target)


@pytest.mark.parametrize(("name", "target"), pairs(FEATURED, FEATURED))
def test_constant_features(name, target):
    arguments = matrix.make(CASES[name], target.device, **FLOAT32)
    arguments["features"].fill_(3.0)
    matrix.compare(name, arguments, target, cancelling=1.0)


@pytest.mark.parametrize(("name", "target"), pairs(("read-noise", "pass-values", "loss", "loss-corners")))
def test_extreme_logits(name, target):
    """Noise or logits of +-1e4 do not overflow."""
    case = CASES[name]
    arguments = matrix.make(case, target.device, **FLOAT32)
    key = "logits" if "logits" in arguments else "noise"
    arguments[key] = torch.where(arguments[key] > 0.3, 1e4, -1e4)
    found = matrix.compare(name, arguments, target, cancelling=1e4 if key == "logits" else 1.0)
    assert all(result.isfinite().all() for results in found.values() for result in results.values())


@pytest.mark.parametrize(("name", "target"), pairs(("read-noise", "pass-values")))
def test_low_temperature(name, target):
    """Nearly the argmax: weights underflow to zero without a NaN."""
    case = CASES[name]
    arguments = matrix.make(case, target.device, **FLOAT32) | {"temperature": 1e-3}
    with matrix.on(target, case.operator):
        found = matrix.orders(case, arguments, *matrix.directions(case, arguments))
    assert all(result.isfinite().all() for results in found.values() for result in results.values())


@pytest.mark.parametrize(("name", "target"), pairs(FEATURED, ("pool", "pass-values")))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_feature_that_is_not_finite_is_seen_and_stays_where_it_is(name, target, value):
    if target.interpreted and value < 0:
        pytest.skip("too slow to interpret")
    case = CASES[name]
    arguments = matrix.make(case, target.device, ignored=0.0, **FLOAT32)
    arguments["features"][0, 3, 1, 2] = value
    if "written" in arguments:
        arguments["written"][0, 3, 1, 2] = value
    label = int(arguments["labels"][0, 2, 5]) if "labels" in arguments else 0
    with matrix.on(target, case.operator):
        found = matrix.orders(case, arguments, *matrix.directions(case, arguments))
    if "read" in found["forward"]:
        bad = ~found["forward"]["read"].isfinite().all(1)
        assert bad[0, 1, 2] and int(bad.sum()) == 1
    if "sums" in found["forward"]:
        assert not found["forward"]["sums"][label].isfinite().all() and found["forward"]["mass"].isfinite().all()
    for order in ("backward", "double_backward"):
        bad = ~found[order]["features"].isfinite().all(1)
        assert bad[0, 1, 2] and int(bad.sum()) == 1


@pytest.mark.parametrize(("name", "target"), pairs(READING, READING))
def test_a_memory_or_noise_that_is_not_finite_is_seen(name, target):
    case = CASES[name]
    for key in ("memory", "noise"):
        arguments = matrix.make(case, target.device, **FLOAT32)
        if arguments[key].dtype == torch.int64:
            continue
        arguments[key][(1, 2) if key == "memory" else (1, 2, 3, 4)] = float("nan")
        with matrix.on(target, case.operator):
            read, scores, *_ = matrix.call(case, arguments)
        if key == "memory":
            assert read.isnan().all(1).all() and scores[:, 1].isnan().all() and not scores[:, 0].isnan().any()
        else:
            assert read[1, :, 3, 4].isnan().all() and int(read.isnan().any(1).sum()) == 1 and not scores.isnan().any()


@pytest.mark.parametrize(("name", "target"), pairs(("loss", "loss-corners"), ("loss",)))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_is_seen(name, target, value):
    case = CASES[name]
    arguments = matrix.make(case, target.device, ignored=0.0)
    arguments["logits"][1, 2, 1, 1] = value
    with matrix.on(target, case.operator):
        found = matrix.orders(case, arguments, *matrix.directions(case, arguments))
    assert not found["forward"]["loss"].isfinite()
    for order in ("backward", "double_backward"):
        grad = found[order]["logits"]
        assert grad[1, :, 1, 1].isnan().all() and grad[0].isfinite().all()


def test_wrong_labels_are_counted_in_one_message():
    labels = torch.tensor([[[4, -7, 255], [9, 9, 0]]])
    message = r"labels hold -7, 4, 9, expected classes in 0\.\.3"
    with ops.use_backend("reference"), pytest.raises(ValueError, match=message):
        ops.masked_average_pool(torch.randn(1, 3, 2, 2), labels, 4)
