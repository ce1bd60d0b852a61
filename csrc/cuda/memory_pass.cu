// memory_pass: one tensor that is read and pooled; of two tensors each half is a call of its operator.
#include "memory_launch.cuh"

namespace pmm {

Workspace memory_pass_workspace(Order order, const Call& call) {
    return workspace<true, true>("memory_pass", order, call);
}

void memory_pass(Order order, const Call& call) { run<true, true>("memory_pass", order, call); }

}  // namespace pmm
