// What a thread reads next, brought into its caches beside its present work: where that waits for arithmetic, memory
// would be idle, and the hardware's own prefetching stops at the end of a tensor.
#pragma once

#include <cstdint>

namespace adalora::cpu {

// Always inline: what one instruction set compiles must never stand in for another's.
class Ahead {
 public:
  Ahead() = default;
  // Two ranges of so many bytes each; the second may be null.
  [[gnu::always_inline]] Ahead(const void* first, const void* second, int64_t bytes)
      : at_(static_cast<const char*>(first)),
        end_(at_ + bytes),
        then_(static_cast<const char*>(second)),
        bytes_(bytes) {}
  // In how many steps to bring them.
  [[gnu::always_inline]] void pace(int64_t steps) {
    const int64_t lines = (then_ == nullptr ? 1 : 2) * ((bytes_ + kLine - 1) / kLine);
    quota_ = (lines + steps) / (steps + 1) * kLine;
  }
  [[gnu::always_inline]] void step() {
    if (at_ == end_) return;
    const char* stop = end_ - at_ > quota_ ? at_ + quota_ : end_;
    for (; at_ < stop; at_ += kLine) __builtin_prefetch(at_);
    at_ = stop;
    if (at_ == end_ && then_ != nullptr) {
      at_ = then_;
      end_ = at_ + bytes_;
      then_ = nullptr;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *at_ = nullptr, *end_ = nullptr, *then_ = nullptr;
  int64_t bytes_ = 0, quota_ = 0;
};

}  // namespace adalora::cpu
