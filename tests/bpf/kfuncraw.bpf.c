// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Calls functions of the kernel by number, with no symbol that would tell their names: what a
 * loader that was taken over could send. BPF_CALL with source register 2 is such a call.
 */
#include "counts.bpf.h"

#define CALL_KERNEL(module)                                                    \
	asm volatile(".byte 0x85, 0x20, " module ", 0, 0x01, 0, 0, 0" ::: "r0", "r1", "r2", "r3", "r4", "r5")

SEC("xdp")
int by_number(struct xdp_md *ctx)
{
	CALL_KERNEL("0");
	return XDP_PASS;
}

/* The offset is a place in fd_array, where the BTF of a module would be. */
SEC("xdp")
int of_module(struct xdp_md *ctx)
{
	CALL_KERNEL("1");
	return XDP_PASS;
}
