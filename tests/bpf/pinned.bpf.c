// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Asks libbpf to share its map through /sys/fs/bpf/bpfgate_pinned. */
#include "counts.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} bpfgate_pinned SEC(".maps");

SEC("xdp")
int count_pinned(struct xdp_md *ctx)
{
	__u32 key = 0;
	__u64 *value = bpf_map_lookup_elem(&bpfgate_pinned, &key);

	if (value)
		__sync_fetch_and_add(value, 1);
	return XDP_PASS;
}
