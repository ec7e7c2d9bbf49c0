#define MMFAST_ISA avx2
#include "cpu/isa_transformers.h"
