#define MMFAST_ISA amx
#include "cpu/isa_lookups.h"
