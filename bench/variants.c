/* Which variant of each inner loop an instruction set has: its own, or the one it borrows, read from the tables of dsv3.h.
   Part of `make help`. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "../dsv3.h"

#include <stdio.h>

enum { MAX_ISAS = 32 };

typedef void (*any_fn)(void);

/* One row: an operation, with its function in every table. */
static void row(const char *op, const any_fn *fns, const dsv3_isa *isas, size_t n)
{
    printf("  %-15s", op);
    for (size_t i = 0; i < n; i++) {
        size_t owner = 0;
        while (fns[owner] != fns[i])
            owner++;
        printf(" %-11s", owner == i ? "own" : dsv3_isa_name(isas[owner]));
    }
    printf("\n");
}

int main(void)
{
    dsv3_isa isas[MAX_ISAS];
    any_fn fns[MAX_ISAS];
    size_t n = 0;
    for (int isa = DSV3_ISA_SCALAR; isa < MAX_ISAS; isa++)
        if (dsv3__kern_get((dsv3_isa)isa)->isa == (dsv3_isa)isa)
            isas[n++] = (dsv3_isa)isa;

    printf("  %-15s", "");
    for (size_t i = 0; i < n; i++)
        printf(" %-11s", dsv3_isa_name(isas[i]));
    printf("\n");
#define ROW(ret, op, args)                                \
    for (size_t i = 0; i < n; i++)                        \
        fns[i] = (any_fn)dsv3__kern_get(isas[i])->op;     \
    row(#op, fns, isas, n);
    DSV3__KERN_OPS(ROW)
#undef ROW
    printf("  %-15s", "this machine");
    for (size_t i = 0; i < n; i++)
        printf(" %-11s", !dsv3_isa_supported(isas[i]) ? "no" : isas[i] == dsv3__cpu_best() ? "yes, auto" : "yes");
    printf("\n");
    return 0;
}
