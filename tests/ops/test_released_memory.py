"""The operators and losses against one forward and backward of the released memory module."""

import pytest
import torch

from pmm_fast import ops
from pmm_fast.meta import losses as L
from pmm_fast.models import SemanticMemory
from tests import released
from tests.ops import matrix
from tests.tolerances import RELEASED_MEMORY, relative_error

NAMES = {
    "output.0": "fusion.conv",
    "output.1": "fusion.bn",
    "writenet.writefeat.0": "writer.conv",
    "writenet.writefeat.1": "writer.bn",
    "clsfier": "classifier",
}


def ours(name):
    prefix, leaf = name.rsplit(".", 1)
    return f"{NAMES[prefix]}.{leaf}"


@pytest.fixture(scope="module", params=matrix.TARGETS)
def outcome(request):
    """Fixture arrays, the module after one forward, its outputs, and the gradient of the query, on one backend."""
    with matrix.on(request.param):
        return released_iteration(request.param.device)


def released_iteration(device):
    data = {name: array.to(device) for name, array in released.load("memory").items()}
    memory = data["memory_before"]
    module = SemanticMemory(*memory.shape).train().to(device)
    state = {ours(k.removeprefix("param/")): v for k, v in data.items() if k.startswith("param/")}
    module.load_state_dict(state | {"slots": memory})
    query = data["query"].clone().requires_grad_()
    batch, _, height, width = query.shape
    noise = data["gumbel_noise"].view(batch, height, width, -1).permute(0, 3, 1, 2)
    read, scores, *pooled = ops.memory_pass(query, module.writer(query), data["labels"], memory, noise)
    found = {
        "read_feature": module.fusion(query, read),
        "cohesion_loss": L.cohesion_loss(scores, data["labels"]),
        "memory_after": ops.update_memory(memory, *pooled, 0.8),
        "assignment": ops.assignment(scores, noise),
    }
    found["divergence_loss"] = L.divergence_loss(found["memory_after"])
    found["classifier_loss"] = L.classifier_loss(module.classifier(found["memory_after"]))
    found["total"] = (
        (found["read_feature"] * data["dout"]).sum()
        + 0.02 * found["cohesion_loss"]
        + 0.4 * found["divergence_loss"]
        + 0.2 * found["classifier_loss"]
        + (found["memory_after"] * data["dmem"]).sum()
    )
    found["total"].backward()
    return data, module, found, query.grad


@pytest.mark.parametrize(
    "name",
    ["read_feature", "assignment", "cohesion_loss", "divergence_loss", "classifier_loss", "memory_after", "total"],
)
def test_outputs(outcome, name):
    data, _, found, _ = outcome
    value, expected = found[name], data[name]
    if name == "assignment" and expected.shape != value.shape:
        value = value.permute(0, 2, 3, 1).reshape(expected.shape)
    assert value.shape == expected.shape
    assert relative_error(value, expected) < RELEASED_MEMORY


def test_all_gradients(outcome):
    data, module, _, query_grad = outcome
    assert relative_error(query_grad, data["grad_query"]) < RELEASED_MEMORY
    parameters = dict(module.named_parameters())
    names = [key for key in data if key.startswith("grad/")]
    assert len(names) == len(parameters) == 8
    for key in names:
        error = relative_error(parameters[ours(key.removeprefix("grad/"))].grad, data[key])
        assert error < RELEASED_MEMORY, key


def test_batch_norm_buffers(outcome):
    data, module, _, _ = outcome
    buffers = dict(module.named_buffers())
    names = [key for key in data if key.startswith("buffer_after/")]
    assert len(names) == 4
    for key in names:
        assert relative_error(buffers[ours(key.removeprefix("buffer_after/"))], data[key]) < RELEASED_MEMORY, key


def test_absent_classes_keep_their_slots(outcome):
    data, _, found, _ = outcome
    for absent in (7, 16):
        torch.testing.assert_close(found["memory_after"][absent], data["memory_before"][absent])
