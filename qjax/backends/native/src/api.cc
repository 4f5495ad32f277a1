#include "api.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>

#include "ends.h"
#include "kernels.h"
#include "plan.h"
#include "pool.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace qjax {
namespace {

#if defined(__x86_64__) || defined(__i386__)
// AVX-VNNI has no name in `__builtin_cpu_supports` of GCC 12.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  return (a >> 4) & 1;
}
#endif

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// Whether there are tiles of bytes, and the kernel of the system lets this process use
// them: it must ask once, for all of its threads.
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!((d >> 24) & 1) || !((d >> 25) & 1)) return false;
#if defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM.
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool runs_here(const Kernels& set) {
  const std::string name = set.name;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");
  if (name == "avx2") return avx2;
  if (name == "avx_vnni") return avx2 && has_avx_vnni();
#ifdef QJAX_SIMDE
  if (name == "avx512_vnni" || name == "amx_int8") return true;
#endif
#if defined(__x86_64__)
  if (name == "avx512_vnni") return has_avx512();
  if (name == "amx_int8") return has_amx();
#endif
#endif
#if defined(__aarch64__) && defined(__linux__)
  if (name == "neon_dot") return (getauxval(AT_HWCAP) >> 20) & 1;
#elif defined(__aarch64__) && defined(__APPLE__)
  if (name == "neon_dot") return true;  // From the first Mac on.
#endif
  return name == "portable";
}

// The sets of this build, the fastest first.
const Kernels* const kSets[] = {
#ifdef QJAX_AMX_INT8
    &kAmxInt8,
#endif
#ifdef QJAX_AVX512_VNNI
    &kAvx512Vnni,
#endif
#ifdef QJAX_AVX_VNNI
    &kAvxVnni,
#endif
#ifdef QJAX_AVX2
    &kAvx2,
#endif
#ifdef QJAX_NEON_DOT
    &kNeonDot,
#endif
    &kPortable,
};

const Kernels* find(const char* wanted) {
  for (const Kernels* set : kSets) {
    const bool is_wanted = !wanted || !*wanted || set->name == std::string(wanted);
    if (is_wanted && runs_here(*set)) return set;
  }
  return nullptr;
}

const Kernels*& chosen() {
  static const Kernels* set = find(std::getenv("QJAX_NATIVE_ISA"));
  return set;
}

// A number of the words, so that packed constants of another plan are known.
uint64_t mark(const int64_t* words, int64_t n) {
  uint64_t hash = 1469598103934665603u;
  for (int64_t i = 0; i < n; ++i) {
    hash = (hash ^ static_cast<uint64_t>(words[i])) * 1099511628211u;
    hash ^= hash >> 29;
  }
  return hash;
}

struct Header {
  int64_t abi;
  uint64_t mark;
  char isa[32];
};
static_assert(sizeof(Header) <= 2 * kAlignment);

// Bytes of this machine's memory, or the most that there are.
int64_t memory_bytes() {
#if defined(_SC_PHYS_PAGES) && defined(_SC_PAGESIZE)
  const int64_t pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
  if (pages > 0 && size > 0 && pages <= INT64_MAX / size) return pages * size;
#endif
  return INT64_MAX;
}

// A plan with the memory of its runs: one block for each that is under way.
class Runner {
 public:
  Runner(const int64_t* words, int64_t n, const int64_t* ends = nullptr,
         int64_t n_ends = 0)
      : set_(kernels()), mark_(mark(words, n)) {
    Words all(words, n), own(ends, n_ends);
    plan_ = std::make_unique<Plan>(all, layout_);
    all.finish();
    inputs_ = ends_of(own, *plan_, Buffer::kInput);
    outputs_ = ends_of(own, *plan_, Buffer::kOutput);
    own.finish();
    for (const auto* side : {&inputs_, &outputs_}) {
      for (const End& end : *side) {
        has_reals_ = has_reals_ || end.is_real();
        staged_bytes_ += end.staged_bytes();
      }
    }
    check(block_bytes() <= memory_bytes(),
          "its values need more memory than this machine has; run fewer examples");
    blocks_.reserve(kMostBlocks);
  }
  ~Runner() {
    for (void* block : blocks_) std::free(block);
  }

  int64_t packed_bytes() const { return layout_.size(); }

  void pack(const Constants& constants, uint8_t* packed) const {
    Header header{kAbi, mark_, {}};
    std::snprintf(header.isa, sizeof(header.isa), "%s", set_.name);
    std::memcpy(packed, &header, sizeof(header));
    plan_->pack(constants, packed);
  }

  void check_packed(const uint8_t* packed) const {
    Header header;
    std::memcpy(&header, packed, sizeof(header));
    check(header.abi == kAbi && header.mark == mark_,
          "the packed constants are of another plan, or of another version");
    header.isa[sizeof(header.isa) - 1] = 0;
    check(header.isa == std::string(set_.name),
          "the packed constants are for another instruction set");
  }

