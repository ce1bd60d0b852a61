// masked_average_pool: the kernels of memory_pass with the read compiled out.
#include "memory_launch.cuh"

namespace pmm {

Workspace masked_average_pool_workspace(Order order, const Call& call) {
    return workspace<false, true>("masked_average_pool", order, call);
}

void masked_average_pool(Order order, const Call& call) { run<false, true>("masked_average_pool", order, call); }

}  // namespace pmm
