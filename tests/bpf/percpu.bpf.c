// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Three more kinds of map: values per CPU, eviction of the oldest, longest prefix. */
#include "counts.bpf.h"

struct prefix {
	__u32 bits;
	__u32 address;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u64);
} per_cpu SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u64);
} recent SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16);
	__type(key, struct prefix);
	__type(value, __u64);
} routes SEC(".maps");

SEC("xdp")
int fill_maps(struct xdp_md *ctx)
{
	__u32 key = 1;
	struct prefix prefix = { .bits = 32, .address = 0x0100007f };
	__u64 length = bpf_xdp_get_buff_len(ctx);

	bpf_map_update_elem(&per_cpu, &key, &length, BPF_ANY);
	bpf_map_update_elem(&recent, &key, &length, BPF_ANY);
	bpf_map_update_elem(&routes, &prefix, &length, BPF_ANY);
	return XDP_PASS;
}
