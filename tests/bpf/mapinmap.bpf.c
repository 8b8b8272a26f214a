// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* An array of maps with one inner map: libbpf makes the inner maps and fills the outer one. */
#include "counts.bpf.h"

struct inner_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} inner SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct inner_map);
} outer SEC(".maps") = {
	.values = { &inner },
};

SEC("xdp")
int count_inner(struct xdp_md *ctx)
{
	__u32 key = 0;
	void *map = bpf_map_lookup_elem(&outer, &key);
	__u64 *value = map ? bpf_map_lookup_elem(map, &key) : 0;

	if (value)
		__sync_fetch_and_add(value, 1);
	return XDP_PASS;
}
