// memory_read: the kernels of memory_pass with the pooling compiled out.
#include "memory_launch.cuh"

namespace pmm {

Workspace memory_read_workspace(Order order, const Call& call) {
    return workspace<true, false>("memory_read", order, call);
}

void memory_read(Order order, const Call& call) { run<true, false>("memory_read", order, call); }

}  // namespace pmm
