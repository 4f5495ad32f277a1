#include "plan.h"

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <thread>

#include "pool.h"

namespace qjax {
namespace {

constexpr int64_t kMostSteps = int64_t{1} << 24;

// Maker of a kind of step.
template <size_t n>
const Entry* find(const Entry (&entries)[n], int64_t kind) {
  for (const Entry& entry : entries) {
    if (entry.kind == kind) return &entry;
  }
  return nullptr;
}

Made make_step(int64_t kind, Words& words, const Maker& maker) {
  for (const Entry* entry : {find(kMoves, kind), find(kElementwise, kind),
                             find(kProducts, kind), find(kMatmul, kind),
                             find(kLookups, kind), find(kNormalisations, kind),
                             find(kTflite, kind), find(kTfliteRows, kind),
                             find(kGathers, kind), find(kContractions, kind)}) {
    if (entry) return entry->make(words, maker);
  }
  throw PlanError("an unknown kind of step");
}

bool is_shared(const Step& step) {
  constexpr int64_t kLeast = int64_t{1} << 22;  // Products.
  return step.is_shared() && step.work() >= kLeast;
}

// Waits for another thread, which is at work.
void wait_for(const std::atomic<int64_t>& count, int64_t wanted) {
  constexpr int kPatience = 1 << 12;
  for (int i = 0; count.load(std::memory_order_acquire) < wanted; ++i) {
    if (i >= kPatience) std::this_thread::yield();
  }
}

// Counts a piece when it ends, if only by an error.
struct Counted {
  std::atomic<int64_t>& count;
  ~Counted() { count.fetch_add(1, std::memory_order_release); }
};

}  // namespace

void Maker::holds(int64_t buffer, const std::vector<int64_t>& sizes, int64_t offset,
                  const std::vector<int64_t>& strides) const {
  if (count_of(sizes) == 0) return;
  const int64_t elements = of(buffer).elements;
  int64_t low = offset, high = offset;
  for (size_t d = 0; d < sizes.size(); ++d) {
    check(-kMostElements <= strides[d] && strides[d] <= kMostElements,
          "a stride is too large");
    const __int128 reach = static_cast<__int128>(sizes[d] - 1) * strides[d];
    check(-kMostElements <= reach && reach <= kMostElements,
          "a step leads outside of a buffer");
    (reach < 0 ? low : high) += static_cast<int64_t>(reach);
  }
  check(0 <= low && high < elements, "a step leads outside of a buffer");
}

Plan::Plan(Words& words, Layout& layout) {
  check(words.next() == kMagic, "this is no plan");
  check(words.next() == kAbi, "the plan is of another version of this library");
  const int64_t n_buffers = words.next(0, kMostSteps, "too many buffers");
  n_inputs_ = words.next(0, kMostSteps, "too many inputs");
  n_outputs_ = words.next(0, kMostSteps, "too many outputs");
  const int64_t n_steps = words.next(0, kMostSteps, "too many steps");
  arena_bytes_ = words.size();
  kept_.resize(static_cast<size_t>(n_buffers));
  for (int64_t i = 0; i < n_buffers; ++i) {
    Buffer buffer{words.dtype(), words.size(), Buffer::kArena, 0};
    buffer.kind =
        static_cast<Buffer::Kind>(words.next(0, 3, "a buffer has an unknown kind"));
    buffer.place = words.size();
    const int64_t bytes = buffer.bytes();
    work_ += buffer.elements / 16;
    switch (buffer.kind) {
      case Buffer::kArena:
        check(buffer.place % kAlignment == 0 && buffer.place <= arena_bytes_ - bytes,
              "a buffer lies outside of the arena");
        break;
      case Buffer::kInput:
        check(buffer.place < n_inputs_, "a buffer is of no input");
        break;
      case Buffer::kOutput:
        check(buffer.place < n_outputs_, "a buffer is of no output");
        break;
      case Buffer::kConstant:
        kept_[static_cast<size_t>(i)] =
            Kept(Maker{buffers_, layout}, buffer.place, bytes);
        break;
    }
    buffers_.push_back(buffer);
  }
  const Maker maker{buffers_, layout};
  for (int64_t i = 0; i < n_steps; ++i) {
    const int64_t kind = words.next();
    Words own = words.part(words.size());
    steps_.push_back(make_step(kind, own, maker));
    own.finish();
    scratch_bytes_ = std::max(scratch_bytes_, steps_.back()->scratch_bytes());
    const int64_t work = std::min(steps_.back()->work(), kMostElements);
    work_ = std::min(work_ + work, kMostElements);
    if (is_shared(*steps_.back())) {
      shared_work_ = std::min(shared_work_ + work, kMostElements);
    }
  }
}

const Buffer& Plan::end(Buffer::Kind kind, int64_t place) const {
  for (const Buffer& buffer : buffers_) {
    if (buffer.kind == kind && buffer.place == place) return buffer;
  }
  throw PlanError("an input or an output has no buffer");
}

int64_t Plan::bytes_of(Buffer::Kind kind, int64_t place) const {
  int64_t found = 0;
  for (const Buffer& buffer : buffers_) {
    if (buffer.kind == kind && buffer.place == place) {
      found = std::max(found, buffer.bytes());
    }
  }
  return found;
}

void Plan::pack(const Constants& constants, uint8_t* packed) const {
  for (const Kept& kept : kept_) kept.pack(constants, packed);
  for (const Made& step : steps_) step->pack(constants, packed);
}

Memory Plan::memory(const uint8_t* packed, uint8_t* arena, uint8_t* scratch,
                    const void* const* inputs, void* const* outputs) const {
  Memory memory{packed, scratch, {}};
  memory.buffers.reserve(buffers_.size());
  for (size_t i = 0; i < buffers_.size(); ++i) {
    const Buffer& buffer = buffers_[i];
    switch (buffer.kind) {
      case Buffer::kArena:
        memory.buffers.push_back(arena + buffer.place);
        break;
      case Buffer::kInput:  // No step writes it: `make_step` takes it as a source.
        memory.buffers.push_back(static_cast<uint8_t*>(
            const_cast<void*>(inputs[buffer.place])));
        break;
      case Buffer::kOutput:
        memory.buffers.push_back(static_cast<uint8_t*>(outputs[buffer.place]));
        break;
      case Buffer::kConstant:
        memory.buffers.push_back(const_cast<uint8_t*>(packed) + kept_[i].place);
        break;
    }
  }
  return memory;
}

void Plan::run(const uint8_t* packed, uint8_t* arena, uint8_t* scratch,
               const void* const* inputs, void* const* outputs) const {
  const Memory own = memory(packed, arena, scratch, inputs, outputs);
  for (const Made& step : steps_) step->run(own);
}

void Plan::run_shared(const uint8_t* packed, uint8_t* arena,
                      const std::vector<uint8_t*>& scratch, const void* const* inputs,
                      void* const* outputs) const {
  const int64_t parts = static_cast<int64_t>(scratch.size());
  std::vector<Memory> own;
  for (uint8_t* place : scratch) {
    own.push_back(memory(packed, arena, place, inputs, outputs));
  }
  struct Piece {
    const Step* step;
    int64_t part, parts, before;  // Pieces of earlier steps.
  };
  std::vector<Piece> pieces;
  for (const Made& step : steps_) {
    const int64_t count = is_shared(*step) ? parts : 1;
    const int64_t before = static_cast<int64_t>(pieces.size());
    for (int64_t i = 0; i < count; ++i) pieces.push_back({step.get(), i, count, before});
  }
  std::atomic<int64_t> done{0};
  share(static_cast<int64_t>(pieces.size()), static_cast<int>(parts), [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    // Pieces are claimed in order: those before are done, or another thread has them.
    wait_for(done, piece.before);
    const Counted counted{done};
    const Memory& place = own[static_cast<size_t>(piece.part)];
    if (piece.parts == 1) {
      piece.step->run(place);
    } else {
      piece.step->run_part(place, piece.part, piece.parts);
    }
  });
}

}  // namespace qjax
