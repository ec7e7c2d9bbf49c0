#define MMFAST_ISA avx2
#include "cpu/isa_linear.h"
