// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A valid program of 300,000 instructions. Straight-line additions cost the verifier one step
 * each, so it stays below the limit of one million; inline assembly, because a compiler would
 * fold the sum of its own loop into a constant.
 */
#include "counts.bpf.h"

COUNTS(1);

SEC("xdp")
int huge(struct xdp_md *ctx)
{
	__u64 sum = ctx->ingress_ifindex;

	asm volatile(".rept 300000\n"
		     "%[sum] += 1\n"
		     ".endr\n"
		     : [sum] "+r"(sum));
	if (sum)
		count(0);
	return XDP_PASS;
}
