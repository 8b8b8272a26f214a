// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A map declared as STRUCT_OPS among the ordinary maps. libbpf 1.7.0 dies of it with SIGSEGV
 * when it loads the object, so it stands for every object that crashes a loader.
 */
#include "counts.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_STRUCT_OPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} ops SEC(".maps");

SEC("xdp")
int touch_ops(struct xdp_md *ctx)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&ops, &key) ? XDP_PASS : XDP_DROP;
}