  void check_ends(const int64_t* inputs, int64_t n_inputs, const int64_t* outputs,
                  int64_t n_outputs, int64_t packed, int64_t times) const {
    check(n_inputs == plan_->inputs() && n_outputs == plan_->outputs(),
          "the plan has another number of inputs or outputs");
    check(packed >= packed_bytes(), "the packed constants are too few");
    check(times >= 0, "a number of examples must not be negative");
    const auto fits = [&](int64_t own, int64_t given) {
      check(own == 0 || given / own >= times, "the plan has larger inputs or outputs");
    };
    for (int64_t i = 0; i < n_inputs; ++i) fits(inputs_[i].bytes(), inputs[i]);
    for (int64_t i = 0; i < n_outputs; ++i) fits(outputs_[i].bytes(), outputs[i]);
  }

  std::string explain(const uint8_t* packed, int64_t step) const {
    check(0 <= step && step < static_cast<int64_t>(plan_->steps().size()),
          "the plan has no such step");
    return plan_->steps()[static_cast<size_t>(step)]->explain(packed);
  }

  // Runs examples one by one, so that each stays in the cache, in pieces of several.
  void run_many(const uint8_t* packed, const void* const* inputs, void* const* outputs,
                int64_t times, int threads) {
    check(times >= 0, "a number of examples must not be negative");
    check_packed(packed);
    const int64_t own = std::max<int64_t>(plan_->work(), 1);
    const int64_t least = up(kLeastWork, own) / own;  // Examples of a piece.
    const int64_t pieces =
        std::min<int64_t>(4 * static_cast<int64_t>(std::max(threads, 1)), times / least);
    if (times == 1) {
      const int64_t parts = std::min<int64_t>(threads, plan_->shared_work() / kLeastWork);
      return examples(packed, inputs, outputs, 0, 1, parts);
    }
    if (threads <= 1 || pieces <= 1) return examples(packed, inputs, outputs, 0, times);
    share(pieces, threads, [&](int64_t i) {
      examples(packed, inputs, outputs, times * i / pieces, times * (i + 1) / pieces);
    });
  }

 private:
  // About 100 microseconds: less is not worth a second thread.
  static constexpr int64_t kLeastWork = 5000000;
  static constexpr size_t kMostBlocks = 64;  // That are kept.

  void examples(const uint8_t* packed, const void* const* inputs, void* const* outputs,
                int64_t first, int64_t last, int64_t parts = 1) {
    if (first >= last) return;
    const Block block(*this);
    std::vector<std::unique_ptr<Block>> more;  // Their scratch, for other threads.
    std::vector<uint8_t*> scratch{static_cast<uint8_t*>(block.memory) + arena_bytes()};
    for (int64_t i = 1; i < parts; ++i) {
      more.push_back(std::make_unique<Block>(*this));
      scratch.push_back(static_cast<uint8_t*>(more.back()->memory) + arena_bytes());
    }
    uint8_t* arena = static_cast<uint8_t*>(block.memory);
    std::vector<const void*> from(inputs_.size());
    std::vector<void*> to(outputs_.size());
    for (int64_t i = first; i < last; ++i) {
      uint8_t* staged = arena + arena_bytes() + scratch_bytes();
      for (size_t k = 0; k < inputs_.size(); ++k) {
        from[k] = static_cast<const uint8_t*>(inputs[k]) + i * inputs_[k].bytes();
        if (!inputs_[k].is_real()) continue;
        inputs_[k].quantize(set_, from[k], staged);
        from[k] = staged;
        staged += inputs_[k].staged_bytes();
      }
      for (size_t k = 0; k < outputs_.size(); ++k) {
        to[k] = static_cast<uint8_t*>(outputs[k]) + i * outputs_[k].bytes();
        if (!outputs_[k].is_real()) continue;
        to[k] = staged;
        staged += outputs_[k].staged_bytes();
      }
      if (parts > 1) {
        plan_->run_shared(packed, arena, scratch, from.data(), to.data());
      } else {
        plan_->run(packed, arena, scratch[0], from.data(), to.data());
      }
      if (has_reals_) dequantize(to.data(), outputs, i);
    }
  }

  void dequantize(const void* const* codes, void* const* outputs, int64_t i) const {
    for (size_t k = 0; k < outputs_.size(); ++k) {
      if (!outputs_[k].is_real()) continue;
      uint8_t* real = static_cast<uint8_t*>(outputs[k]) + i * outputs_[k].bytes();
      outputs_[k].dequantize(set_, codes[k], real);
    }
  }

  // The memory of one run, given back at its end.
  struct Block {
    explicit Block(Runner& runner) : runner(runner), memory(runner.checkout()) {}
    ~Block() { runner.give_back(memory); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    Runner& runner;
    void* const memory;
  };

