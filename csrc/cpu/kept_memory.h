// Memory of tensors that died, kept for the next ones. The first write to a page that is not there
// takes the system a microsecond for 4 KiB, more than most kernels need for them, and the C library
// hands large pieces back to the system whenever they are freed.
#pragma once
#include <cstdint>

namespace mmfast {

// From how many bytes on memory is worth keeping.
constexpr int64_t least_kept = 1 << 18;

// Memory of at least this many bytes, which starts with a cache line; null when there is none.
void* take_memory(int64_t bytes);
// What take_memory returned, to be kept or given back to the system.
void give_memory(void* memory);

// Gives all that is kept back to the system.
void release_kept_memory();
int64_t kept_bytes();
// At most this many bytes stay kept.
int64_t most_kept_bytes();

}  // namespace mmfast
