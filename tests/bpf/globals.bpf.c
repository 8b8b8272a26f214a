// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Constants of every width that a client may set before load, and one variable. The program
 * copies them to values[0], so that a test reads what the kernel was really given.
 */
#include "counts.bpf.h"

struct pair {
	__u64 low;
	__u64 high;
};

volatile const __u8 g_u8 = 1;
volatile const __u16 g_u16 = 2;
volatile const __u32 g_u32 = 3;
volatile const __u64 g_u64 = 4;
volatile const __s32 g_s32 = -5;
volatile const struct pair g_pair = { .low = 6, .high = 7 };

__u64 runs; /* .bss */

struct snapshot {
	__u64 u8;
	__u64 u16;
	__u64 u32;
	__u64 u64;
	__s64 s32;
	__u64 low;
	__u64 high;
	__u64 runs;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct snapshot);
} values SEC(".maps");

SEC("xdp")
int copy_globals(struct xdp_md *ctx)
{
	__u32 key = 0;
	struct snapshot *snapshot = bpf_map_lookup_elem(&values, &key);

	__sync_fetch_and_add(&runs, 1);
	if (!snapshot)
		return XDP_PASS;
	snapshot->u8 = g_u8;
	snapshot->u16 = g_u16;
	snapshot->u32 = g_u32;
	snapshot->u64 = g_u64;
	snapshot->s32 = g_s32;
	snapshot->low = g_pair.low;
	snapshot->high = g_pair.high;
	snapshot->runs = runs;
	return XDP_PASS;
}
