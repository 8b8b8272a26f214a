// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A tail call: who may write to `jump` decides what code runs. */
#include "counts.bpf.h"

COUNTS(2);

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} jump SEC(".maps");

SEC("xdp")
int jump_away(struct xdp_md *ctx)
{
	count(0);
	bpf_tail_call(ctx, &jump, 0);
	return XDP_PASS;
}

SEC("xdp")
int jumped_to(struct xdp_md *ctx)
{
	count(1);
	return XDP_PASS;
}
