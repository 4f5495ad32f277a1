// The functions that Python and XLA call.
#pragma once

#include <cstdint>

#define QJAX_EXPORT __attribute__((visibility("default")))

extern "C" {

QJAX_EXPORT const char* qjax_native_version(void);
QJAX_EXPORT const char* qjax_native_isa(void);
QJAX_EXPORT int qjax_native_set_isa(const char* name);
QJAX_EXPORT int64_t qjax_native_pack_size(const int64_t* words, int64_t n, char* error,
                              int64_t error_size);
// Packs into zeros: what a plan does not fill stays as it is, and untouched memory of a
// plan that is refused costs nothing.
QJAX_EXPORT int qjax_native_pack(const int64_t* words, int64_t n, const uint8_t* constants,
                     int64_t constants_size, uint8_t* packed, char* error,
                     int64_t error_size);
// Words of ends say which inputs and outputs are real values (ends.h); without any all
// are codes.
QJAX_EXPORT void* qjax_native_plan(const int64_t* words, int64_t n, const int64_t* ends,
                                   int64_t n_ends, char* error, int64_t error_size);
QJAX_EXPORT void qjax_native_free(void* plan);
// Checks the bytes of all inputs, of all outputs and of the packed constants of
// `times` examples: nothing else says how large the memory of a run is.
QJAX_EXPORT int qjax_native_check(const void* plan, const int64_t* inputs, int64_t n_inputs,
                      const int64_t* outputs, int64_t n_outputs, int64_t packed,
                      int64_t times, char* error, int64_t error_size);
// Runs `times` examples of a plan of one, which lie behind each other.
QJAX_EXPORT int qjax_native_run_many(const void* plan, const uint8_t* packed,
                                     const void* const* inputs, void* const* outputs,
                                     int64_t times, int threads, char* error,
                                     int64_t error_size);
// What all calls of a plan share. `head` is how far into the objects that are called
// ends the addresses of their data lie; 0 if the ends are addresses of data.
struct QjaxNativeRuns {
  const void* plan;
  const uint8_t* packed;
  int64_t inputs, outputs, times, threads, head;
};
// As `run_many`, which has the text of an error. `ends` are the inputs, then the
// outputs, and are addresses of data afterwards.
QJAX_EXPORT int qjax_native_run(const QjaxNativeRuns* runs, void** ends);
// As `run`, of a plan with one input and one output.
QJAX_EXPORT int qjax_native_run_pair(const QjaxNativeRuns* runs, void* input,
                                     void* output);
// Adds up products of registers in the set in use; returns how many, -1 without a set.
QJAX_EXPORT int64_t qjax_native_peak(int64_t rounds);
QJAX_EXPORT const char* qjax_native_explain(void* plan, const uint8_t* packed, int64_t step);
}
