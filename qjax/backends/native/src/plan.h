// A plan: the steps that compute an integer graph, read from words of 64 bits.
//
// Python makes the words and one block of constants (qjax/backends/native/plan.py). A
// plan is parsed once, packs the constants for the instruction set of this machine, and
// runs any number of times, in any number of threads. Nothing is trusted: a word that
// would lead outside of a buffer is an error when the plan is parsed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace qjax {

constexpr int64_t kMagic = 0x716a6178;
// Plans and packed constants of other numbers are refused.
constexpr int64_t kAbi = 3;
constexpr int64_t kAlignment = 64;
// Kernels may read this many bytes past the codes they need.
constexpr int64_t kSlack = 64;
constexpr int64_t kMostElements = int64_t{1} << 40;

struct PlanError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(bool holds, const char* wanted) {
  if (!holds) throw PlanError(wanted);
}

enum class Dtype : int64_t { kInt8, kUint8, kInt16, kUint16, kInt32 };

// n, filled up to whole units.
inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kInt8:
    case Dtype::kUint8:
      return 1;
    case Dtype::kInt16:
    case Dtype::kUint16:
      return 2;
    case Dtype::kInt32:
      return 4;
  }
  return 0;
}

// Calls `use` with a null pointer to the C type of a dtype.
template <class Use>
void with_type(Dtype dtype, Use&& use) {
  switch (dtype) {
    case Dtype::kInt8:
      return use(static_cast<int8_t*>(nullptr));
    case Dtype::kUint8:
      return use(static_cast<uint8_t*>(nullptr));
    case Dtype::kInt16:
      return use(static_cast<int16_t*>(nullptr));
    case Dtype::kUint16:
      return use(static_cast<uint16_t*>(nullptr));
    case Dtype::kInt32:
      return use(static_cast<int32_t*>(nullptr));
  }
}

template <class Pointer>
using Pointee = std::remove_cv_t<std::remove_pointer_t<Pointer>>;

// Reads words in order, within their end.
class Words {
 public:
  Words(const int64_t* at, int64_t count) : at_(at), end_(at + count) {}

  int64_t left() const { return end_ - at_; }
  int64_t next() {
    check(at_ < end_, "the plan ends too early");
    return *at_++;
  }
  int64_t next(int64_t low, int64_t high, const char* wanted) {
    const int64_t found = next();
    check(low <= found && found <= high, wanted);
    return found;
  }
  int64_t size() { return next(0, kMostElements, "a size must be 0 or more"); }
  int32_t int32() {
    return static_cast<int32_t>(
        next(INT32_MIN, INT32_MAX, "an integer must fit 32 bits"));
  }
  bool flag() { return next(0, 1, "a flag must be 0 or 1") != 0; }
  Dtype dtype() { return static_cast<Dtype>(next(0, 4, "a dtype must be 0 to 4")); }
  std::vector<int64_t> list(int64_t count) {
    check(0 <= count && count <= left(), "the plan ends too early");
    std::vector<int64_t> found(at_, at_ + count);
    at_ += count;
    return found;
  }
  Words part(int64_t count) {
    check(0 <= count && count <= left(), "the plan ends too early");
    Words found(at_, count);
    at_ += count;
    return found;
  }
  void finish() const { check(at_ == end_, "a step has words too many"); }

 private:
  const int64_t* at_;
  const int64_t* end_;
};

// Product of sizes, or an error beyond what any memory holds.
inline int64_t count_of(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (int64_t n : sizes) {
    check(0 <= n && n <= kMostElements, "a size must be 0 or more");
    if (n == 0) return 0;
  }
  for (int64_t n : sizes) {
    check(count <= kMostElements / n, "a shape is too large");
    count *= n;
  }
  return count;
}

struct Buffer {
  enum Kind : int64_t { kArena, kInput, kOutput, kConstant };
  Dtype dtype;
  int64_t elements;
  Kind kind;
  int64_t place;

  int64_t bytes() const { return elements * size_of(dtype); }
};

// Gives places in the packed constants.
class Layout {
 public:
  int64_t reserve(int64_t bytes) {
    check(0 <= bytes && bytes <= kMostElements, "constants are too large");
    const int64_t place = size_;
    size_ += (bytes + kSlack + kAlignment - 1) / kAlignment * kAlignment;
    return place;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 2 * kAlignment;  // The header.
};

// The constants as Python gives them.
struct Constants {
  const uint8_t* data;
  int64_t size;

  template <class T>
  const T* at(int64_t place, int64_t count) const {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    check(place >= 0 && bytes >= 0 && place <= size - bytes && place % sizeof(T) == 0,
          "a constant lies outside of the block of constants");
    return reinterpret_cast<const T*>(data + place);
  }
};

// Replaces objects by the addresses that they hold `head` bytes from their beginning.
inline void find_data(void** ends, int64_t count, int64_t head) {
  for (int64_t i = 0; head > 0 && i < count; ++i) {
    ends[i] = *reinterpret_cast<void**>(static_cast<uint8_t*>(ends[i]) + head);
  }
}

// Where the buffers of one run are.
struct Memory {
  const uint8_t* packed;
  uint8_t* scratch;  // For one step, of the size that the plan's steps ask for.
  std::vector<uint8_t*> buffers;

