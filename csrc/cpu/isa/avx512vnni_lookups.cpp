#define MMFAST_ISA avx512vnni
#include "cpu/isa_lookups.h"
