#define MMFAST_ISA baseline
#include "cpu/isa_linear.h"
