/* The whole library in one translation unit, with nothing included before it: what most hosts do. `make matrix` compiles
   this with every compiler, standard and switch. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "dsv3.h" /* a second time does no harm */

int main(void)
{
    return dsv3_version() == DSV3_VERSION ? 0 : 1;
}
