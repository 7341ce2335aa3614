// Arenas and recordings for Python, as handles; none is for two threads at once. See recording.h.
#include "recording.h"

#include <exception>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

using ArenaHandle = std::shared_ptr<throughline::Arena>;

EXPORT void* throughline_cpu_arena_new() { return new ArenaHandle(std::make_shared<throughline::Arena>()); }
EXPORT void throughline_cpu_arena_free(void* arena) { delete static_cast<ArenaHandle*>(arena); }

// Null where there is no memory.
EXPORT void* throughline_cpu_arena_take(void* arena, int64_t num_bytes) {
  try {
    return (*static_cast<ArenaHandle*>(arena))->take(num_bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
EXPORT void throughline_cpu_arena_give(void* arena, void* piece) { (*static_cast<ArenaHandle*>(arena))->give(piece); }

EXPORT void* throughline_cpu_recording_new(void* arena) {
  return new throughline::Recording(*static_cast<ArenaHandle*>(arena));
}
EXPORT void throughline_cpu_recording_free(void* recording) { delete static_cast<throughline::Recording*>(recording); }

// From here on this thread's calls are taken down; null ends that.
EXPORT void throughline_cpu_record(void* recording) {
  throughline::recording = static_cast<throughline::Recording*>(recording);
}
EXPORT int64_t throughline_cpu_recording_size(void* recording) {
  return static_cast<throughline::Recording*>(recording)->size();
}

// Whether all that was done since `size` is in the recording; where not, those calls are dropped from it.
EXPORT bool throughline_cpu_recording_keeps(void* recording, int64_t size) {
  auto* calls = static_cast<throughline::Recording*>(recording);
  if (!calls->take_refusal() && calls->size() > size) return true;
  calls->truncate(size);
  return false;
}

// Makes the calls of [begin, end) again. Null, or what was wrong with what they read; lives until the next failure.
EXPORT const char* throughline_cpu_replay(void* recording, int64_t begin, int64_t end, int64_t num_threads) {
  static thread_local std::string problem;
  try {
    static_cast<const throughline::Recording*>(recording)->replay(begin, end, num_threads);
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}
