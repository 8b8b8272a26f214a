// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A socket filter that keeps every packet whole. seen[0]: packets. */
#include "counts.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} seen SEC(".maps");

SEC("socket")
int keep_all(struct __sk_buff *skb)
{
	__u32 key = 0;
	__u64 *packets = bpf_map_lookup_elem(&seen, &key);

	if (packets)
		__sync_fetch_and_add(packets, 1);
	return skb->len;
}
