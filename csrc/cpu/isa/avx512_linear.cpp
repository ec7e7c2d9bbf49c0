#define MMFAST_ISA avx512
#include "cpu/isa_linear.h"
