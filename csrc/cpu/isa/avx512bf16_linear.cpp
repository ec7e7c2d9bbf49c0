#define MMFAST_ISA avx512bf16
#include "cpu/isa_linear.h"
