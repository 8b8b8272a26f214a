// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Wants a value of the kernel's configuration, for which libbpf would read /proc/config.gz. */
#include "counts.bpf.h"

COUNTS(1);

extern int CONFIG_HZ __kconfig;

SEC("xdp")
int store_hz(struct xdp_md *ctx)
{
	__u64 hz = CONFIG_HZ;
	__u32 key = 0;

	bpf_map_update_elem(&counts, &key, &hz, BPF_ANY);
	return XDP_PASS;
}
