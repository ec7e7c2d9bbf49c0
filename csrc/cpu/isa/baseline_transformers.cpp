#define MMFAST_ISA baseline
#include "cpu/isa_transformers.h"
