// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A program with 200 references to a map, which libbpf sorts: the C library's qsort asks the kernel
 * how much memory there is once there is more than a kilobyte to sort.
 */
#include "counts.bpf.h"

COUNTS(1);

#define COUNT5 count(0); count(0); count(0); count(0); count(0);
#define COUNT50 COUNT5 COUNT5 COUNT5 COUNT5 COUNT5 COUNT5 COUNT5 COUNT5 COUNT5 COUNT5

SEC("xdp")
int refer(struct xdp_md *ctx)
{
	COUNT50 COUNT50 COUNT50 COUNT50
	return XDP_PASS;
}
