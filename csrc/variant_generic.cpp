// The loops for any processor.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd_generic.h"
#define VPS_VARIANT generic
#include "variant.inc"
