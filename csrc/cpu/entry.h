// The entry points of one instruction set.
#pragma once

#include <omp.h>

#include "args.h"

namespace pmm::PMM_ISA {

inline int thread_number() { return omp_get_thread_num(); }

int64_t pass_workspace(const PassArgs&);
bool pass(const PassArgs&);
int64_t loss_workspace(const LossArgs&);
bool loss(const LossArgs&);
int64_t photometric_workspace(const PhotometricArgs&);
void photometric(const PhotometricArgs&);
int64_t merge_workspace(const MergeArgs&);
void merge_tiles(const MergeArgs&);
void resized_crop(const CropArgs&);

}  // namespace pmm::PMM_ISA
