// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Two programs whose names agree in the 15 bytes that the kernel keeps of a name.
 * counts[0]: runs of the first, counts[1]: of the second.
 */
#include "counts.bpf.h"

COUNTS(2);

SEC("xdp")
int packet_observer_first(struct xdp_md *ctx)
{
	count(0);
	return XDP_PASS;
}

SEC("xdp")
int packet_observer_second(struct xdp_md *ctx)
{
	count(1);
	return XDP_PASS;
}
