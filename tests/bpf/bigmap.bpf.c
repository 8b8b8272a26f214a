// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A map of 1 GiB: 262144 values of 4096 bytes. */
#include "counts.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 262144);
	__uint(key_size, 4);
	__uint(value_size, 4096);
} big SEC(".maps");

SEC("xdp")
int touch_big(struct xdp_md *ctx)
{
	__u32 key = 0;
	__u64 *value = bpf_map_lookup_elem(&big, &key);

	if (value)
		__sync_fetch_and_add(value, 1);
	return XDP_PASS;
}
