// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The verifier must reject this: it reads the packet without a look at where it ends. */
#include "counts.bpf.h"

SEC("xdp")
int out_of_bounds(struct xdp_md *ctx)
{
	__u8 *data = (void *)(long)ctx->data;

	return data[100] ? XDP_PASS : XDP_DROP;
}
