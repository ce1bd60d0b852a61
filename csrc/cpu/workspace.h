// Scratch memory is one block that the caller allocates, so that it is counted where tensors are counted.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pmm::PMM_ISA {

// Hands out pieces of a block.  Without a block it only adds up how large one must be, so that the same code that lays
// the scratch out also measures it.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = block_ ? block_ + used_ : nullptr;
    // whole cache lines: threads write side by side
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

}  // namespace pmm::PMM_ISA
