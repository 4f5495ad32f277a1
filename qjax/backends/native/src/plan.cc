#include "plan.h"

#include <algorithm>
#include <initializer_list>

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
    work_ = std::min(work_ + std::min(steps_.back()->work(), kMostElements),
                     kMostElements);
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

void Plan::run(const uint8_t* packed, uint8_t* arena, uint8_t* scratch,
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
  for (const Made& step : steps_) step->run(memory);
}

}  // namespace qjax
