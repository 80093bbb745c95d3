/* One of two translation units: this one holds the implementation. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