  int64_t arena_bytes() const { return up(plan_->arena_bytes() + kSlack, kAlignment); }
  int64_t scratch_bytes() const {
    return up(plan_->scratch_bytes() + 3 * kAlignment, kAlignment);
  }
  int64_t block_bytes() const { return arena_bytes() + scratch_bytes() + staged_bytes_; }
  // The lock is tried, never waited for: the child of a fork may find it taken by a
  // thread that it does not have. It then lives without the blocks that are kept.
  void* checkout() {
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock.owns_lock() && !blocks_.empty()) {
        void* block = blocks_.back();
        blocks_.pop_back();
        return block;
      }
    }
    void* block =
        std::aligned_alloc(kAlignment, static_cast<size_t>(block_bytes()));
    if (!block) throw std::bad_alloc();
    return block;
  }
  void give_back(void* block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock() && blocks_.size() < kMostBlocks) {
      blocks_.push_back(block);  // Takes no memory: nothing catches what this throws.
    } else {
      std::free(block);
    }
  }

  const Kernels& set_;
  uint64_t mark_;
  Layout layout_;
  std::unique_ptr<Plan> plan_;
  std::mutex mutex_;
  std::vector<void*> blocks_;
  std::vector<End> inputs_, outputs_;
  int64_t staged_bytes_ = 0;  // Codes of real inputs and outputs.
  bool has_reals_ = false;
};

void say(const char* text, char* error, int64_t size) {
  if (error && size > 0) std::snprintf(error, static_cast<size_t>(size), "%s", text);
}

// Runs what may throw; returns `failed` and the text of an error.
template <class Result, class Work>
Result guarded(Result failed, char* error, int64_t size, Work&& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    say("there is not enough memory", error, size);
  } catch (const std::exception& problem) {
    say(problem.what(), error, size);
  }
  return failed;
}

}  // namespace

const Kernels& kernels() {
  check(chosen() != nullptr, "QJAX_NATIVE_ISA names no instruction set of this machine");
  return *chosen();
}

}  // namespace qjax

extern "C" {

const char* qjax_native_version(void) {
  static const std::string text = std::to_string(qjax::kAbi);
  return text.c_str();
}

const char* qjax_native_isa(void) {
  return qjax::chosen() ? qjax::chosen()->name : "";
}

int qjax_native_set_isa(const char* name) {
  const qjax::Kernels* found = qjax::find(name);
  if (!found) return -1;
  qjax::chosen() = found;
  return 0;
}

int64_t qjax_native_pack_size(const int64_t* words, int64_t n, char* error,
                              int64_t error_size) {
  return qjax::guarded<int64_t>(-1, error, error_size, [&] {
    return qjax::Runner(words, n).packed_bytes();
  });
}

int qjax_native_pack(const int64_t* words, int64_t n, const uint8_t* constants,
                     int64_t constants_size, uint8_t* packed, char* error,
                     int64_t error_size) {
  return qjax::guarded<int>(-1, error, error_size, [&] {
    qjax::Runner(words, n).pack({constants, constants_size}, packed);
    return 0;
  });
}

void* qjax_native_plan(const int64_t* words, int64_t n, const int64_t* ends,
                       int64_t n_ends, char* error, int64_t error_size) {
  return qjax::guarded<void*>(nullptr, error, error_size, [&]() -> void* {
    return new qjax::Runner(words, n, ends, n_ends);
  });
}

void qjax_native_free(void* plan) { delete static_cast<qjax::Runner*>(plan); }

int qjax_native_check(const void* plan, const int64_t* inputs, int64_t n_inputs,
                      const int64_t* outputs, int64_t n_outputs, int64_t packed,
                      int64_t times, char* error, int64_t error_size) {
  return qjax::guarded<int>(-1, error, error_size, [&] {
    static_cast<const qjax::Runner*>(plan)->check_ends(inputs, n_inputs, outputs,
                                                       n_outputs, packed, times);
    return 0;
  });
}

int qjax_native_run_many(const void* plan, const uint8_t* packed,
                         const void* const* inputs, void* const* outputs,
                         int64_t times, int threads, char* error, int64_t error_size) {
  return qjax::guarded<int>(-1, error, error_size, [&] {
    auto* runner = static_cast<qjax::Runner*>(const_cast<void*>(plan));
    runner->run_many(packed, inputs, outputs, times, threads);
    return 0;
  });
}

int qjax_native_run(const QjaxNativeRuns* runs, void** ends) {
  qjax::find_data(ends, runs->inputs + runs->outputs, runs->head);
  return qjax_native_run_many(runs->plan, runs->packed, ends, ends + runs->inputs,
                              runs->times, static_cast<int>(runs->threads), nullptr, 0);
}

int qjax_native_run_pair(const QjaxNativeRuns* runs, void* input, void* output) {
  void* ends[] = {input, output};
  return qjax_native_run(runs, ends);
}

int64_t qjax_native_peak(int64_t rounds) {
  return qjax::chosen() ? qjax::chosen()->peak(rounds) : -1;
}

const char* qjax_native_explain(void* plan, const uint8_t* packed, int64_t step) {
  thread_local std::string text;
  text = qjax::guarded<std::string>("", nullptr, 0, [&] {
    return static_cast<qjax::Runner*>(plan)->explain(packed, step);
  });
  return text.c_str();
}
}
