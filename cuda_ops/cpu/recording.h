// Taking down the kernel calls of a step, to make them again without torch's dispatcher and Python in between.
//
// A recording keeps each call with its arguments, pointers included: it holds as long as what they point to stays
// where it is. What ops make while they are recorded lies in an arena, whose memory is used again and again as tensors
// come and go: by later calls of the recording, which come in the same order at every replay, and by other recordings.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <utility>
#include <vector>

namespace throughline {

// Memory that stays the arena's: taken and given back in pieces of powers of two. For one thread at a time.
class Arena {
 public:
  Arena() = default;
  ~Arena() {
    for (void* piece : pieces_) std::free(piece);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* take(size_t num_bytes) {
    size_t size = kSmallest;
    while (size < num_bytes) size *= 2;
    auto found = free_.lower_bound(size);
    void* piece = found != free_.end() ? found->second : make(size);
    if (found != free_.end()) free_.erase(found);
    return piece;
  }

  void give(void* piece) { free_.emplace(sizes_.at(piece), piece); }

 private:
  static constexpr size_t kSmallest = 128;

  void* make(size_t size) {
    void* piece = std::aligned_alloc(kSmallest, size);
    if (piece == nullptr) throw std::bad_alloc();
    pieces_.push_back(piece);
    sizes_[piece] = size;
    return piece;
  }

  std::vector<void*> pieces_;
  std::map<void*, size_t> sizes_;
  std::multimap<size_t, void*> free_;
};

class Recording {
 public:
  using Step = std::function<void(int64_t num_threads)>;

  explicit Recording(std::shared_ptr<Arena> arena) : arena_(std::move(arena)) {}

  void add(Step step) { steps_.push_back(std::move(step)); }

  // What is looked at before kernels follow it; once a recording, however many calls read the same.
  void add_check(std::pair<const void*, const void*> read, std::function<void()> check) {
    if (checked_.insert(read).second) add([check = std::move(check)](int64_t) { check(); });
  }

  // The op that runs does something else beside its calls, so they are not all that there is to it.
  void refuse() { is_refused_ = true; }
  bool take_refusal() { return std::exchange(is_refused_, false); }

  int64_t size() const { return static_cast<int64_t>(steps_.size()); }
  void truncate(int64_t size) {
    steps_.resize(size);
    checked_.clear();  // some of them may have gone
  }

  void replay(int64_t begin, int64_t end, int64_t num_threads) const {
    for (int64_t i = begin; i < end; ++i) steps_[i](num_threads);
  }

  torch::stable::Tensor make(
      const torch::stable::Tensor& like, const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type,
      int64_t element_bytes) const {
    std::vector<int64_t> strides(sizes.size());
    int64_t count = 1;
    for (size_t axis = sizes.size(); axis-- > 0; count *= sizes[axis]) strides[axis] = count;
    void* memory = arena_->take(count * element_bytes);
    auto give = [arena = arena_](void* piece) { arena->give(piece); };
    return torch::stable::from_blob(memory, sizes, strides, like.device(), type, give);
  }

 private:
  std::shared_ptr<Arena> arena_;
  std::vector<Step> steps_;
  std::set<std::pair<const void*, const void*>> checked_;
  bool is_refused_ = false;
};

// Of the thread that records; null where none does.
inline thread_local Recording* recording = nullptr;

}  // namespace throughline
