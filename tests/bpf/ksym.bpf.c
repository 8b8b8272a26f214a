// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Wants the address of a kernel symbol, for which libbpf would read /proc/kallsyms. */
#include "counts.bpf.h"

COUNTS(1);

extern const void schedule __ksym;

SEC("xdp")
int store_address(struct xdp_md *ctx)
{
	__u64 address = (__u64)&schedule;
	__u32 key = 0;

	bpf_map_update_elem(&counts, &key, &address, BPF_ANY);
	return XDP_PASS;
}
