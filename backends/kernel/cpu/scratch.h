// Memory of one thread, kept from call to call.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  char* reserve(int64_t nbytes) {
    if (nbytes <= capacity_) return memory_;
    std::free(memory_);
    capacity_ = 0;
    const int64_t rounded = (nbytes + 4095) / 4096 * 4096;
    memory_ = static_cast<char*>(std::aligned_alloc(4096, size_t(rounded)));
    if (!memory_) throw std::bad_alloc();
    capacity_ = rounded;
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  int64_t capacity_ = 0;
};
