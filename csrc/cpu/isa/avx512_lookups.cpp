#define MMFAST_ISA avx512
#include "cpu/isa_lookups.h"
