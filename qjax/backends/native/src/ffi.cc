// The custom call of XLA, in terms of the functions of api.h.
#include <vector>

#include "api.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// A plan, parsed when the call is made and kept with its executable.
struct Call {
  static ffi::TypeId id;
  void* plan = nullptr;

  explicit Call(void* plan) : plan(plan) {}
  ~Call() { qjax_native_free(plan); }
};
ffi::TypeId Call::id = {};

constexpr int64_t kTextSize = 256;

ffi::Error failed(const char* text) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("qjax: ") + text);
}

ffi::ErrorOr<std::unique_ptr<Call>> make(ffi::Span<const int64_t> words,
                                        ffi::Span<const int64_t> ends, int64_t,
                                        int64_t) {
  char text[kTextSize] = "";
  void* plan = qjax_native_plan(words.begin(), static_cast<int64_t>(words.size()),
                                ends.begin(), static_cast<int64_t>(ends.size()), text,
                                kTextSize);
  if (!plan) return ffi::Unexpected(failed(text));
  return std::make_unique<Call>(plan);
}

ffi::Error run(Call* call, ffi::Span<const int64_t>, ffi::Span<const int64_t>,
               int64_t threads, int64_t times, ffi::RemainingArgs operands,
               ffi::RemainingRets results) {
  std::vector<const void*> inputs;
  std::vector<int64_t> given, made;
  const uint8_t* packed = nullptr;
  int64_t packed_bytes = 0;
  for (size_t i = 0; i < operands.size(); ++i) {
    auto operand = operands.get<ffi::AnyBuffer>(i);
    if (!operand.has_value()) return operand.error();
    if (i == 0) {
      packed = static_cast<const uint8_t*>(operand->untyped_data());
      packed_bytes = static_cast<int64_t>(operand->size_bytes());
    } else {
      inputs.push_back(operand->untyped_data());
      given.push_back(static_cast<int64_t>(operand->size_bytes()));
    }
  }
  if (!packed) return failed("the call has no packed constants");
  std::vector<void*> outputs;
  for (size_t i = 0; i < results.size(); ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!result.has_value()) return result.error();
    outputs.push_back((*result)->untyped_data());
    made.push_back(static_cast<int64_t>((*result)->size_bytes()));
  }
  char text[kTextSize] = "";
  if (qjax_native_check(call->plan, given.data(), static_cast<int64_t>(given.size()),
                        made.data(), static_cast<int64_t>(made.size()), packed_bytes,
                        times, text, kTextSize)) {
    return failed(text);
  }
  if (qjax_native_run_many(call->plan, packed, inputs.data(), outputs.data(), times,
                           static_cast<int>(threads), text, kTextSize)) {
    return failed(text);
  }
  return ffi::Error::Success();
}

}  // namespace

// Exported: hidden visibility is the default of the library.
#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    QjaxNativeInstantiate, make,
    ffi::Ffi::BindInstantiate()
        .Attr<ffi::Span<const int64_t>>("words")
        .Attr<ffi::Span<const int64_t>>("ends")
        .Attr<int64_t>("threads")
        .Attr<int64_t>("times"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(QjaxNativeRun, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<Call>>()
                                  .Attr<ffi::Span<const int64_t>>("words")
                                  .Attr<ffi::Span<const int64_t>>("ends")
                                  .Attr<int64_t>("threads")
                                  .Attr<int64_t>("times")
                                  .RemainingArgs()
                                  .RemainingRets());

// What jax.ffi.register_ffi_type takes.
extern "C" void* QjaxNativeStateId() { return &Call::id; }

extern "C" const void* QjaxNativeStateInfo() {
  static const XLA_FFI_TypeInfo info = ffi::MakeTypeInfo<Call>();
  return &info;
}

#pragma GCC visibility pop
