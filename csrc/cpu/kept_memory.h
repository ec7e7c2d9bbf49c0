// Memory of tensors that died, kept for the next ones. The first write to a page that is not there
// takes the system a microsecond for 4 KiB, more than most kernels need for them, and the C library
// hands large pieces back to the system whenever they are freed.
#pragma once
#include <cstdint>

namespace mmfast {

// From how many bytes on memory is worth keeping.
constexpr int64_t least_kept = 256 << 10;

// Memory of at least this many bytes, which starts with a cache line; null where none is kept, or
// there is no more.
void* take_memory(int64_t bytes);
// What take_memory returned.
void give_memory(void* memory);

// Gives all that is kept back to the system.
void release_kept_memory();
int64_t kept_bytes();

}  // namespace mmfast
