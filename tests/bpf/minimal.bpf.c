// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The smallest useful object: one XDP program of a dozen instructions and one array map. */
#include "counts.bpf.h"

COUNTS(1);

SEC("xdp")
int pass(struct xdp_md *ctx)
{
	count(0);
	return XDP_PASS;
}