  template <class T>
  T* as(int64_t buffer) const {
    return reinterpret_cast<T*>(buffers[static_cast<size_t>(buffer)]);
  }
};

class Plan;

// What steps are made with: the buffers of the plan and the places of its constants.
struct Maker {
  const std::vector<Buffer>& buffers;
  Layout& layout;

  int64_t buffer(Words& words) const {
    return words.next(0, static_cast<int64_t>(buffers.size()) - 1,
                      "a step must name a buffer of the plan");
  }
  const Buffer& of(int64_t buffer) const {
    return buffers[static_cast<size_t>(buffer)];
  }
  void holds(int64_t buffer, int64_t count) const {
    check(of(buffer).elements >= count, "a step leads outside of a buffer");
  }
  void holds(int64_t buffer, Dtype dtype, int64_t count) const {
    check(of(buffer).dtype == dtype, "a buffer has another type than its step writes");
    holds(buffer, count);
  }
  // Checks that strided places lie inside of a buffer.
  void holds(int64_t buffer, const std::vector<int64_t>& sizes, int64_t offset,
             const std::vector<int64_t>& strides) const;
};

class Step {
 public:
  virtual ~Step() = default;
  virtual void pack(const Constants&, uint8_t* /*packed*/) const {}
  virtual void run(const Memory& memory) const = 0;
  virtual int64_t scratch_bytes() const { return 0; }
  // Whether threads may compute parts of what it writes at once, each with scratch.
  virtual bool is_shared() const { return false; }
  virtual void run_part(const Memory& memory, int64_t, int64_t) const { run(memory); }
  // Products, about: what a step costs.
  virtual int64_t work() const { return 0; }
  virtual std::string explain(const uint8_t* /*packed*/) const { return ""; }
};

using Made = std::unique_ptr<Step>;

// Constants that are kept as they are.
struct Kept {
  int64_t from = 0, place = 0, bytes = 0;

  Kept() = default;
  Kept(const Maker& maker, int64_t from, int64_t bytes)
      : from(from), place(maker.layout.reserve(bytes)), bytes(bytes) {}
  void pack(const Constants& constants, uint8_t* packed) const {
    if (bytes) {
      std::memcpy(packed + place, constants.at<uint8_t>(from, bytes),
                  static_cast<size_t>(bytes));
    }
  }
  template <class T>
  const T* in(const Memory& memory) const {
    return reinterpret_cast<const T*>(memory.packed + place);
  }
};

class Plan {
 public:
  // Reads a plan. `layout` is shared with the plans inside of its steps.
  Plan(Words& words, Layout& layout);

  void pack(const Constants& constants, uint8_t* packed) const;
  // Runs with an arena and scratch of at least the sizes below.
  void run(const uint8_t* packed, uint8_t* arena, uint8_t* scratch,
           const void* const* inputs, void* const* outputs) const;
  // As `run`, in as many threads at most as there is scratch for: large steps in parts,
  // one step after the other.
  void run_shared(const uint8_t* packed, uint8_t* arena,
                  const std::vector<uint8_t*>& scratch, const void* const* inputs,
                  void* const* outputs) const;

  int64_t arena_bytes() const { return arena_bytes_; }
  int64_t scratch_bytes() const { return scratch_bytes_; }
  int64_t inputs() const { return n_inputs_; }
  int64_t outputs() const { return n_outputs_; }
  int64_t work() const { return work_; }
  int64_t shared_work() const { return shared_work_; }  // Of steps that are shared.
  const std::vector<Made>& steps() const { return steps_; }
  // The buffer of an input or an output.
  const Buffer& end(Buffer::Kind kind, int64_t place) const;
  // Its bytes; 0 for one that nothing reads or writes.
  int64_t bytes_of(Buffer::Kind kind, int64_t place) const;

 private:
  Memory memory(const uint8_t* packed, uint8_t* arena, uint8_t* scratch,
                const void* const* inputs, void* const* outputs) const;

  std::vector<Buffer> buffers_;
  std::vector<Kept> kept_;  // Constants that are buffers, by buffer.
  std::vector<Made> steps_;
  int64_t n_inputs_ = 0, n_outputs_ = 0, arena_bytes_ = 0, scratch_bytes_ = 0;
  int64_t work_ = 0, shared_work_ = 0;
};

// A kind of step, by its number in plans, and what makes it.
struct Entry {
  int64_t kind;
  Made (*make)(Words&, const Maker&);
};

template <class Kind>
Made make(Words& words, const Maker& maker) {
  return std::make_unique<Kind>(words, maker);
}

// The kinds of the single files.
extern const Entry kMoves[4], kElementwise[8], kProducts[1], kMatmul[1], kLookups[7], kTflite[3];
extern const Entry kNormalisations[3];
extern const Entry kGathers[3], kTfliteRows[4], kContractions[1];

}  // namespace qjax
