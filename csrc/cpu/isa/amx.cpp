#define MMFAST_ISA amx
#include "cpu/isa_kernels.h"
